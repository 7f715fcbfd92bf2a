"""The packed format: a whole model in one file of a few megabytes, which bolt.c maps and runs.

Little-endian. A header of 192 bytes, then these sections, each at a multiple of 64 bytes:

    for each block     mixer_norm (D), glu_norm (D), layer_scale (2, D) if there is one, taps
                       (K, D or 3D), the scales of its five linear layers (5): float32
                       the ternary weights of project_in, project_out, gate, up and down,
                       five per byte (quantization.pack_ternary)
    final norm         float32 (D)
    embedding          in tiles of 16 rows side by side, so that a program can take 16 at a time:
                       at 32 bits float32 (V / 16 rounded up, D, 16)
                       at 8 bits a bfloat16 scale per row (V), then int8 (V / 16 rounded up,
                       D / 4, 16, 4)
    vocabulary         GPT-2's id of each of our ids from 4 on: uint16 (V - 4)
    GPT-2's encoding   the byte of each id below 256: uint8 (256)
                       the two ids that each later id is merged from: uint16 (50,000, 2)
                       letters, digits and white space, each as a count and as many pairs of
                       uint16: code points skipped, code points in the class

The header holds everything that decides these sizes, so a file of another length is refused
before anything else of it is read.
"""

import functools
import itertools
import math
import struct
import sys
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashlm_helpers.config import FlashLMError, ModelConfig, attention_at
from flashlm_helpers.machine.files import atomic_write
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import latent_weight, pack_ternary, unpack_ternary
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import BYTES, SPECIALS, Vocabulary, gpt2_encoding

MAGIC = b"FLASHLM\0"
VERSION = 1

# A vector of the processor has 16 floats, which are 64 bytes: sections begin at a multiple of
# its size, and the channels of a model, like the rows of an embedding tile, come in as many.
ALIGNMENT = 64
LANES = 16

# The sizes that the header holds, each with the largest that bolt.c has room for.
LIMITS = {
    "width": 8192,
    "blocks": 64,
    "hidden": 65_536,
    "sequence_length": 1 << 20,
    "kernel_size": 64,
    "vocabulary_size": 50_260,
    "heads": 8192,
    "window": 65_536,
}
_LARGEST_HEAD = 4096  # channels
_LARGEST_STATE = 1 << 26  # floats that one text carries along
_LARGEST_FILE = 1 << 30  # bytes

# The mixers that bolt.c knows, and the weights of a block in the order of the file.
_MIXERS = ("conv", "attention")
_FLOAT = ("mixer_norm.weight", "glu_norm.weight", "layer_scale", "mixer.taps")
_TERNARY = ("mixer.project_in", "mixer.project_out", "glu.gate", "glu.up", "glu.down")

# GPT-2 has 256 single bytes, and ids that are merged from two others.
_MERGES = 50_000
_LARGEST_ENCODING = 1 << 20  # bytes

# ---- the parts of a file ----


class Header(NamedTuple):
    """The first 192 bytes of a packed file."""

    magic: bytes
    version: int
    checksum: int  # CRC-32 of the header from the next field on
    file_bytes: int
    sections_checksum: int  # CRC-32 of all that follows the header
    width: int
    blocks: int
    hidden: int
    sequence_length: int
    kernel_size: int
    vocabulary_size: int
    heads: int
    window: int
    layer_scale: int  # 0 or 1
    bits: int  # per value of the embedding, 8 or 32
    encoding_bytes: int  # of the last section
    attention: int  # bit n: whether block n has attention
    name: bytes  # UTF-8, filled up with zeros
    vocabulary_hash: bytes  # SHA-256


# The fields of Header, and 48 bytes that are not used. The header's checksum covers what follows
# that field, from byte 16 on.
_HEADER = struct.Struct("<8s 2I Q I 8I 3I Q 32s 32s 48x")
_CHECKED_FROM = 16


