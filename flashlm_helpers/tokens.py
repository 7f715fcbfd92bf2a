"""Token ids on disk: tokenized once, memory-mapped, and cut into batches.

A batch is a pure function of (seed, step), so a run can stop anywhere and go on as if it had not.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import Corpus, Curriculum
from flashlm_helpers.machine.files import atomic_write, one_line, project_dir
from flashlm_helpers.machine.integrity import read_header, write_header
from flashlm_helpers.machine.notices import LenientStream, notice
from flashlm_helpers.sources.files import SEPARATOR
from flashlm_helpers.sources.gpt2 import batches_of_text
from flashlm_helpers.sources.overlap import leave_out_copies
from flashlm_helpers.vocab import BOS, EOS, PAD, Vocabulary

# A vocabulary is counted from so many training stories.
VOCABULARY_STORIES = 100_000

# A token file: so many bytes of JSON, padded with spaces, and then uint16 ids, low byte first. The
# JSON ends with a checksum of what stands before it, and of the ids.
_HEADER = 512
_MAGIC = "flashlm-tokens-2"


class TokenFile:
    """Stories as uint16 ids in a memory-mapped file: BOS, the story, EOS, BOS, and so on.

    ids: the memory map, (n_tokens,). identity: the keys of the text, split and vocabulary.
    Raises FlashLMError if the file is missing or truncated, or its identity is another.
    """

    def __init__(self, path: Path, identity: dict):
        self.path = Path(path)
        self.vocabulary_hash = identity["vocabulary"]
        self.corpus_key = identity["corpus"]
        # Whatever else lies under this name, one of these lines fails on it.
        try:
            header = read_header(self.path, _HEADER)
            if header["magic"] != _MAGIC or header["identity"] != identity:
                raise ValueError("it holds other text")
            self.n_tokens = header["tokens"]
            self.n_stories = header["stories"]
            self.n_bytes = header["bytes"]  # of the stories as UTF-8
            self.revision = header.get("revision")  # of the text on the hub; None if unknown

            # Nothing of the ids is in memory until a batch needs it.
            shape = (self.n_tokens,)
            self.ids = np.memmap(self.path, np.uint16, "r", offset=_HEADER, shape=shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{path} is not a token file that can be used ({one_line(error)})"
            raise FlashLMError(f"{problem}: delete it and it is built anew") from error

    @classmethod
    def build(
        cls,
        path: Path,
        identity: dict,
        stories: Iterable[str],
        vocabulary: Vocabulary,
        revision: str | None = None,
    ) -> "TokenFile":
        """Tokenize `stories` in parallel into a new file, atomically, and open it.

        revision: of the text on the hub, if it has one.
        Raises FlashLMError if there is no story or the file cannot be written.
        """
        split = identity["split"]
        header = {"magic": _MAGIC, "identity": identity, "tokens": 0, "stories": 0, "bytes": 0}
        header["revision"] = revision
        title = f"tokenizing {split}"
        bar = tqdm(desc=title, unit=" stories", mininterval=0.5, file=LenientStream())
        with bar, atomic_write(path) as file:
            # The header comes first, but is known last.
            file.write(b" " * _HEADER)

            # A few thousand stories at a time, however long the text is.
            for batch in batches_of_text(stories):
                encoded = vocabulary.encode_batch(batch)
                for story, ids in zip(batch, encoded, strict=True):
                    ids = np.concatenate(([BOS], ids, [EOS]))
                    file.write(ids.astype("<u2").tobytes())
                    header["tokens"] += len(ids)
                    header["bytes"] += len(story.encode("utf-8", "surrogatepass"))
                header["stories"] += len(batch)
                bar.update(len(batch))

            # An empty file would only fail later, in training.
            if header["stories"] == 0:
                advice = f"give more stories (in a text file, a line {SEPARATOR} ends each)"
                raise FlashLMError(f"the {split} split holds no story: {advice}")
            write_header(file, _HEADER, header)
        return cls(path, identity)

    def windows(self, length: int) -> int:
        """Return how many windows of `length` targets the ids are cut into; the last is padded."""
        return -(-(self.n_tokens - 1) // length)

    def batch(self, step: int, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the batch of one step: a pure function of its arguments and the text.

        Window w has inputs ids[w*length : (w+1)*length] and the same shifted by one as targets, so
        in each epoch every token is a target exactly once (but the first, which is BOS). The
        windows come in an order drawn anew for every epoch from (seed, epoch).
        Returns (inputs, targets), int64 (B, T); PAD fills the last window.
        """
        # One more column than a window is long, since targets are one token ahead.
        count = self.windows(length)
        ids = np.full((batch, length + 1), PAD, dtype=np.int64)
        for row in range(batch):
            # One epoch after another is a long sequence of windows; this step takes its part.
            epoch, place = divmod(step * batch + row, count)
            window = _order(seed, epoch, count)[place]
            start = int(window) * length
            found = self.ids[start : start + length + 1]
            ids[row, : len(found)] = found

        ids = torch.from_numpy(ids)
        return ids[:, :-1], ids[:, 1:]

    def sample_stories(self, count: int) -> list[np.ndarray]:
        """Return at most `count` stories as ids, without BOS and EOS; always the same ones.

        They are spread evenly over the file. Reads all of it: meant for validation splits.
        """
        # A story begins after its BOS, and ends before the EOS that precedes the next BOS.
        starts = np.flatnonzero(self.ids == BOS) + 1
        ends = np.append(starts[1:] - 2, self.n_tokens - 1)

        # Evenly spaced places, the first and the last story among them.
        count = min(count, len(starts))
        places = np.linspace(0, len(starts) - 1, count)

        # Copies, so that they do not depend on the file any more.
        stories = []
        for place in np.unique(places.astype(np.int64)):
            ids = self.ids[starts[place] : ends[place]]
            stories.append(np.array(ids))
        return stories


