"""Language models of others: a folder, or a name on the hub, as the files of one revision."""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.network import is_offline
from flashlm_helpers.machine.notices import notice
from flashlm_helpers.sources.hub import HUB_PATIENCE, explain_errors, in_time

# What describes a model and its tokenizer, as patterns of files. Programs, which some models bring
# along, are not among them.
_CONFIG = "config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.model",
    "*.tiktoken",
)

# Weights, in one file, or in several with an index. Of these two forms, the first that a model has
# is read; the second is pickled.
_SAFE = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")

_ADVICE = "check the connection and try again, or give a folder that holds the model"


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model are."""

    name: str  # as a person gave it
    folder: Path
    safe: bool  # whether the weights are safetensors, which hold nothing but numbers
    revision: str | None  # the hub's commit; None for a folder of one's own


def find_model(name: str) -> ModelFiles:
    """Find a model: a local folder, or the newest commit of a name on the hub.

    Of the hub's files, only weights, config and tokenizer are downloaded, by the hub's own client
    into its own cache (HF_HOME). A hub that is silent, or may not be asked, is not needed for what
    is there already.
    Raises FlashLMError, in one line, if there is no such model, or it is no model.
    """
    # A folder comes before a model of the hub, whose name looks like a path.
    if os.path.isdir(name):
        return _check_files(name, Path(name), None)
    if os.path.isfile(name):
        advice = "give its folder, or the model's name on the hub"
        raise FlashLMError(f"{name} is a file, and a model of others is a folder: {advice}")
    _check_name(name)

    # The warnings of the client would bury the one line in which we say the same.
    for library in ("huggingface_hub", "httpx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if is_offline():
        folder = _find_download(name)
        if folder is None:
            problem = f"{name} was not downloaded before"
            advice = "unset it, or give a folder that holds the model"
            raise FlashLMError(f"{problem}, and FLASHLM_OFFLINE or HF_HUB_OFFLINE is set: {advice}")
        return _check_files(name, folder, folder.name)
    return _download(name)


def _check_name(name: str) -> None:
    """Raise FlashLMError unless the hub could have a model of this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        advice = "give a folder that is there, or a name such as roneneldan/TinyStories-1M"
        raise FlashLMError(f"there is no model {name!r}: {advice}") from error


def _find_download(name: str) -> Path | None:
    """Return the folder in the client's cache that holds all of a model's newest known commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # The client knows whether anything is missing of what matches the patterns, but it does not
    # mind if nothing does.
    for weights in (_SAFE, _PICKLED):
        wanted = [_CONFIG, *weights, *_TOKENIZER]
        with suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=wanted))
            if _matching(weights, _names_in(folder)):
                return folder
    return None


def _download(name: str) -> ModelFiles:
    """Download what is missing of the newest commit of a model."""
    from huggingface_hub import snapshot_download

    # A short question first, since the client would try for minutes.
    try:
        with explain_errors(f"{name} cannot be read from the hub", _ADVICE):
            late = f"{name}: the hub did not answer"
            files = in_time(HUB_PATIENCE, late, _ask_hub, name, advice=_ADVICE)
    except FlashLMError as error:
        folder = None if isinstance(error, _NoSuchModel) else _find_download(name)
        if folder is None:
            raise
        notice(f"{error}; using what was downloaded before")
        return _check_files(name, folder, folder.name)

    # The client takes all files from one commit, after which it names the folder.
    wanted = [_CONFIG, *_choose_weights(name, files), *_TOKENIZER]
    with explain_errors(f"{name} cannot be downloaded", _ADVICE):
        folder = Path(snapshot_download(name, allow_patterns=wanted))
    return _check_files(name, folder, folder.name)


class _NoSuchModel(FlashLMError):
    """The hub has answered, and has no model of this name."""


def _ask_hub(name: str) -> list[str]:
    """Ask the hub for the names of a model's files, which needs only a short answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(name)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        problem = f"the hub has no public model {name!r}, and there is no such folder here"
        raise _NoSuchModel(f"{problem}: check the name") from error
    return [file.rfilename for file in info.siblings or []]


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _matching(patterns: Iterable[str], files: list[str]) -> list[str]:
    """Return the files that match any of these patterns."""
    return [file for file in files if any(fnmatchcase(file, pattern) for pattern in patterns)]


def _choose_weights(name: str, files: list[str]) -> tuple[str, ...]:
    """Return the patterns of the weights to read; raise FlashLMError unless it is a model."""
    form = next((form for form in (_SAFE, _PICKLED) if _matching(form, files)), None)
    if _CONFIG not in files or form is None:
        lacking = _CONFIG if form else "model.safetensors or pytorch_model.bin"
        problem = f"{name} is no model that transformers can read, for it has no {lacking}"
        raise FlashLMError(f"{problem}: give a folder or model that has")
    return form


def _check_files(name: str, folder: Path, revision: str | None) -> ModelFiles:
    """Return a folder's files; raise FlashLMError unless they are a model and its tokenizer."""
    files = _names_in(folder)
    safe = _choose_weights(name, files) is _SAFE
    if not _matching(_TOKENIZER, files):
        advice = "save the model's own tokenizer into a folder with it, and give the folder"
        raise FlashLMError(f"{name} has no tokenizer: {advice}")
    if not safe:
        words = "its weights are pickled, and are read without running any code in them"
        notice(f"{name} has no safetensors: {words}")
    return ModelFiles(name, folder, safe, revision)