class Section(NamedTuple):
    """An array in a file; those of the network have their names of FlashLM.state_dict()."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def room(self) -> int:
        """Return its bytes, and zeros up to where the next section may begin."""
        count = math.prod(self.shape)
        size = count * np.dtype(self.dtype).itemsize
        return ALIGNMENT * math.ceil(size / ALIGNMENT)


def _layout(network: FlashLM, bits: int, encoding_bytes: int) -> Iterator[Section]:
    """Yield the sections of a file, in order."""
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    for number in range(network.config.blocks):
        block = f"blocks.{number}"
        for weight in _FLOAT:
            name = f"{block}.{weight}"
            if name in shapes:  # layer scales need not be
                yield Section(name, "<f4", shapes[name])

        # The scales of all linear layers, then their weights at five per byte.
        yield Section(f"{block}.scales", "<f4", (len(_TERNARY),))
        for layer in _TERNARY:
            name = f"{block}.{layer}.weight"
            size = math.ceil(math.prod(shapes[name]) / 5)
            yield Section(name, "u1", (size,))
    yield Section("norm.weight", "<f4", shapes["norm.weight"])

    # The embedding, its rows filled up to whole tiles.
    V, D = shapes["embedding.weight"]
    tiles = math.ceil(V / LANES)
    if bits == 8:
        yield Section("embedding.scales", "<u2", (V,))
        yield Section("embedding.weight", "i1", (tiles, D // 4, LANES, 4))
    else:
        yield Section("embedding.weight", "<f4", (tiles, D, LANES, 1))

    # What turns text into ids, and back.
    yield Section("vocabulary", "<u2", (V - len(SPECIALS),))
    yield Section("encoding", "u1", (encoding_bytes,))


def unsupported_reason(config: ModelConfig) -> str | None:
    """Return one line on why bolt.c cannot run such a model, or None if it can."""
    name = config.name
    if not config.ternary:
        return f"{name} has float weights, and only ternary ones can be packed"
    for mixer in config.mixers:
        if mixer not in _MIXERS:
            return f"mixer {mixer!r} cannot be packed: bolt.c knows {' and '.join(_MIXERS)}"

    # Each size has a limit.
    for field, limit in LIMITS.items():
        size = getattr(config, field)
        if size > limit:
            return f"{field} is {size:,} and a packed model has at most {limit:,}"

    # Channels are taken 16 at a time, those of a head too.
    attending = config.block_mixers.count("attention")
    head = config.width / config.heads if attending else LANES
    if config.width % LANES or config.hidden % LANES or head % LANES:
        return (
            f"{name} cannot be packed: width ({config.width}), hidden ({config.hidden}) and the "
            f"width of a head must be multiples of {LANES}"
        )
    if head > _LARGEST_HEAD:
        return f"{name} cannot be packed: its heads are too wide"

    # A text carries K-1 values per channel of a convolution, and the window's keys and values.
    recent = (config.kernel_size - 1) * (config.blocks + 2 * attending)
    slots = LANES * math.ceil(config.window / LANES)
    if config.width * (recent + 2 * slots * attending) > _LARGEST_STATE:
        return f"{name} cannot be packed: its state would be too large"
    return None


# ---- write ----


def save_packed(path: str | Path, model: PyTorchModel, bits: int = 8) -> None:
    """Write a model with its vocabulary as a packed file, atomically.

    bits: per value of the embedding, 8 (and a scale per token) or 32 (exact). Everything else
    is exact. Raises FlashLMError for a network that bolt.c cannot run, and if the file cannot be
    written.
    """
    network = model.network
    config = network.config
    kind = type(network)
    if kind is not FlashLM:  # even a subclass may compute something else
        raise FlashLMError(f"{kind.__name__} cannot be packed: bolt.c knows FlashLM only")
    if reason := unsupported_reason(config):
        raise FlashLMError(reason)
    if bits not in (8, 32):
        raise FlashLMError(f"the embedding takes 8 or 32 bits per value, not {bits}")

    # All values by the names of their sections.
    values = _network_values(network)
    values |= _embedding_values(network, bits)
    values["vocabulary"] = np.array(model.vocabulary.kept)
    values["encoding"] = np.frombuffer(_encoding_section(), np.uint8)

    # Then one section after another.
    payload = bytearray()
    for section in _layout(network, bits, len(_encoding_section())):
        array = values[section.name].astype(section.dtype)
        stored = array.reshape(section.shape).tobytes()
        payload += stored.ljust(section.room, b"\0")

    # The header comes first, and holds their checksum.
    header = _header(config, bits, model.vocabulary.hash, payload)
    with atomic_write(Path(path)) as file:
        file.write(header + payload)


def _header(config: ModelConfig, bits: int, vocabulary_hash: str, payload: bytearray) -> bytes:
    # One bit per block.
    attention = 0
    for number, mixer in enumerate(config.block_mixers):
        if mixer == "attention":
            attention |= 1 << number

    # A name that is too long ends before a character that would be cut in two.
    name = config.name.encode()[:32].decode(errors="ignore")
    header = Header(
        MAGIC,
        VERSION,
        checksum=0,
        file_bytes=_HEADER.size + len(payload),
        sections_checksum=zlib.crc32(payload),
        layer_scale=config.layer_scale,
        bits=bits,
        encoding_bytes=len(_encoding_section()),
        attention=attention,
        name=name.encode(),
        vocabulary_hash=bytes.fromhex(vocabulary_hash),
        **{field: getattr(config, field) for field in LIMITS},
    )

    # Its own checksum covers all that follows that field.
    checksum = zlib.crc32(_HEADER.pack(*header)[_CHECKED_FROM:])
    return _HEADER.pack(*header._replace(checksum=checksum))


def _network_values(network: FlashLM) -> dict[str, np.ndarray]:
    """Return the values of the blocks and the final norm, by section."""
    # Most weights are stored as they are.
    values = {}
    for name, weight in network.state_dict().items():
        values[name] = weight.numpy()

    # Linear layers store ternary weights instead of latent ones.
    for number, block in enumerate(network.blocks):
        scales = []
        for layer in _TERNARY:
            name = f"blocks.{number}.{layer}.weight"
            ternary, scale = block.get_submodule(layer).ternarized()
            values[name] = pack_ternary(ternary).numpy()
            scales.append(float(scale))
        values[f"blocks.{number}.scales"] = np.array(scales)
    return values


def _embedding_values(network: FlashLM, bits: int) -> dict[str, np.ndarray]:
    """Return the values of the embedding by section, with scales if it takes 8 bits."""
    rows = network.embedding.weight.detach().numpy()  # (V, D)
    if bits == 32:
        return {"embedding.weight": _to_tiles(rows, 1)}

    # A step per row, as bfloat16: the upper half of a float32. It is rounded up, so that the
    # largest value of a row is at most 127 steps.
    largest = np.abs(rows).max(1)
    bits_of_step = (largest / 127).view(np.uint32)
    halves = (bits_of_step + 0xFFFF) >> 16

    # A row of zeros has a step of zero, which cannot divide anything.
    steps = _bfloat16(halves)
    steps[steps == 0] = 1
    codes = np.rint(rows / steps[:, None])
    return {"embedding.scales": halves, "embedding.weight": _to_tiles(codes, 4)}


def _bfloat16(halves: np.ndarray) -> np.ndarray:
    """Return the float32 numbers whose upper halves are given."""
    whole = halves.astype(np.uint32) << 16
    return whole.view(np.float32)


def _to_tiles(rows: np.ndarray, together: int) -> np.ndarray:
    """Turn rows (V, D) into tiles (V / 16 rounded up, D / together, 16, together)."""
    missing = -len(rows) % LANES
    padded = np.pad(rows, ((0, missing), (0, 0)))
    groups = rows.shape[1] // together
    tiles = padded.reshape(-1, LANES, groups, together)

    # Of 16 rows, the first channels side by side, then the next ones.
    return tiles.swapaxes(1, 2)


# ---- read ----


def is_packed(path: str | Path) -> bool:
    """Return whether a file starts as a packed model does."""
    path = Path(path)
    try:
        # Opening a pipe would wait for ever.
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load_packed(path: str | Path) -> PyTorchModel:
    """Read a packed file for PyTorch: the same weights that bolt.c computes with.

    Raises FlashLMError if the file is missing, damaged, of another version, or not one of ours.
    """
    with _one_line_about(path):
        header, network, sections = _read(Path(path))
        vocabulary = _vocabulary(header, sections)
        _fill(network, sections)
        return PyTorchModel(network, vocabulary)


def load_vocabulary(path: str | Path) -> Vocabulary:
    """Read the vocabulary of a packed file; raises FlashLMError as load_packed() does."""
    with _one_line_about(path):
        header, _, sections = _read(Path(path))
        return _vocabulary(header, sections)


@contextmanager
def _one_line_about(path: str | Path) -> Iterator[None]:
    """Raise FlashLMError, with the path, where a file turns out to be of no use."""
    try:
        yield
    except OSError as error:
        raise FlashLMError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # FlashLMError is one, from the parts that check themselves
        reason = f"{path} is not a packed model that can be used: {error}"
        raise FlashLMError(reason) from error


def _read(path: Path) -> tuple[Header, FlashLM, dict[str, np.ndarray]]:
    """Read a file; returns its header, a network without weights yet, and its sections by name.

    Raises ValueError if it is of no use.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError("it is too large")
    content = path.read_bytes()
    header = _read_header(content)
    with torch.device("meta"):  # where tensors have shapes and no memory
        network = FlashLM(_read_config(header))

    # The length must be right, and the checksum, before any value is looked at.
    layout = list(_layout(network, header.bits, header.encoding_bytes))
    expected = _HEADER.size
    for section in layout:
        expected += section.room
    if not len(content) == header.file_bytes == expected:
        raise ValueError("it is truncated, or longer than it should be")
    if zlib.crc32(content[_HEADER.size :]) != header.sections_checksum:
        raise ValueError("its content is damaged")

    # Arrays that share the file's memory.
    sections = {}
    place = _HEADER.size
    for section in layout:
        count = math.prod(section.shape)
        array = np.frombuffer(content, section.dtype, count, place)
        if section.dtype == "<f4" and not np.isfinite(array).all():
            raise ValueError(f"{section.name} is not finite")
        sections[section.name] = array.reshape(section.shape)
        place += section.room
    return header, network, sections


