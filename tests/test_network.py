"""What commands ask of the network and leave in the home folder: nothing that nobody asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE_PLACE = Path(__file__).parent.parent

# Python runs it at its start, in child processes, too. Sockets of a library's own C code are not
# seen here.
NO_NETWORK = """
import os
import socket
import sys

def refuse(*arguments, **more):
    with open(os.environ["ASKED"], "a") as file:
        print("asked for", arguments, file=file)
    raise OSError("there is no network in this test")

class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refuse(address)

socket.socket = Socket
socket.getaddrinfo = refuse
socket.create_connection = refuse
"""

COMMANDS = """
import json
import sys
from flashlm_helpers.cli.main import main

for command in json.loads(sys.argv[1]):
    status = main(command)
    print(command[0], "status", status, flush=True)
    assert status == 0, command
"""


def run_without_network(tmp_path, code, *arguments, **environment):
    """Run Python code with a fresh HOME; return (process, what was asked for, files in HOME)."""
    home = tmp_path / "fresh"
    site = tmp_path / "site"
    for folder in (home, site):
        folder.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    asked = tmp_path / "asked"

    # As in a shell where nothing was set.
    unset = ("MPL", "XDG_", "HF_", "ORT_", "TORCHINDUCTOR", "FLASHLM_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    paths = f"{site}{os.pathsep}{PACKAGE_PLACE}"
    clean |= {"HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": paths}
    clean |= {"ASKED": str(asked), "FLASHLM_HOME": str(tmp_path / "elsewhere")}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=clean | environment,
    )
    left = [str(path.relative_to(home)) for path in home.rglob("*")]
    return process, asked.read_text() if asked.exists() else "", left


def test_no_command_asks_the_network_or_writes_into_the_home_folder(tmp_path, text_dir):
    run = str(tmp_path / "run")
    text = ["--text-dir", str(text_dir)]
    tiny = ["--preset", "tiny", "--epochs", "0.1", "--batch", "8", "--save-dir", run]
    write = ["generate", "--checkpoint", run, "--prompt", "Once", "--tokens", "3"]
    race = ["race", "--presets", "tiny", "--seeds", "0", "--minutes", "0.02"]
    commands = [
        ["train", *tiny, *text],
        [*race, *text, "--results", str(tmp_path / "race.jsonl")],
        ["info", "--checkpoint", run],
        ["eval-bpc", "--checkpoint", run, "--text", str(text_dir / "valid.txt")],
        *([*write, "--runtime", runtime] for runtime in ("torch", "c", "onnx")),
    ]
    for form in ("compact", "packed", "onnx"):
        out = str(tmp_path / f"exported.{form}")
        commands.append(["export", "--checkpoint", run, "--format", form, "--out", out])
    process, asked, left = run_without_network(tmp_path, COMMANDS, json.dumps(commands))
    assert process.returncode == 0, process.stderr
    assert (asked, left) == ("", [])


def test_offline_nothing_is_even_looked_up(tmp_path):
    """Without the variable, "auto" asks, which shows that the test would notice."""
    code = "import flashlm_helpers as fl; print(fl.open_corpus('auto').name)"
    process, asked, _ = run_without_network(tmp_path, code)
    assert process.stdout == "builtin\n" and "huggingface.co" in asked
    (tmp_path / "asked").unlink()
    process, asked, left = run_without_network(tmp_path, code, FLASHLM_OFFLINE="1")
    assert process.stdout == "builtin\n" and (asked, left) == ("", [])
    assert "FLASHLM_OFFLINE" in process.stderr and process.stderr.count("\n") == 1


def test_a_person_may_overrule_what_is_switched_off(tmp_path):
    code = "import os, flashlm_helpers; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    process, *_ = run_without_network(tmp_path, code)
    assert process.stdout == "1\n"
    process, *_ = run_without_network(tmp_path, code, ORT_DISABLE_TELEMETRY="0")
    assert process.stdout == "0\n"
    offline = {"ORT_DISABLE_TELEMETRY": "0", "FLASHLM_OFFLINE": "1"}
    process, *_ = run_without_network(tmp_path, code, **offline)
    assert process.stdout == "1\n"


@pytest.mark.parametrize("folder", [".config/matplotlib", ".matplotlib"])
def test_matplotlib_keeps_the_folder_it_has(tmp_path, folder):
    code = "import flashlm_helpers, matplotlib; print(matplotlib.get_configdir())"
    process, *_ = run_without_network(tmp_path, code)
    assert process.stdout.strip() == str(tmp_path / "elsewhere" / "data" / "matplotlib")
    (tmp_path / "fresh" / folder).mkdir(parents=True)
    process, *_ = run_without_network(tmp_path, code)
    assert "elsewhere" not in process.stdout
