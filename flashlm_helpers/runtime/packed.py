"""The packed format: a whole model in one file of a few megabytes, which bolt.c maps into memory and runs.

Little-endian. A header of 192 bytes, then the sections, each starting at a multiple of 64 bytes:

    for each block      mixer_norm (D), glu_norm (D), layer scales (2D, if there are any), taps (K, D or 3D), then the
                        scales of project_in, project_out, gate, up, down (5): float32
                        the ternary weights of these five layers, each five to a byte (quantization.pack_ternary)
    final norm (D)      float32
    embedding           in tiles of 16 rows that stand side by side, so that a program can take 16 at a time: at 32 bits
                        float32 (V / 16 rounded up, D, 16); at 8 bits a bfloat16 scale for each row (V), then int8
                        (V / 16 rounded up, D / 4, 16, 4)
    vocabulary          GPT-2's id of each of our ids from 4 on (V - 4), uint16
    GPT-2's encoding    the byte of each id below 256, uint8 (256); the two ids that each later one is merged from,
                        uint16 (50,000, 2); letters, digits and white space, each as a count and as many pairs of
                        uint16: code points skipped, code points in the class

Everything a reader needs to know sizes is in the header, so a file of another length than they add up to is refused
before anything else of it is read.
"""

import functools
import math
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import torch

from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.files import atomic_write
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import latent_weight, pack_ternary, ternarize, unpack_ternary
from flashlm_helpers.vocab import BYTES, SPECIALS, Vocabulary, gpt2_encoding

MAGIC, VERSION, ALIGNMENT = b"FLASHLM\0", 1, 64
# magic, version, checksum of what follows in the header, bytes of the file, checksum of the sections; _SIZES,
# layer_scale, bits of the embedding, bytes of the last section; attention as a bit a block; name; hash of the
# vocabulary; unused.
_HEADER = struct.Struct("<8sIIQI 11I Q 32s 32s 48x")
_CHECKED_FROM = 16  # the header's own checksum covers what stands behind it
_SIZES = ("width", "blocks", "hidden", "sequence_length", "kernel_size", "vocabulary_size", "heads", "window")
# What bolt.c can hold; a larger model is no model for this format.
LIMITS = {"width": 8192, "blocks": 64, "hidden": 65_536, "sequence_length": 1 << 20, "kernel_size": 64,
          "vocabulary_size": 50_260, "heads": 8192, "window": 65_536}
