"""The shape of the house: which way imports run, what stands at the top level, what hangs on fl."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashlm_helpers as fl

PACKAGE = Path(fl.__file__).parent
CORE = {
    "config", "corpus", "vocab", "tokens", "quantization", "mixers", "registry", "model", "loss",
    "optimization", "autotune", "training", "checkpoint", "evaluation", "generation",
    "plots",
}  # fmt: skip
WINGS = {"machine", "sources", "builtin", "experiments", "runtime", "archive", "cli"}
# In the order of the data's way: a module imports nothing that comes after it.
ORDER = [
    "config", "machine", "sources", "builtin", "corpus", "vocab", "tokens", "quantization",
    "mixers", "registry", "loss", "model", "optimization", "autotune", "evaluation", "checkpoint",
    "training", "generation", "plots", "archive", "runtime", "experiments", "cli",
]  # fmt: skip


def room_of(path):
    """The module at the top level, or the wing, that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path):
    """Every room that a file imports from, wherever in the file it does so."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module]
            if node.module == "flashlm_helpers":
                names = [f"flashlm_helpers.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "flashlm_helpers" and rest and rest != "__version__":
                rooms.add(rest.split(".")[0])
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_top_level_holds_the_taught_core_and_the_wings():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert modules == CORE
    assert folders == WINGS
    assert set(ORDER) == CORE | WINGS
    for wing in WINGS:
        assert ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    found = imports_of(path) - {room}
    if room in ("__init__", "__main__"):
        assert found <= {"cli", "machine"}  # what libraries send is switched off before all else
    elif room == "machine":
        assert found <= {"config"}
    elif room in ("sources", "builtin"):
        assert found <= {"config", "machine"}
    elif path.parent == PACKAGE:
        later = ORDER[ORDER.index(room) :]
        typing_only = {"generation"} if room == "model" else set()  # the words of a Protocol
        assert not (found & set(later)) - typing_only
        assert not found & (WINGS - {"machine", "sources", "builtin"})
    elif room == "archive":
        assert not found & WINGS
    elif room == "runtime":
        assert not found & {"experiments", "cli"}
    elif room == "experiments":
        assert "cli" not in found


def test_every_name_and_module_hangs_on_fl():
    assert len(fl.__all__) <= 30
    for name in dir(fl):
        assert getattr(fl, name) is not None, name
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = fl.nothing_such


def test_every_promise_names_a_test_that_is_there():
    root = PACKAGE.parent
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (root / "SECURITY.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (root / "tests" / file).read_text(), test


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, flashlm_helpers; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_paths_that_others_import_keep_working():
    from flashlm_helpers.config import PRESETS
    from flashlm_helpers.model import FlashLM
    from flashlm_helpers.vocab import Vocabulary

    assert (PRESETS, FlashLM, Vocabulary) == (fl.PRESETS, fl.FlashLM, fl.Vocabulary)
