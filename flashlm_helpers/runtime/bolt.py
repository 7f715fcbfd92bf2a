"""bolt.c from Python: built by the machine's C compiler at first use, and a class around it."""

import ctypes
import functools
import hashlib
import itertools
import math
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.generation import Prompts, Sampling, Story
from flashlm_helpers.machine.compiler import complaint
from flashlm_helpers.machine.files import atomic_write, one_line, project_dir
from flashlm_helpers.machine.hardware import usable_cores
from flashlm_helpers.runtime.packed import LANES, load_vocabulary
from flashlm_helpers.vocab import EOS

SOURCE = Path(__file__).with_name("bolt.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-shared", "-fPIC", "-DBOLT_LIBRARY", "-Wno-psabi")

# From so many stories on, LANES side by side are faster than one after another.
MIN_STORIES_TO_BATCH = 10


class RuntimeUnavailable(FlashLMError):
    """What a runtime needs cannot be built here; PyTorch computes the same, more slowly."""


# ---- the library ----

# C's types, by the names that bolt.c gives its arguments.
_POINTER = ctypes.c_void_p
_INT = ctypes.c_int
_LONG = ctypes.c_long
_TEXT = ctypes.c_char_p
_SIZE = ctypes.c_size_t
_IDS = np.ctypeslib.ndpointer(np.uint16, flags="C")
_FLOATS = np.ctypeslib.ndpointer(np.float32, flags="C")
_LONGS = np.ctypeslib.ndpointer(ctypes.c_long, flags="C")
_INTS = np.ctypeslib.ndpointer(ctypes.c_int, flags="C")
_LISTENER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


