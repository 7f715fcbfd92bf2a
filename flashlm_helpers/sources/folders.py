"""Folders of stories: which of their files are for training, and which to validate with."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.sources.files import READERS, SEPARATOR, read_stories, say_once, suffix_of
from flashlm_helpers.sources.splits import hold_out, read_ahead

# How the files of each split begin; the second are called val, valid, validation or dev.
PREFIXES = {"train": ("train",), "valid": ("val", "dev")}

# The paths of each split, in the order in which they are read.
Files = dict[str, list[Path]]

# Since records are read as they are now, their files have other keys.
_READING = 2


def find_stories(folder: Path) -> Files:
    """Find the files of each split in a folder, by their names and in the order of these.

    Where none is called train*, all texts are for training but those for validation. Says on
    stderr, once, which they are and which others there are.
    Raises FlashLMError if there is no such folder, or nothing in it to train on.
    """
    if not folder.is_dir():
        raise FlashLMError(f"{folder} is not a folder: give one that holds train*.txt")
    files = {"train": [], "valid": [], None: []}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            files[_split_of(path)].append(path)
    others = files.pop(None)

    # A folder of books, say, has no file for training by its name: all of its texts are.
    if not files["train"]:
        files["train"] = [path for path in others if suffix_of(path) in READERS]
        others = [path for path in others if path not in files["train"]]

    # Say what is there instead, and what to do.
    if not files["train"]:
        problem = "is empty"
        if any(folder.iterdir()):
            problem = f"holds no text ({', '.join(READERS)})"
        advice = f"put stories into train.txt, with a line {SEPARATOR} after each"
        raise FlashLMError(f"{folder} {problem}: {advice}")

    # What is read need not be what was meant.
    train = _names(files["train"])
    valid = _names(files["valid"]) or "some of its stories"
    rest = f"; not read: {_names(others)}" if others else ""
    say_once(f"{folder}: {train} to train on, {valid} to validate with{rest}")
    return files


def _split_of(path: Path) -> str | None:
    """Return the split that a file is for, by its name; None for a file that is not read."""
    for split, prefixes in PREFIXES.items():
        if path.name.lower().startswith(prefixes) and suffix_of(path) in ("", *READERS):
            return split
    return None


def _names(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    if len(names) > 4:
        names[3:] = [f"{len(names) - 3} more"]
    return ", ".join(names)


def state_of(files: Files) -> list:
    """Return what changes whenever the text does: places, sizes and times of change of files."""
    states = []
    for path in files["train"] + files["valid"]:
        state = path.stat()
        known = (str(path.resolve()), state.st_size, state.st_mtime_ns)
        states.append(known if path.suffix == ".txt" else (*known, _READING))

    # Caches of a text too small for one story in twenty may be from when it lacked a split.
    if not files["valid"] and not read_ahead(_read(files["train"]))[1]:
        states.append("smallest hash")
    return states


def read_folder(files: Files, limit: int | None, split: str) -> Iterator[str]:
    """Yield the stories of "train", `limit` of them at most, or of "valid".

    Without files for validation, both splits are read from those for training.
    Raises FlashLMError if files cannot be read, or hold too few stories to train on.
    """
    # Two to train on, and one to hold out; this is known before anything slow begins.
    if split == "train":
        _require_stories(files["train"], least=2 if files["valid"] else 3)
    stories = _read(files[split] or files["train"])
    if not files["valid"]:
        stories = hold_out(stories, split)

    if split == "train":
        stories = itertools.islice(stories, limit)
    return stories


def _read(paths: Iterable[Path]) -> Iterator[str]:
    return itertools.chain.from_iterable(map(read_stories, paths))


def _require_stories(paths: list[Path], least: int) -> None:
    """Raise FlashLMError if files hold text, but fewer than `least` different stories."""
    # Read no further than necessary.
    different = set()
    for story in filter(str.strip, _read(paths)):
        different.add(story.strip())
        if len(different) == least:
            return

    # A single story nearly always means that stories are not separated.
    if different:
        count = "one story" if len(different) == 1 else f"{len(different)} stories"
        problem = f"{paths[0].parent} holds {count} only, and training needs {least} or more"
        raise FlashLMError(f"{problem}: put a line {SEPARATOR} after each story, or add some")