def _read_header(content: bytes) -> Header:
    # Another version may have other fields, so that comes first.
    if len(content) < _HEADER.size or not content.startswith(MAGIC):
        raise ValueError("it does not start like one")
    header = Header(*_HEADER.unpack_from(content))
    if header.version != VERSION:
        raise ValueError(
            f"it is of version {header.version} and this program reads version {VERSION}: "
            "export it anew"
        )

    # The checksum shows damage, not malice: anyone can compute one.
    if zlib.crc32(content[_CHECKED_FROM : _HEADER.size]) != header.checksum:
        raise ValueError("its header is damaged")
    return header


def _read_config(header: Header) -> ModelConfig:
    """Return the config that a header describes; raises ValueError for one that nobody wrote."""
    sizes = {}
    sensible = True
    for field, limit in LIMITS.items():
        sizes[field] = getattr(header, field)
        sensible &= 1 <= sizes[field] <= limit

    # The other fields have few values that make sense.
    sensible &= header.layer_scale <= 1
    sensible &= header.bits in (8, 32)
    sensible &= header.vocabulary_size >= len(SPECIALS) + BYTES
    sensible &= BYTES + 4 * _MERGES <= header.encoding_bytes <= _LARGEST_ENCODING
    if not sensible:
        raise ValueError("its header makes no sense")

    # A bit beyond the last block makes attention_at() refuse.
    places = []
    for number in range(64):
        if header.attention >> number & 1:
            places.append(number)
    config = ModelConfig(
        header.name.rstrip(b"\0").decode(),
        **sizes,
        layer_scale=bool(header.layer_scale),
        mixers=attention_at(places, header.blocks),
    )
    if reason := unsupported_reason(config):
        raise ValueError(reason)
    return config


