"""Token ids on disk: tokenized once, memory-mapped, and cut into batches by a pure function of (seed, step)."""

import functools
import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flashlm_helpers.config import FlashLMError, project_dir
from flashlm_helpers.corpus import SEPARATOR, Corpus
from flashlm_helpers.files import atomic_write
from flashlm_helpers.vocab import BOS, EOS, PAD, Vocabulary, batches_of_text

_MAGIC = "flashlm-tokens-1"
_HEADER = 512  # bytes before the first id: JSON, padded with spaces
VOCABULARY_STORIES = 100_000  # as many stories as a vocabulary is counted from


class TokenFile:
    """Stories as uint16 ids in a memory-mapped file: BOS, the story, EOS, and so on.

    ids: the memory map, (n_tokens,). Opening raises FlashLMError if the file is missing, truncated, or was made
    from other text, another split or another vocabulary.
    """

    def __init__(self, path: Path, identity: dict):
        self.path, self.vocabulary_hash = Path(path), identity["vocabulary"]
        try:
            with self.path.open("rb") as file:
                header = json.loads(file.read(_HEADER))
            self.n_tokens, self.n_stories, self.n_bytes = header["tokens"], header["stories"], header["bytes"]
            size = self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FlashLMError(f"{path} is not a token file: delete it and it is built anew") from error
        if header["magic"] != _MAGIC or header["identity"] != identity or size != _HEADER + 2 * self.n_tokens:
            raise FlashLMError(f"{path} is truncated or holds other text: delete it and it is built anew")
        self.ids = np.memmap(self.path, dtype=np.uint16, mode="r", offset=_HEADER, shape=(self.n_tokens,))

    @classmethod
    def build(cls, path: Path, identity: dict, stories, vocabulary: Vocabulary) -> "TokenFile":
        """Tokenize `stories` in parallel into a new file, atomically, and open it.

        Raises FlashLMError if there is no story or the file cannot be written.
        """
        counts = {"tokens": 0, "stories": 0, "bytes": 0}
        bar = tqdm(desc=f"tokenizing {identity['split']}", unit=" stories", mininterval=0.5, file=sys.stderr)
        with bar, atomic_write(path) as file:
            file.write(b" " * _HEADER)
            for batch in batches_of_text(stories):
                arrays = [np.concatenate(([BOS], ids, [EOS])) for ids in vocabulary.encode_batch(batch)]
                ids = np.concatenate(arrays).astype("<u2")
                file.write(ids.tobytes())
                counts["tokens"] += len(ids)
                counts["stories"] += len(batch)
                counts["bytes"] += sum(len(story.encode("utf-8", "surrogatepass")) for story in batch)
                bar.update(len(batch))
            if not counts["stories"]:
                raise FlashLMError(f"the {identity['split']} split holds no story: end each with a line {SEPARATOR}")
            file.seek(0)
            file.write(json.dumps({"magic": _MAGIC, "identity": identity, **counts}).encode().ljust(_HEADER))
        return cls(path, identity)

    def windows(self, length: int) -> int:
        """How many windows of `length` targets the ids are cut into, the last one padded."""
        return -(-(self.n_tokens - 1) // length)

    def batch(self, step: int, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """The batch of one step: a pure function of its arguments and the text.

        Window w has inputs ids[w*length : (w+1)*length] and the same shifted by one as targets, so in each epoch every
        token is a target exactly once (but the first, which is BOS); windows come in an order drawn anew for
        every epoch from (seed, epoch). Returns (inputs, targets), int64 (B, T); PAD fills the last window.
        """
        count = self.windows(length)
        out = np.full((batch, length + 1), PAD, dtype=np.int64)
        for row, position in enumerate(range(step * batch, (step + 1) * batch)):
            epoch, place = divmod(position, count)
            start = int(_order(seed, epoch, count)[place]) * length
            window = self.ids[start : start + length + 1]
            out[row, : len(window)] = window
        ids = torch.from_numpy(out)
        return ids[:, :-1], ids[:, 1:]

    def sample_stories(self, count: int) -> list[np.ndarray]:
        """At most `count` stories spread evenly over the file, as ids without BOS and EOS; always the same ones.

        Reads the whole file once: meant for validation splits.
        """
        starts = np.flatnonzero(self.ids == BOS) + 1
        ends = np.append(starts[1:] - 2, self.n_tokens - 1)
        chosen = np.unique(np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(np.int64))
        return [np.array(self.ids[starts[i] : ends[i]]) for i in chosen]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def tokenize(corpus: Corpus, split: str, vocabulary: Vocabulary, data_dir: Path | None = None) -> TokenFile:
    """The token file of one split: the one made before if it is whole, otherwise a new one.

    data_dir: where token files are kept; data/ of the project by default.
    """
    identity = {"corpus": corpus.key, "split": split, "vocabulary": vocabulary.hash}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    path = Path(data_dir or project_dir() / "data") / f"{corpus.name}-{split}-{digest}.tokens"
    if path.exists():
        try:
            return TokenFile(path, identity)
        except FlashLMError:
            print(f"{path} is damaged: building it anew", file=sys.stderr)
    return TokenFile.build(path, identity, corpus.stories(split), vocabulary)


def prepare(corpus: Corpus, vocabulary_size: int = 10_000,
            data_dir: Path | None = None) -> tuple[Vocabulary, TokenFile, TokenFile]:
    """Everything training reads, made once and reused: (vocabulary, train tokens, valid tokens).

    The vocabulary is counted from the first 100,000 training stories. Raises FlashLMError if the corpus
    has fewer than two training stories or no validation story.
    """
    folder = Path(data_dir or project_dir() / "data")
    path = folder / f"{corpus.name}-vocabulary-{vocabulary_size}-{corpus.key}.json"
    vocabulary = None
    if path.exists():
        try:
            vocabulary = Vocabulary.load(path)
        except FlashLMError:
            print(f"{path} is damaged: building it anew", file=sys.stderr)
    if vocabulary is None:
        print("counting tokens for the vocabulary ...", file=sys.stderr)
        sample = itertools.islice(corpus.stories("train"), VOCABULARY_STORIES)
        vocabulary = Vocabulary.build(sample, vocabulary_size)
        vocabulary.save(path)
    train = tokenize(corpus, "train", vocabulary, folder)
    if train.n_stories < 2:
        raise FlashLMError(f"the training text holds one story only: separate stories with a line {SEPARATOR}")
    return vocabulary, train, tokenize(corpus, "valid", vocabulary, folder)
