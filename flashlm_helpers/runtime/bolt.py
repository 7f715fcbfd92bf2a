"""bolt.c from Python: built with the machine's C compiler at first use, and a small class around it."""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flashlm_helpers.config import FlashLMError, project_dir
from flashlm_helpers.files import one_line, require_writable
from flashlm_helpers.generation import Story, check_request
from flashlm_helpers.hardware import usable_cores
from flashlm_helpers.runtime.packed import LANES
from flashlm_helpers.vocab import BOS

SOURCE = Path(__file__).with_name("bolt.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-shared", "-fPIC", "-DBOLT_LIBRARY")
LONGEST_TOKEN = 1024  # bytes, as bolt.c has it
WORTHWHILE = 10  # stories from which on LANES side by side are faster than one after another


class NoRuntime(FlashLMError):
    """What a runtime needs cannot be built here; PyTorch computes the same, more slowly."""


class _Settings(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_int), ("temperature", ctypes.c_float), ("top_k", ctypes.c_int),
                ("top_p", ctypes.c_float), ("seed", ctypes.c_uint64), ("stop", ctypes.POINTER(ctypes.c_int))]


_Listener = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


@functools.cache
def library() -> ctypes.CDLL:
    """bolt.c as a library: from data/compiled, where it is built if it is not there yet.

    Where that folder cannot be written, it is built into a temporary one. Raises NoRuntime, in one line, if there is no
    C compiler or it fails.
    """
    built_from = SOURCE.read_bytes(), FLAGS, platform.machine(), sys.platform
    key = hashlib.sha256(repr(built_from).encode()).hexdigest()[:16]
    folder = project_dir() / "data" / "compiled"
    path = folder / f"bolt-{key}.so"
    if not path.is_file():
        try:
            require_writable(folder)
        except FlashLMError:
            path = Path(_elsewhere().name) / path.name
        _build(path)
    try:
        bolt = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoRuntime(f"the C runtime cannot be loaded ({one_line(error)[:160]})") from error
    pointer, number, count, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p
    ids, floats, counts, numbers = (np.ctypeslib.ndpointer(kind, flags="C")
                                    for kind in (np.uint16, np.float32, ctypes.c_long, ctypes.c_int))
    for name, result, arguments in (
            ("bolt_open", pointer, [text, text, ctypes.c_size_t]), ("bolt_close", None, [pointer]),
            ("bolt_vocabulary", number, [pointer]), ("bolt_row", number, [pointer]), ("bolt_kernels", text, [pointer]),
            ("bolt_start", pointer, [pointer, number]), ("bolt_end", None, [pointer]),
            ("bolt_step", None, [pointer, ids, floats]), ("bolt_score", number, [pointer, ids, count, floats]),
            ("bolt_encode", count, [pointer, text, ctypes.c_size_t, ids]),
            ("bolt_token", number, [pointer, number, text]),
            ("bolt_generate", number, [pointer, number, ids, counts, ctypes.POINTER(_Settings), ids, floats, counts,
                                       numbers, _Listener, pointer])):
        function = getattr(bolt, name)
        function.restype, function.argtypes = result, arguments
    return bolt


@functools.cache
def _elsewhere() -> tempfile.TemporaryDirectory:
    """A folder that is gone when this process is."""
    return tempfile.TemporaryDirectory(prefix="flashlm-", ignore_cleanup_errors=True)


def _build(path: Path) -> None:
    """Compile bolt.c to `path`, atomically."""
    names = (os.environ.get("CC"), *COMPILERS)
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise NoRuntime("there is no C compiler (install gcc or clang to have one)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        try:
            done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], capture_output=True, text=True,
                                  errors="replace")
            complaint = done.stderr if done.returncode else ""
        except OSError as error:
            complaint = str(error)
        if complaint or not built.is_file():
            raise NoRuntime(f"{compiler} cannot build bolt.c ({' '.join(complaint.split())[:160]})")
        os.replace(built, path)