_LARGEST_FILE, _LARGEST_STATE = 1 << 30, 1 << 26  # bytes; floats that one text carries along
_MERGES = 50_000
_ENCODING_BYTES = range(BYTES + 4 * _MERGES, (1 << 20) + 1)  # of the last section
# White space of Unicode; str.isspace() takes some more.
_SPACES = {*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
LANES = 16  # rows of a tile of the embedding; the channels of a model come in as many, too
_LINEAR = ("mixer.project_in", "mixer.project_out", "glu.gate", "glu.up", "glu.down")


@functools.cache
def _encoding_section() -> bytes:
    """GPT-2's encoding as the format holds it: bytes, merges, letters and digits."""
    encoding = gpt2_encoding()
    pieces = [encoding.decode_single_token_bytes(i) for i in range(BYTES + _MERGES)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = np.array([_parts(piece, i, ids) for i, piece in enumerate(pieces) if i >= BYTES], dtype="<u2")
    return b"".join([*pieces[:BYTES], merges.tobytes(), *map(_ranges, _unicode_classes())])


def _parts(piece: bytes, merged: int, ids: dict[bytes, int]) -> tuple[int, int]:
    """The two tokens that a token is merged from: what byte-pair encoding makes of it without it."""
    spelled = [piece[n : n + 1] for n in range(len(piece))]
    while len(spelled) > 2:
        ranks = [ids.get(a + b, merged) for a, b in zip(spelled, spelled[1:], strict=False)]
        n = min(range(len(ranks)), key=ranks.__getitem__)
        spelled[n : n + 2] = [spelled[n] + spelled[n + 1]]
    parts = tuple(ids[part] for part in spelled)
    assert max(parts) < merged
    return parts


def _unicode_classes() -> list[np.ndarray]:
    """For every code point whether it is a letter, a digit, white space."""
    categories = np.array([ord(unicodedata.category(chr(c))[0]) for c in range(sys.maxunicode + 1)])
    return [categories == ord("L"), categories == ord("N"), np.isin(np.arange(len(categories)), list(_SPACES))]


def _ranges(inside: np.ndarray) -> bytes:
    """A class of code points as pairs, how many are skipped and how many follow, behind their count."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8)))
    return struct.pack("<H", len(edges) // 2) + np.diff(edges, prepend=0).astype("<u2").tobytes()


def _layout(config: ModelConfig, bits: int, encoding_bytes: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, NumPy dtype, shape) of every section, in order; names are those of FlashLM.state_dict()."""
    D, V, sections = config.width, config.vocabulary_size, []
    for number in range(config.blocks):
        block, attends = f"blocks.{number}", number in config.attention
        sections += [(f"{block}.mixer_norm.weight", "<f4", (D,)), (f"{block}.glu_norm.weight", "<f4", (D,))]
        sections += [(f"{block}.layer_scale", "<f4", (2, D))] * config.layer_scale
        sections += [(f"{block}.mixer.taps", "<f4", (config.kernel_size, (3 if attends else 1) * D)),
                     (f"{block}.scales", "<f4", (len(_LINEAR),))]
        sections += [(f"{block}.{name}.weight", "u1", (-(-math.prod(shape) // 5),))
                     for name, shape in _linear_shapes(config, attends).items()]
    sections += [("norm.weight", "<f4", (D,))]
    tiles = -(-V // LANES)
    sections += ([("embedding.scales", "<u2", (V,)), ("embedding.weight", "i1", (tiles, D // 4, LANES, 4))]
                 if bits == 8 else [("embedding.weight", "<f4", (tiles, D, LANES, 1))])
    return [*sections, ("vocabulary", "<u2", (V - len(SPECIALS),)), ("encoding", "u1", (encoding_bytes,))]


def _misfit(config: ModelConfig) -> str | None:
    """Why bolt.c cannot run a model, if so: it takes channels 16 at a time, and has limits."""
    head = config.width / (config.heads if config.attention else 1)
    for what, number in (("width", config.width), ("hidden", config.hidden), ("width of a head", head)):
        if number % LANES:
            return f"its {what} is {number:g} and no multiple of {LANES}"
    attending, slots = len(config.attention), -(-config.window // LANES) * LANES
    state = config.width * ((config.kernel_size - 1) * (config.blocks + 2 * attending) + 2 * attending * slots)
    if head > 4096 or state > _LARGEST_STATE:
        return "its heads are too wide" if head > 4096 else "its state would be too large"
    return None


def _linear_shapes(config: ModelConfig, attends: bool) -> dict[str, tuple[int, int]]:
    D, H = config.width, config.hidden
    return dict(zip(_LINEAR, (((4 if attends else 2) * D, D), (D, D), (H, D), (H, D), (D, H)), strict=True))


def save_packed(path: str | Path, model: FlashLM, vocabulary: Vocabulary, bits: int = 8) -> None:
    """Write a model and its vocabulary as a packed file, atomically.

    bits: of the embedding, 8 (a scale for each token) or 32 (exact). Everything else is exact.
    Raises FlashLMError for a float twin, a model beyond LIMITS or whose channels cannot be taken 16 at a time, and if
    the file cannot be written.
    """
    config = model.config
    if not config.ternary:
        raise FlashLMError(f"{config.name} has float weights, and only ternary ones can be packed")
    for field, limit in LIMITS.items():
        if getattr(config, field) > limit:
            raise FlashLMError(f"{field} is {getattr(config, field):,} and a packed model has at most {limit:,}")
    if misfit := _misfit(config):
        raise FlashLMError(f"{config.name} cannot be packed: {misfit}")
    if bits not in (8, 32) or len(vocabulary) != config.vocabulary_size:
        raise FlashLMError("the embedding takes 8 or 32 bits, and the vocabulary must be the model's own")
    values = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}
    for number, block in enumerate(model.blocks):
        layers = [block.get_submodule(name) for name in _LINEAR]
        packed, scales = zip(*((pack_ternary(t), s) for t, s in (ternarize(layer.weight.detach()) for layer in layers)),
                             strict=True)
        values[f"blocks.{number}.scales"] = np.array([float(s) for s in scales])
        values |= {f"blocks.{number}.{name}.weight": p.numpy() for name, p in zip(_LINEAR, packed, strict=True)}
    if bits == 8:
        rows = values["embedding.weight"]
        # A bfloat16 is the upper half of a float32; rounded up, so that the largest value of a row fits.
        values["embedding.scales"] = ((np.abs(rows).max(1) / 127).view(np.uint32) + 0xFFFF) >> 16
        steps = _bfloat16(values["embedding.scales"])
        values["embedding.weight"] = np.rint(rows / np.where(steps > 0, steps, 1)[:, None])
    values["embedding.weight"] = _tiles(values["embedding.weight"], 4 if bits == 8 else 1)
    values["vocabulary"] = np.array(vocabulary.kept)
    values["encoding"] = np.frombuffer(_encoding_section(), np.uint8)
    payload = bytearray()
    for name, kind, shape in _layout(config, bits, len(_encoding_section())):
        section = np.ascontiguousarray(values[name]).astype(kind).reshape(shape).tobytes()
        payload += section + bytes(-len(section) % ALIGNMENT)
    with atomic_write(Path(path)) as file:
        file.write(_header(config, bits, vocabulary, bytes(payload)) + payload)


def _tiles(rows: np.ndarray, together: int) -> np.ndarray:
    """(V, D) to (V / 16 rounded up, D / together, 16, together), the missing rows 0."""
    padded = np.pad(rows, ((0, -len(rows) % LANES), (0, 0)))
    return padded.reshape(-1, LANES, rows.shape[1] // together, together).swapaxes(1, 2)


def _bfloat16(halves: np.ndarray) -> np.ndarray:
    """The float32 values whose upper halves are given."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _header(config: ModelConfig, bits: int, vocabulary: Vocabulary, payload: bytes) -> bytes:
    attention = sum(1 << number for number in config.attention)
    name = config.name.encode()[:32].decode(errors="ignore").encode()
    sizes = [getattr(config, field) for field in _SIZES]
    fields = (MAGIC, VERSION, 0, _HEADER.size + len(payload), zlib.crc32(payload), *sizes, config.layer_scale, bits,
              len(_encoding_section()), attention, name, bytes.fromhex(vocabulary.hash))
    checksum = zlib.crc32(_HEADER.pack(*fields)[_CHECKED_FROM:])
    return _HEADER.pack(*fields[:2], checksum, *fields[3:])


def is_packed(path: str | Path) -> bool:
    """Whether a file starts as a packed model does."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            return False
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load_packed(path: str | Path) -> tuple[FlashLM, Vocabulary]:
    """The model and the vocabulary of a packed file, for PyTorch: the same weights that bolt.c computes with.

    Raises FlashLMError if the file is missing, damaged, of another version, or not one of ours.
    """
    try:
        if Path(path).stat().st_size > _LARGEST_FILE:
            raise FlashLMError(f"{path} is too large for a packed model")
        content = Path(path).read_bytes()
    except OSError as error:
        raise FlashLMError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _unpack(content)
    except ValueError as error:  # FlashLMError is one, from the parts that check themselves
        raise FlashLMError(f"{path} is not a packed model that can be used: {error}") from error


def _unpack(content: bytes) -> tuple[FlashLM, Vocabulary]:
    if len(content) < _HEADER.size or not content.startswith(MAGIC):
        raise ValueError("it does not start like one")
    _, version, checksum, size, payload_checksum, *numbers, attention, name, digest = _HEADER.unpack_from(content)
    if version != VERSION:
        raise ValueError(f"it is of version {version} and this program reads version {VERSION}: export it anew")
    if zlib.crc32(content[_CHECKED_FROM : _HEADER.size]) != checksum:
        raise ValueError("its header is damaged")
    sizes, (layer_scale, bits, encoding_bytes) = dict(zip(_SIZES, numbers, strict=False)), numbers[len(_SIZES):]
    if (any(not 1 <= sizes[field] <= limit for field, limit in LIMITS.items()) or layer_scale > 1 or bits not in (8, 32)
            or encoding_bytes not in _ENCODING_BYTES or attention >> sizes["blocks"]
            or sizes["vocabulary_size"] < len(SPECIALS) + BYTES):
        raise ValueError("its header makes no sense")
    attention = tuple(number for number in range(sizes["blocks"]) if attention >> number & 1)
    config = ModelConfig(name.rstrip(b"\0").decode(), **sizes, layer_scale=bool(layer_scale), attention=attention)
    if misfit := _misfit(config):
        raise ValueError(misfit)
    layout, values, place = _layout(config, bits, encoding_bytes), {}, _HEADER.size
    lengths = [np.dtype(kind).itemsize * math.prod(shape) for _, kind, shape in layout]
    if not len(content) == size == place + sum(length + -length % ALIGNMENT for length in lengths):
        raise ValueError("it is truncated, or longer than it should be")
    if zlib.crc32(content[place:]) != payload_checksum:
        raise ValueError("its content is damaged")
    for (section, kind, shape), length in zip(layout, lengths, strict=True):
        values[section] = np.frombuffer(content, kind, math.prod(shape), place).reshape(shape)
        if np.issubdtype(kind, np.floating) and not np.isfinite(values[section]).all():
            raise ValueError(f"{section} is not finite")
        place += length + -length % ALIGNMENT
    del values["encoding"]  # for programs that have no GPT-2 encoding at hand
    vocabulary = Vocabulary(values.pop("vocabulary").tolist())
    vocabulary.require(digest.hex(), "its model")
    rows = values["embedding.weight"].swapaxes(1, 2).reshape(-1, config.width)
    values["embedding.weight"] = rows[: config.vocabulary_size]
    if bits == 8:
        steps = _bfloat16(values.pop("embedding.scales"))
        if not np.isfinite(steps).all():
            raise ValueError("its embedding is not finite")
        values["embedding.weight"] = values["embedding.weight"] * steps[:, None]
    weights = {section: torch.from_numpy(value.copy()) for section, value in values.items()}
    for number in range(config.blocks):
        scales = weights.pop(f"blocks.{number}.scales")
        shapes = _linear_shapes(config, number in config.attention)
        for (layer, shape), scale in zip(shapes.items(), scales, strict=True):
            packed = weights[f"blocks.{number}.{layer}.weight"]
            if packed.max() >= 3**5:
                raise ValueError(f"the weights of block {number} are not ternary")
            weights[f"blocks.{number}.{layer}.weight"] = latent_weight(unpack_ternary(packed, shape), scale)
    with torch.device("meta"):
        model = FlashLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval(), vocabulary
