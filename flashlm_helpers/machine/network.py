"""What leaves the machine, and what is written into the home folder: only what is asked for."""

import os
from pathlib import Path

from flashlm_helpers.machine.files import project_dir

# Libraries read these when they are imported. A person may set another value.
_SILENCE = {
    # An identifier and a queue of events in the home folder, sent to its maker within a minute.
    "ORT_DISABLE_TELEMETRY": "1",
    # What else is installed, in the header of every request.
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # A request to another host that says which data set is read.
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
}


def keep_to_ourselves() -> None:
    """Switch off what libraries send of their own accord, and what they leave in the home folder.

    It only sets environment variables, and has to come before the libraries are imported. With
    FLASHLM_OFFLINE no value of a person's can let them ask the network.
    """
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)
    if is_offline():
        os.environ.update(_SILENCE, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

    # Matplotlib keeps a list of fonts: in its own folders if there are any, otherwise with ours.
    home = Path(os.path.expanduser("~"))
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "matplotlib"
    if not config.is_dir() and not (home / ".matplotlib").is_dir():
        os.environ.setdefault("MPLCONFIGDIR", str(project_dir() / "data" / "matplotlib"))


def is_offline() -> bool:
    """Return whether FLASHLM_OFFLINE or HF_HUB_OFFLINE forbids asking the network for anything."""
    values = [os.environ.get(name, "") for name in ("FLASHLM_OFFLINE", "HF_HUB_OFFLINE")]
    return any(value.lower() not in ("", "0", "off", "no", "false") for value in values)