# A batch may lie in two epochs, and in a mixture in those of several files: all are remembered.
@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


# ---- several files in one run ----

SLOTS = 1_000  # rows after which a mixture deals its rows out anew, by shares of a thousandth


class Mixture:
    """Several token files as one text: the rows of a batch are theirs, by their shares.

    parts: the files. shares: of the rows; they add up to 1.
    """

    def __init__(self, parts: Sequence[TokenFile], shares: Sequence[float]):
        self.parts = parts
        self.path = parts[0].path
        self.vocabulary_hash = parts[0].vocabulary_hash

        # What stands in two stages is counted once.
        self._different = list({part.path: part for part in parts}.values())
        self.n_tokens = sum(part.n_tokens for part in self._different)
        self.n_stories = sum(part.n_stories for part in self._different)

        # The part of each slot, and how many slots before it are of the same part.
        ends = np.floor(np.cumsum(shares) * SLOTS + 0.5)
        self._dealt = np.searchsorted(ends, np.arange(SLOTS), side="right")
        self._counts = np.bincount(self._dealt, minlength=len(parts))
        self._earlier = np.arange(SLOTS) - (np.cumsum(self._counts) - self._counts)[self._dealt]

    def windows(self, length: int) -> int:
        """Return how many windows of `length` targets all the files are cut into."""
        return sum(part.windows(length) for part in self._different)

    def batch(self, step: int, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the batch of one step, int64 (B, T) each, as TokenFile.batch() does."""
        order = _order(seed, 0, SLOTS)
        rows = []
        for number in range(step * batch, (step + 1) * batch):
            # Each part gives its own rows, one after another.
            turn, place = divmod(number, SLOTS)
            slot = order[place]
            part = self._dealt[slot]
            row = turn * self._counts[part] + self._earlier[slot]
            rows.append(self.parts[part].batch(int(row), 1, length, seed))
        inputs, targets = zip(*rows, strict=True)
        return torch.cat(inputs), torch.cat(targets)


# ---- from a corpus to token files ----


class PreparedText(NamedTuple):
    """Everything that training needs of a text."""

    vocabulary: Vocabulary
    train: TokenFile | Mixture
    valid: TokenFile

    # Of a curriculum: its files with the share of the budget after which each ends, and its
    # validation files by name, of which the last one is `valid`.
    stages = ()
    sources = {}

    def held_out(self, count: int, source: str | None = None) -> list[str]:
        """Return at most `count` validation stories, spread evenly over the split.

        source: one of `sources`; by default the text that validation is about.
        """
        tokens = self.sources[source] if source else self.valid
        return [self.vocabulary.decode(ids) for ids in tokens.sample_stories(count)]

    def read_at(self, fraction: float) -> TokenFile | Mixture:
        """Return what a step reads at whose end this share of the budget is spent."""
        for tokens, end in self.stages:
            if fraction <= end:
                return tokens
        return self.stages[-1][0] if self.stages else self.train


class StagedText(PreparedText):
    """A PreparedText with `stages` and `sources` of its own; it, too, unpacks into three things."""


def prepare(
    corpus: Corpus, vocabulary_size: int = 10_000, data_dir: Path | None = None
) -> PreparedText:
    """Make the vocabulary and the token files of a text, or open those that were made before.

    vocabulary_size: the most ids of the vocabulary, which is counted from the first 100,000
    training stories; of a curriculum, from those of the mix. data_dir: where files are kept
    (default: data/).
    Raises FlashLMError if there are fewer than two training stories or no validation story.
    """
    vocabulary = _prepare_vocabulary(corpus, vocabulary_size, data_dir)
    if isinstance(corpus, Curriculum):
        return _prepare_stages(corpus, vocabulary, data_dir)
    train = _training_tokens(corpus, vocabulary, data_dir, [])
    return PreparedText(vocabulary, train, tokenize(corpus, "valid", vocabulary, data_dir))


def _prepare_stages(mix: Curriculum, vocabulary: Vocabulary, data_dir: Path | None) -> PreparedText:
    # A text may come in two stages, and two texts may have one name. The last one comes last.
    sources = {}
    for number, (corpus, _) in enumerate(mix.stages, 1):
        valid = tokenize(corpus, "valid", vocabulary, data_dir)
        name = corpus.name
        if name in sources and sources[name].corpus_key != corpus.key:
            name = f"{name} ({number})"
        sources.pop(name, None)
        sources[name] = valid

    # What one text validates with, another one may hold to train on.
    held_out = list(sources.values())
    corpora, shares = zip(*mix.stages, strict=True)
    parts = [_training_tokens(corpus, vocabulary, data_dir, held_out) for corpus in corpora]

    # Shuffled, there is one stage, and all of them are in it.
    text = StagedText(vocabulary, Mixture(parts, shares), valid)
    text.sources = sources
    if not mix.shuffled:
        text.stages = tuple(zip(parts, itertools.accumulate(shares), strict=True))
    return text


def _training_tokens(
    corpus: Corpus, vocabulary: Vocabulary, data_dir: Path | None, held_out: Sequence[TokenFile]
) -> TokenFile:
    # A single story nearly always means that stories are not separated.
    train = tokenize(corpus, "train", vocabulary, data_dir, held_out)
    if train.n_stories < 2:
        problem = f"the training text of {corpus.name} holds one story only"
        raise FlashLMError(f"{problem}: separate stories with a line {SEPARATOR}")
    return train


def _prepare_vocabulary(corpus: Corpus, size: int, data_dir: Path | None) -> Vocabulary:
    # One text may have vocabularies of several sizes.
    path = _cache_path(corpus, f"vocabulary-{size}-{corpus.key}.json", data_dir)
    if path.exists():
        try:
            return Vocabulary.load(path)
        except FlashLMError:
            notice(f"{path} cannot be used: building it anew")

    # Counting takes a while, so say what is going on.
    notice("counting tokens for the vocabulary ...")

    # Of a large text, the first part will do.
    sample = itertools.islice(corpus.stories("train"), VOCABULARY_STORIES)
    vocabulary = Vocabulary.build(sample, size)
    vocabulary.save(path)
    return vocabulary


def tokenize(
    corpus: Corpus,
    split: str,
    vocabulary: Vocabulary,
    data_dir: Path | None = None,
    held_out: Sequence[TokenFile] = (),
) -> TokenFile:
    """Open the token file of one split; build it if there is none, or it is damaged.

    data_dir: where token files are kept; data/ of the project by default. held_out: what a run
    validates with besides the text's own; its stories are left out of training, too.
    """
    # Another text, split or vocabulary has another file.
    identity = {"corpus": corpus.key, "split": split, "vocabulary": vocabulary.hash}
    others = [tokens for tokens in held_out if tokens.corpus_key != corpus.key]
    if others:
        identity["held_out"] = sorted(tokens.corpus_key for tokens in others)
    content = json.dumps(identity).encode()
    digest = hashlib.sha256(content).hexdigest()[:12]
    path = _cache_path(corpus, f"{split}-{digest}.tokens", data_dir)

    # A damaged file costs time, but never a run.
    if path.exists():
        try:
            return TokenFile(path, identity)
        except FlashLMError:
            notice(f"{path} cannot be used: building it anew")

    # A training story that is a validation story, too, would make the model look better than it is.
    copies = []
    if split == "train":
        for valid in [tokenize(corpus, "valid", vocabulary, data_dir), *others]:
            copies += map(vocabulary.decode, valid.sample_stories(valid.n_stories))
    stories = leave_out_copies(corpus.stories(split), copies)
    revision = getattr(corpus.read, "revision", None)
    return TokenFile.build(path, identity, stories, vocabulary, revision)


def _cache_path(corpus: Corpus, ending: str, data_dir: Path | None) -> Path:
    # "owner/name:config", a data set of the hub, cannot be the name of a file.
    name = re.sub(r"[/\\:]", "-", corpus.name)
    return Path(data_dir or project_dir() / "data") / f"{name}-{ending}"