class Bolt:
    """A packed model, run by bolt.c; may be used from several threads.

    path: of a file that packed.save_packed() wrote. Raises FlashLMError if it cannot be used, NoRuntime if bolt.c
    cannot be built.
    """

    def __init__(self, path: str | Path):
        self._bolt, error = library(), ctypes.create_string_buffer(400)
        self._model = self._bolt.bolt_open(os.fsencode(path), error, len(error))
        if not self._model:
            raise FlashLMError(error.value.decode(errors="replace"))
        self.vocabulary_size = self._bolt.bolt_vocabulary(self._model)

    def __del__(self):
        if getattr(self, "_model", None):
            self._bolt.bolt_close(self._model)

    @property
    def kernels(self) -> str:
        """Which of its kernels this processor uses."""
        return self._bolt.bolt_kernels(self._model).decode()

    @contextmanager
    def _state(self, texts: int = 1) -> Iterator[int]:
        """What one text, or LANES side by side, need while they are read or written."""
        state = self._bolt.bolt_start(self._model, texts)
        if not state:
            raise MemoryError
        try:
            yield state
        finally:
            self._bolt.bolt_end(state)

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocabulary_size):
            raise FlashLMError(f"an id is outside this vocabulary of {self.vocabulary_size} ids")
        return np.ascontiguousarray(ids, np.uint16)

    def encode(self, text: str) -> list[int]:
        """Text to ids, as Vocabulary.encode() does. Raises FlashLMError for a lone surrogate."""
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            raise FlashLMError("the text holds half a character, which UTF-8 cannot") from error
        ids = np.empty(len(content), np.uint16)
        count = self._bolt.bolt_encode(self._model, content, len(content), ids)
        if count < 0:
            raise MemoryError
        return ids[:count].tolist()

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text; what is not UTF-8 becomes U+FFFD."""
        room, text = ctypes.create_string_buffer(LONGEST_TOKEN), b""
        for token in self._ids(ids).tolist():
            length = self._bolt.bolt_token(self._model, token, room)
            text += room.raw[:length]
        return text.decode(errors="replace")

    def logits(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """The logits (B, T, V) after each of T ids of B texts, read one by one from their start.

        Raises FlashLMError for another number of texts than 1 or LANES.
        """
        ids = self._ids(ids)
        if len(ids) not in (1, LANES):
            raise FlashLMError(f"logits come for 1 text or for {LANES}, not for {len(ids)}")
        result = np.empty((ids.shape[1], len(ids), self._bolt.bolt_row(self._model)), np.float32)
        with self._state(len(ids)) as state:
            for row, column in zip(result, ids.T, strict=True):
                self._bolt.bolt_step(state, np.ascontiguousarray(column), row)
        return result.swapaxes(0, 1)[..., : self.vocabulary_size]

    def token_nats(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """-ln p of every id but the first of each sequence, as evaluation.token_nats()."""
        sequences = [self._ids(sequence) for sequence in sequences]

        def score(ids: np.ndarray) -> np.ndarray:
            nats = np.empty(max(0, len(ids) - 1), np.float32)
            with self._state() as state:
                if self._bolt.bolt_score(state, ids, len(ids), nats):
                    raise MemoryError
            return nats.astype(np.float64)

        return self._in_threads(score, sequences)

    @staticmethod
    def _in_threads(do: Callable, things: Sequence, stop: ctypes.c_int | None = None) -> list:
        """Each thing done, in order, as many at once as there are cores; C does not hold Python up.

        stop: becomes 1 if this is interrupted, so that they need not be waited for.
        """
        with ThreadPoolExecutor(usable_cores()) as pool:
            try:
                return list(pool.map(do, things))
            except BaseException:
                if stop is not None:
                    stop.value = 1
                raise

    def generate(self, prompts: str | Sequence[str], tokens: int = 200, temperature: float = 0.8, top_k: int = 0,
                 top_p: float = 0.95, seed: int = 0, listener: Callable[[int, int], None] | None = None) -> list[Story]:
        """Write one story for each prompt; the settings are those of generation.stream().

        Greedy stories are the ones of PyTorch; otherwise the random numbers are others. `entropy` stays empty.
        listener: told of each (story, id) as it is written. Raises FlashLMError for an empty prompt or a setting out of
        range.
        """
        stories = [Story(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        check_request([story.prompt for story in stories], tokens, temperature, top_k, top_p, seed)
        share, stop = math.ceil(len(stories) / usable_cores()), ctypes.c_int(0)

        def write(start: int) -> None:
            self._write(stories[start : start + share], start, listener,
                        _Settings(tokens, temperature, min(top_k, self.vocabulary_size), top_p, seed + start,
                                  ctypes.pointer(stop)))

        self._in_threads(write, range(0, len(stories), share), stop)
        return stories

    def _write(self, stories: list[Story], start: int, listener, settings: _Settings) -> None:
        """Write what one thread writes; `start` is the number of the first story."""
        read = [self._ids([BOS, *self.encode(story.prompt)]) for story in stories]
        lengths = np.array([len(ids) for ids in read], ctypes.c_long)
        counts, finished = np.zeros(len(stories), ctypes.c_long), np.zeros(len(stories), ctypes.c_int)
        ids = np.empty((len(stories), settings.tokens), np.uint16)
        bits, raised = np.empty(ids.shape, np.float32), []

        @_Listener
        def tell(_, story, token):
            try:
                if not settings.stop.contents.value:
                    listener(start + story, token)
            except BaseException as error:  # C cannot pass it on
                raised.append(error)
                settings.stop.contents.value = 1
            return settings.stop.contents.value

        with self._state(LANES if len(stories) >= WORTHWHILE else 1) as state:
            failed = self._bolt.bolt_generate(state, len(stories), np.concatenate(read), lengths, settings, ids, bits,
                                              counts, finished, tell if listener else _Listener(), None)
        if raised:
            raise raised[0]
        if failed:
            raise MemoryError
        if settings.stop.contents.value:  # nobody will read them
            return
        for n, story in enumerate(stories):
            story.ids, story.surprise = ids[n, : counts[n]].tolist(), bits[n, : counts[n]].tolist()
            story.finished, story.text = bool(finished[n]), story.prompt + self.decode(story.ids)