def _vocabulary(header: Header, sections: dict[str, np.ndarray]) -> Vocabulary:
    # Ids of another vocabulary would be words of another text.
    kept = sections["vocabulary"].tolist()
    vocabulary = Vocabulary(kept)
    vocabulary.check_matches(header.vocabulary_hash.hex(), "its model")
    return vocabulary


def _fill(network: FlashLM, sections: dict[str, np.ndarray]) -> None:
    """Give a network the weights of a file, for inference."""
    weights = {}
    for name in network.state_dict():
        weights[name] = torch.from_numpy(sections[name].copy())
    rows = _embedding_rows(network.config, sections)
    weights["embedding.weight"] = torch.from_numpy(rows)

    # A BitLinear holds latent weights.
    for number, block in enumerate(network.blocks):
        scales = sections[f"blocks.{number}.scales"].tolist()
        for layer, scale in zip(_TERNARY, scales, strict=True):
            name = f"blocks.{number}.{layer}.weight"
            shape = block.get_submodule(layer).weight.shape
            weights[name] = _latent(weights[name], shape, scale)

    network.load_state_dict(weights, assign=True)
    network.eval()


def _latent(packed: Tensor, shape: torch.Size, scale: float) -> Tensor:
    # Five digits of base 3 leave some values of a byte without a meaning.
    if packed.max() >= 3**5:
        raise ValueError("its weights are not ternary")
    ternary = unpack_ternary(packed, shape)
    return latent_weight(ternary, torch.tensor(scale))


