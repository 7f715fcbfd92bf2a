"""The vocabulary: GPT-2's byte-pair encoding cut by frequency, and lossless all the same.

Built step by step in notebook 01.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line, write_json
from flashlm_helpers.sources.gpt2 import GPT2_SIZE, batches_of_text, gpt2_encoding, gpt2_ids

# The first ids have these meanings in every vocabulary.
PAD, UNK, BOS, EOS = range(4)
SPECIALS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")

# The tokens of a single byte are always kept: they make every text encodable.
BYTES = 256
_SINGLE_BYTES = [bytes([value]) for value in range(BYTES)]

SMALLEST = len(SPECIALS) + BYTES
LARGEST = len(SPECIALS) + GPT2_SIZE - 1

_FORMAT = "flashlm-vocabulary-1"
_LARGEST_FILE = 1 << 24  # characters, several times those of a whole GPT-2


# ---- GPT-2's tokens ----


def count_gpt2_tokens(stories: Iterable[str]) -> np.ndarray:
    """Count how often each GPT-2 token occurs in the stories; (50_257,) int64."""
    # Batch by batch, so any number of stories can be counted.
    counts = np.zeros(GPT2_SIZE, dtype=np.int64)
    for batch in batches_of_text(stories):
        for ids in gpt2_ids(batch):
            counts += np.bincount(ids, minlength=GPT2_SIZE)
    return counts


# ---- our ids ----


class Vocabulary:
    """Text <-> ids 0 .. len-1: four specials, then kept GPT-2 tokens, the most frequent first.

    `decode(encode(text)) == text` for every string: a token that was cut is spelled with the
    longest kept pieces, at worst with its bytes. So UNK is never produced; it keeps its id because
    v4 has it.

    kept: GPT-2 ids in the order of our ids, all 256 single bytes among them. coverage: the share
    of the GPT-2 tokens in the text it was built from that are kept whole (None if unknown).
    Raises FlashLMError for ids that are no vocabulary.
    """

    def __init__(self, kept: Sequence[int], coverage: float | None = None):
        self.kept = tuple(map(int, kept))
        self.coverage = coverage
        # Ids, checkpoints and token files mean something only together with this hash.
        content = json.dumps([_FORMAT, SPECIALS, self.kept])
        self.hash = hashlib.sha256(content.encode()).hexdigest()

        # From ids to bytes, and back.
        try:
            pieces = list(map(gpt2_encoding().decode_single_token_bytes, self.kept))
        except (KeyError, OverflowError) as error:
            problem = f"{one_line(error)} is not the id of a GPT-2 token"
            raise FlashLMError(f"not a vocabulary: {problem}") from error
        self._bytes = [b""] * len(SPECIALS) + pieces
        self._id_of = {piece: i for i, piece in enumerate(pieces, len(SPECIALS))}
        distinct = len(self._id_of) == len(pieces)
        if not distinct or not self._id_of.keys() >= set(_SINGLE_BYTES):
            raise FlashLMError("not a vocabulary: it repeats tokens or lacks single bytes")

        # From GPT-2's ids to ours: directly, or (-1) by spelling, which is remembered.
        self._direct = np.full(GPT2_SIZE, -1, dtype=np.int32)
        self._direct[list(self.kept)] = np.arange(len(SPECIALS), len(self))
        self._spelled: dict[int, list[int]] = {}

    @classmethod
    def build(cls, stories: Iterable[str], size: int = 10_000) -> "Vocabulary":
        """Keep the tokens that occur most often in `stories`.

        size: the most ids that the vocabulary may have, with the four specials and 256 bytes; it
        has fewer if the stories have fewer distinct tokens. From 50,257 on, it is GPT-2's own
        vocabulary, also of tokens that do not occur.
        Raises FlashLMError if the size is out of range or there is no text.
        """
        if not SMALLEST <= size <= LARGEST:
            limits = f"between {SMALLEST} and {LARGEST:,} ids"
            raise FlashLMError(f"a vocabulary has {limits}, not {size:,}")
        counts = count_gpt2_tokens(stories)
        if not counts.any():
            raise FlashLMError("the text is empty, so there is nothing to build a vocabulary from")

        # All single bytes are kept, and of the other tokens that occur, the most frequent. A stable
        # sort leaves tokens that are equally frequent in GPT-2's order.
        single = list(map(gpt2_encoding().encode_single_token, _SINGLE_BYTES))
        ranked = np.argsort(-counts, kind="stable")
        wanted = (counts[ranked] > 0) | (size >= GPT2_SIZE)
        others = ranked[wanted & ~np.isin(ranked, single)]
        kept = np.union1d(single, others[: size - SMALLEST])

        # Ids are given by frequency, too, so that a small id is a frequent token.
        kept = kept[np.argsort(-counts[kept], kind="stable")]
        coverage = counts[kept].sum() / counts.sum()
        return cls(kept, float(coverage))

    def __len__(self) -> int:
        return len(self._bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id; the four specials have none."""
        return self._bytes[token_id]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, (n_tokens,) uint16, without BOS and EOS; in parallel."""
        return list(map(self._cut, gpt2_ids(texts)))

    def _cut(self, gpt2_ids: list[int]) -> np.ndarray:
        # Most texts have only kept tokens, and are done here.
        ours = self._direct[gpt2_ids]
        if (ours >= 0).all():
            return ours.astype(np.uint16)

        # Some tokens were cut: each becomes the ids of its pieces.
        ids = []
        for gpt2_id, our_id in zip(gpt2_ids, ours.tolist(), strict=True):
            if our_id >= 0:
                ids.append(our_id)
            else:
                ids += self._spell(gpt2_id)
        return np.array(ids, dtype=np.uint16)

    def _spell(self, gpt2_id: int) -> list[int]:
        """Return a cut token as ids: again and again the longest kept piece it starts with."""
        if gpt2_id not in self._spelled:
            rest = gpt2_encoding().decode_single_token_bytes(gpt2_id)
            ids = []
            # Every single byte is kept, so there always is such a piece.
            while rest:
                length = len(rest)
                while rest[:length] not in self._id_of:
                    length -= 1
                ids.append(self._id_of[rest[:length]])
                rest = rest[length:]
            self._spelled[gpt2_id] = ids
        return self._spelled[gpt2_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Specials give nothing.

        Bytes that are no text, which only a model writes, give U+FFFD. Raises FlashLMError for an
        id outside the vocabulary.
        """
        # A negative id would silently count from the end.
        ids = list(map(int, ids))
        if ids and (min(ids) < 0 or max(ids) >= len(self)):
            raise FlashLMError(f"an id is outside this vocabulary of {len(self)} ids")

        # A lone surrogate is three bytes that strict UTF-8 would refuse; what is no text even so
        # cannot come from encode().
        joined = b"".join(self._bytes[i] for i in ids)
        try:
            return joined.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return joined.decode("utf-8", "replace")

    def check_matches(self, wanted_hash: str, whose: str) -> None:
        """Raise FlashLMError unless this is the vocabulary of `whose`, by its hash."""
        if self.hash != wanted_hash:
            raise FlashLMError(
                f"{whose} was made with another vocabulary ({wanted_hash[:12]}) than this one "
                f"({self.hash[:12]}): use the text and vocabulary it was trained with"
            )

    def save(self, path: str | Path) -> None:
        """Write readable JSON, atomically: each kept token as [GPT-2 id, text], and the hash."""
        # The text is for people, and often only a part of a character; load() reads the ids.
        tokens = []
        for gpt2_id in self.kept:
            piece = gpt2_encoding().decode_single_token_bytes(gpt2_id)
            tokens.append([gpt2_id, piece.decode("utf-8", "backslashreplace")])

        content = {"format": _FORMAT, "hash": self.hash, "coverage": self.coverage}
        write_json(path, content | {"specials": SPECIALS, "tokens": tokens})

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read a file that save() wrote; raise FlashLMError if it is missing or damaged."""
        # The ids are enough; everything else follows from them, or is checked against them.
        try:
            with Path(path).open(encoding="utf-8") as file:
                content = json.loads(file.read(_LARGEST_FILE))
            kept = [gpt2_id for gpt2_id, _ in content["tokens"]]
            vocabulary = cls(kept, content["coverage"])
            # Only the file's own hash can show that tokens changed places.
            if content["format"] != _FORMAT or content["hash"] != vocabulary.hash:
                raise FlashLMError("its content does not match its hash")

        except OSError as error:
            raise FlashLMError(f"cannot read the vocabulary {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = f"{path} is not a vocabulary, or is damaged ({one_line(error)})"
            raise FlashLMError(f"{problem}: delete it and it is built anew") from error
        return vocabulary