class _Settings(ctypes.Structure):
    """bolt_settings, field by field."""

    # A stop that becomes 1 while C writes ends all writing.
    _fields_ = [
        ("tokens", ctypes.c_int),
        ("temperature", ctypes.c_float),
        ("top_k", ctypes.c_int),
        ("top_p", ctypes.c_float),
        ("seed", ctypes.c_uint64),
        ("stop", ctypes.POINTER(ctypes.c_int)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """Return bolt.c as a library; it is built into data/compiled if it is not there yet.

    Where that folder cannot be written, or no program may be loaded from it, a temporary one does.
    Raises RuntimeUnavailable, in one line, if there is no C compiler or it fails.
    """
    kept = project_dir() / "data" / "compiled"
    for folder in (kept, Path(_temporary_folder().name)):
        try:
            path = _built(folder)
            bolt = ctypes.CDLL(str(path))
        except RuntimeUnavailable:
            raise
        except (FlashLMError, OSError) as error:
            reason = one_line(error)[:160]
            continue
        _declare_all(bolt)
        return bolt
    raise RuntimeUnavailable(f"the C runtime cannot be loaded ({reason})")


def _declare_all(bolt: ctypes.CDLL) -> None:
    """Tell ctypes what each function of bolt.c takes and returns."""

    def declare(function, result, *arguments):
        function.restype = result
        function.argtypes = arguments

    # A model, and what one can ask of it.
    declare(bolt.bolt_open, _POINTER, _TEXT, _TEXT, _SIZE)
    declare(bolt.bolt_close, None, _POINTER)
    declare(bolt.bolt_vocabulary, _INT, _POINTER)
    declare(bolt.bolt_row, _INT, _POINTER)
    declare(bolt.bolt_kernels, _TEXT, _POINTER)
    declare(bolt.bolt_encode, _LONG, _POINTER, _TEXT, _SIZE, _IDS)

    # A state, and what reads and writes with it.
    declare(bolt.bolt_start, _POINTER, _POINTER, _INT)
    declare(bolt.bolt_end, None, _POINTER)
    declare(bolt.bolt_step, None, _POINTER, _IDS, _FLOATS)
    declare(bolt.bolt_score, _INT, _POINTER, _IDS, _LONG, _FLOATS)
    written = (_IDS, _FLOATS, _FLOATS, _LONGS, _INTS)  # ids, surprise, entropy, counts, finished
    asked = (_POINTER, _INT, _IDS, _LONGS, ctypes.POINTER(_Settings))
    declare(bolt.bolt_generate, _INT, *asked, *written, _LISTENER, _POINTER)


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    """Make a folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="flashlm-", ignore_cleanup_errors=True)


def _built(folder: Path) -> Path:
    """Return the library in this folder, and build it if it is not there or is damaged.

    Raises RuntimeUnavailable without a compiler, FlashLMError if the folder cannot be written.
    """
    # Another source, compiler flag or machine has another file.
    built_from = (SOURCE.read_bytes(), FLAGS, platform.machine(), sys.platform)
    key = hashlib.sha256(repr(built_from).encode()).hexdigest()[:16]

    # Loading a file that was cut off ends the process, so the name says what is in it.
    for path in folder.glob(f"bolt-{key}-*.so"):
        with suppress(OSError):
            if path.name == _library_name(key, path.read_bytes()):
                return path

    # Other processes may build at the same time: each puts a whole file in its place.
    library = _compile()
    path = folder / _library_name(key, library)
    with atomic_write(path) as file:
        file.write(library)
    return path


def _library_name(key: str, library: bytes) -> str:
    return f"bolt-{key}-{hashlib.sha256(library).hexdigest()[:16]}.so"


@functools.cache
def _compile() -> bytes:
    """Compile bolt.c; raise RuntimeUnavailable, in one line, if that cannot be done."""
    # The first one that is there; $CC goes before the usual names.
    names = [os.environ.get("CC", ""), *COMPILERS]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise RuntimeUnavailable("there is no C compiler (install gcc or clang to have one)")

    # Nothing is run from this folder.
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "bolt.so"
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            reason = complaint(done.stderr)
            if done.returncode == 0:
                return built.read_bytes()
        except OSError as error:
            reason = one_line(error)
    raise RuntimeUnavailable(f"{compiler} cannot build bolt.c ({reason})")


# ---- a model ----


class Bolt:
    """A packed model, run by bolt.c: a LanguageModel that several threads may use.

    path: of a file that save_packed() wrote; it must stay as it is while the model is in use.
    Raises FlashLMError if it cannot be used, RuntimeUnavailable if bolt.c cannot be built.
    """

    runtime = "c"

    def __init__(self, path: str | Path):
        self._bolt = library()
        self._model = None
        self.source: TextSource | None = None  # a packed file does not say it

        # bolt.c checks everything before it uses the file.
        error = ctypes.create_string_buffer(400)
        self._model = self._bolt.bolt_open(os.fsencode(path), error, len(error))
        if not self._model:
            raise FlashLMError(error.value.decode(errors="replace"))
        self.vocabulary = load_vocabulary(path)

    def __del__(self):
        if getattr(self, "_model", None):
            self._bolt.bolt_close(self._model)

    @property
    def kernels(self) -> str:
        """Return the name of the kernels that this processor uses: portable, avx2 or avx512."""
        return self._bolt.bolt_kernels(self._model).decode()

    @contextmanager
    def _state(self, texts: int = 1) -> Iterator[int]:
        """Yield what one text, or LANES side by side, need while they are read or written."""
        state = self._bolt.bolt_start(self._model, texts)
        if not state:
            raise MemoryError
        try:
            yield state
        finally:
            self._bolt.bolt_end(state)

    def _check_ids(self, ids: Sequence[int]) -> np.ndarray:
        """Return ids as bolt.c takes them; it does not check them again."""
        # Before they become uint16, which would wrap around.
        ids = np.asarray(ids)
        size = len(self.vocabulary)
        if ids.size and not (ids.min() >= 0 and ids.max() < size):
            raise FlashLMError(f"an id is outside this vocabulary of {size} ids")
        return np.ascontiguousarray(ids, np.uint16)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text by the encoder of bolt.c, which agrees with Vocabulary.encode.

        Raises FlashLMError for half a character, which UTF-8 cannot hold.
        """
        # Python's strings can hold what UTF-8 cannot.
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise FlashLMError("the text holds half a character, which UTF-8 cannot") from error

        # At most one id per byte.
        ids = np.empty(len(content), np.uint16)
        count = self._bolt.bolt_encode(self._model, content, len(content), ids)
        if count < 0:
            raise MemoryError
        return ids[:count].tolist()

    def logits(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the logits (B, T, V) after each of T ids of B texts, read from their start.

        Raises FlashLMError for any number of texts but 1 and LANES.
        """
        ids = self._check_ids(ids)
        B, T = ids.shape
        if B not in (1, LANES):
            raise FlashLMError(f"logits come for 1 text or for {LANES}, not for {B}")

        # One id of every text per step; rows are padded to whole vectors.
        result = np.empty((T, B, self._bolt.bolt_row(self._model)), np.float32)
        with self._state(B) as state:
            for t in range(T):
                self._bolt.bolt_step(state, np.ascontiguousarray(ids[:, t]), result[t])
        return result.swapaxes(0, 1)[..., : len(self.vocabulary)]

    # ---- what every LanguageModel does ----

    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the negative log-likelihood, in nats, of every id but the first (float64)."""

        # C scores one text at a time, so each thread takes one.
        def score(ids: np.ndarray) -> np.ndarray:
            nats = np.empty(max(0, len(ids) - 1), np.float32)
            with self._state() as state:
                if self._bolt.bolt_score(state, ids, len(ids), nats):
                    raise MemoryError
            return nats.astype(np.float64)

        return _in_threads(score, list(map(self._check_ids, sequences)))

    def write(self, prompts: Prompts, sampling: Sampling) -> list[Story]:
        """Write one story for each prompt.

        Greedy stories are those of PyTorch; others draw from other random numbers.
        """
        return self._write_all(prompts, sampling, ctypes.c_int(0))

    def stream(self, prompts: Prompts, sampling: Sampling) -> Iterator[list[Story]]:
        """Write the same stories, and yield them after each token, grown in place."""
        stories = [Story() for _ in prompts]
        events: queue.SimpleQueue = queue.SimpleQueue()
        stop = ctypes.c_int(0)

        # C writes in a thread of its own; whatever ends it is the last event.
        def work() -> None:
            try:
                events.put(self._write_all(prompts, sampling, stop, events.put))
            except BaseException as error:
                events.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while isinstance(event := events.get(), tuple):
                number, token, surprise, entropy = event
                story = stories[number]
                story.finished = token == EOS
                if not story.finished:
                    story.ids.append(token)
                    story.surprise.append(surprise)
                    story.entropy.append(entropy)
                yield stories
        finally:
            # A reader that has seen enough lets C stop as well.
            stop.value = 1
            thread.join()

        # An error of that thread is one of the reader's.
        if isinstance(event, BaseException):
            raise event

    def _write_all(
        self,
        prompts: Prompts,
        sampling: Sampling,
        stop: ctypes.c_int,
        listener: Callable[[tuple], None] | None = None,
    ) -> list[Story]:
        """Write all stories, a share of them per core.

        stop: becomes 1 to end all writing. listener: told of (story, id, surprise, entropy), and
        of EOS, whose bits are 0, when a story ends.
        """
        # Story n draws with seed + n, so it is the same in any share.
        prompts = list(map(self._check_ids, prompts))
        share = math.ceil(len(prompts) / usable_cores())

        def write(start: int) -> list[Story]:
            some = prompts[start : start + share]
            return self._write_share(some, start, sampling, stop, listener)

        starts = range(0, len(prompts), max(share, 1))
        shares = _in_threads(write, starts, stop)
        return list(itertools.chain.from_iterable(shares))

    def _write_share(
        self,
        prompts: list[np.ndarray],
        start: int,
        sampling: Sampling,
        stop: ctypes.c_int,
        listener: Callable[[tuple], None] | None,
    ) -> list[Story]:
        """Write the stories of one thread; `start` is the number of the first one."""
        # What C reads: one prompt after another, and how to go on.
        count = len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], ctypes.c_long)
        settings = _Settings(
            sampling.tokens,
            sampling.temperature,
            min(sampling.top_k, len(self.vocabulary)),
            sampling.top_p,
            sampling.seed + start,
            ctypes.pointer(stop),
        )

        # What C fills in: (stories, tokens) and (stories).
        ids = np.empty((count, sampling.tokens), np.uint16)
        surprise = np.empty(ids.shape, np.float32)
        entropy = np.empty(ids.shape, np.float32)
        counts = np.zeros(count, ctypes.c_long)
        finished = np.zeros(count, ctypes.c_int)
        told = [0] * count

        # C tells of an id when its bits are in place. EOS is no part of a story and has none.
        @_LISTENER
        def tell(_, story: int, token: int) -> int:
            bits = (0.0, 0.0)
            if token != EOS:
                n = told[story]
                told[story] += 1
                bits = (float(surprise[story, n]), float(entropy[story, n]))
            if not stop.value:
                listener((start + story, token, *bits))
            return stop.value

        # Without a listener, C does not come back before all is written.
        texts = LANES if count >= MIN_STORIES_TO_BATCH else 1
        tell = tell if listener else _LISTENER()
        written = (ids, surprise, entropy, counts, finished)
        with self._state(texts) as state:
            asked = (state, count, np.concatenate(prompts), lengths, settings)
            if self._bolt.bolt_generate(*asked, *written, tell, None):
                raise MemoryError

        # Nobody reads stories that were stopped.
        stories = []
        if stop.value:
            return stories
        for n, length in enumerate(counts):
            story = Story(finished=bool(finished[n]))
            story.ids = ids[n, :length].tolist()
            story.surprise = surprise[n, :length].tolist()
            story.entropy = entropy[n, :length].tolist()
            stories.append(story)
        return stories


def _in_threads(do: Callable, things: Iterable, stop: ctypes.c_int | None = None) -> list:
    """Do something with each thing, and return the results in order; C lets Python run on.

    stop: becomes 1 if this is interrupted, so that the others end soon.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            return list(pool.map(do, things))

        # Leaving the pool waits for its threads, so they must hear of it first.
        except BaseException:
            if stop is not None:
                stop.value = 1
            raise