def _embedding_rows(config: ModelConfig, sections: dict[str, np.ndarray]) -> np.ndarray:
    """Return the embedding (V, D) as float32."""
    # From tiles back to rows, without those that filled up the last tile.
    tiles = sections["embedding.weight"]
    rows = tiles.swapaxes(1, 2).reshape(-1, config.width)
    rows = rows[: config.vocabulary_size]
    if "embedding.scales" not in sections:
        return rows

    # A bfloat16 need not be a number.
    steps = _bfloat16(sections["embedding.scales"])
    if not np.isfinite(steps).all():
        raise ValueError("its embedding is not finite")
    return rows * steps[:, None]


# ---- GPT-2's encoding, for programs that have none at hand ----

# White space of Unicode; str.isspace() takes some more.
_SPACES = [0x20, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]
_SPACES += range(9, 14)
_SPACES += range(0x2000, 0x200B)


@functools.cache
def _encoding_section() -> bytes:
    """Return the last section: bytes, merges, and classes of characters."""
    encoding = gpt2_encoding()
    pieces = [encoding.decode_single_token_bytes(i) for i in range(BYTES + _MERGES)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    stored = b"".join(pieces[:BYTES])

    # The other tokens are merged from two each.
    merges = [_merged_from(piece, ids) for piece in pieces[BYTES:]]
    stored += np.array(merges, "<u2").tobytes()

    # A category such as "Lu" begins with its class: L for letters, N for digits.
    categories = []
    for point in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(point))
        categories.append(category[0])
    categories = np.array(categories)
    stored += _ranges(categories == "L")
    stored += _ranges(categories == "N")

    # The third class has no category of its own.
    spaces = np.zeros(len(categories), bool)
    spaces[_SPACES] = True
    return stored + _ranges(spaces)


def _merged_from(piece: bytes, ids: dict[bytes, int]) -> tuple[int, int]:
    """Return the two ids that byte-pair encoding merges, as its last step, into this token."""
    parts = [bytes([value]) for value in piece]
    never = len(ids)
    while len(parts) > 2:
        # Of all neighbours, those are merged that were learned first.
        pairs = [left + right for left, right in itertools.pairwise(parts)]
        first = min(pairs, key=lambda pair: ids.get(pair, never))
        n = pairs.index(first)
        parts[n : n + 2] = [first]

    # What is left are the two that make the token itself.
    left, right = parts
    return ids[left], ids[right]


def _ranges(inside: np.ndarray) -> bytes:
    """Store a class of code points as a count, and pairs of how many to skip and to take."""
    # An edge is where a code point is in the class and the one before it is not, or vice versa.
    padded = np.pad(inside, 1)
    changes = padded[1:] != padded[:-1]
    edges = np.flatnonzero(changes)

    # Two edges make a range; each is stored by its distance from the one before.
    count = struct.pack("<H", len(edges) // 2)
    distances = np.diff(edges, prepend=0)
    return count + distances.astype("<u2").tobytes()
