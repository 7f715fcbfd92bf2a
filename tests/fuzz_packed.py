"""Throw damaged and hostile packed files at bolt.c, built with sanitizers.

    python tests/fuzz_packed.py --files 10000

The sanitizers are those of addresses and undefined behaviour. Each file must be refused (status 2
and one line) or run (status 0), in a few seconds. Most of them have their checksums made to fit
again, so that the checks behind those are reached.
"""

import argparse
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

HEADER = 192  # bytes
ENCODING = 203_600  # bytes of GPT-2's encoding at the end, about
# Opens a model, and scores a text, and writes 2 stories one by one or 20 in 16 places.
DRIVER = """
#define BOLT_LIBRARY
#include "SOURCE"
int main(int count, char **words) {
    char error[400];
    int texts = atoi(words[4]), stories = texts == 1 ? 2 : 20, finished[20];
    bolt_model *m = bolt_open(words[1], error, sizeof error);
    if (!m) return fprintf(stderr, "error: %s\\n", error), count == 7 ? 2 : 3;
    bolt_settings how = {.tokens = 4, .temperature = (float)atof(words[3]), .top_k = atoi(words[5]),
                         .top_p = (float)atof(words[6]), .seed = 0};
    size_t size = strlen(words[2]);
    uint16_t prompts[20 * 200], ids[20 * 4];
    long lengths[20], counts[20];
    float surprise[20 * 4], entropy[20 * 4], nats[200];
    for (int n = 0, at = 0; n < stories; at += lengths[n++]) {
        prompts[at] = BOS;
        const uint8_t *text = (const uint8_t *)words[2];
        lengths[n] = 1 + bolt_encode(m, text, size - (size_t)n, prompts + at + 1);
    }
    bolt_state *s = bolt_start(m, texts), *one = bolt_start(m, 1);
    if (s && one) {
        bolt_generate(s, stories, prompts, lengths, &how, ids, surprise, entropy, counts,
                      finished, NULL, NULL);
        for (int n = 0; n < 4 * stories; n++) {
            uint8_t text[MAX_TOKEN_BYTES];
            if (n % 4 >= counts[n / 4]) continue;
            if (ids[n] < SPECIALS || ids[n] >= bolt_vocabulary(m)) abort();
            bolt_token(m, ids[n], text);
        }
        bolt_score(one, prompts, lengths[0], nats);
    }
    bolt_end(one);
    bolt_end(s);
    bolt_close(m);
    return 0;
}
"""
INTERESTING = (0, 1, 2, 4, 15, 16, 127, 128, 242, 243, 254, 255)


def reseal(content: bytearray) -> bytes:
    """The file with checksums that fit whatever was done to it."""
    content[24:28] = struct.pack("<I", zlib.crc32(content[HEADER:]))
    content[12:16] = struct.pack("<I", zlib.crc32(content[16:HEADER]))
    return bytes(content)


def mutate(content: bytes, numbers: random.Random) -> bytes:
    """A file that is damaged, truncated, prolonged, or hostile with checksums that fit."""
    hostile, fits = bytearray(content), numbers.random() < 0.75
    kind = numbers.randrange(7)
    if kind == 0:  # a size of the header
        place = 28 + 4 * numbers.randrange(11)
        size = numbers.choice([*INTERESTING, numbers.randrange(70_000), 2**31, 2**32 - 1])
        hostile[place : place + 4] = struct.pack("<I", size)
    elif kind == 1:
        del hostile[numbers.randrange(len(hostile)) :]
    elif kind == 2:
        hostile += bytes(numbers.randrange(1, 100))
    else:  # bytes of the header, the weights, the encoding, or the classes of characters
        borders = (8, HEADER, len(content) - ENCODING, len(content) - 3_600, len(content))
        first, last = borders[kind - 3 : kind - 1]
        for _ in range(numbers.choice([1, 2, 8, 64])):
            place = numbers.randrange(first, last)
            hostile[place] = numbers.choice([*INTERESTING, numbers.randrange(256)])
    return reseal(hostile) if fits and len(hostile) > HEADER else bytes(hostile)


def build(source: Path, program: Path) -> None:
    """Build bolt.c, with the driver, so that it stops at the first wrong access."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    driver = program.with_suffix(".c")
    driver.write_text(DRIVER.replace("SOURCE", str(source)))
    subprocess.run(
        [
            compiler,
            "-O1",
            "-g",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            str(driver),
            "-o",
            str(program),
        ],
        check=True,
    )


def fuzz(program: Path, contents: list[bytes], files: int, seed: int = 0) -> Counter:
    """Count the files that were refused and that ran; AssertionError for anything else."""

    def one(number: int) -> str:
        numbers = random.Random(f"{seed}-{number}")
        with tempfile.NamedTemporaryFile(suffix=".flashlm") as file:
            file.write(mutate(numbers.choice(contents), numbers))
            file.flush()
            prompt = "\U0001f642 Once, you're \u3000 42 ! as a bird  now"
            words = [
                program,
                file.name,
                prompt,
                numbers.choice(["0", "1", "1e9", "3e38"]),
                numbers.choice(["1", "16"]),
                numbers.choice(["0", "3", "50"]),
                numbers.choice(["1e-30", "0.9", "1"]),
            ]
            done = subprocess.run(
                words,
                capture_output=True,
                timeout=120,
                env=os.environ
                | {
                    "ASAN_OPTIONS": "allocator_may_return_null=1",
                    "BOLT_KERNELS": numbers.choice(["portable", "avx2", "avx512"]),
                },
            )
        told = done.returncode == 0 and not done.stderr
        refused = (
            done.returncode == 2
            and done.stderr.startswith(b"error: ")
            and done.stderr.count(b"\n") == 1
        )
        assert told or refused, (
            f"file {number} of seed {seed}: {done.returncode} {done.stderr[-2000:]}"
        )
        return "ran" if told else "refused"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return Counter(pool.map(one, range(files)))


def small_models(folder: Path) -> list[bytes]:
    """Pack a model with attention and one without, as small as they can be."""
    import flashlm_helpers as fl
    from flashlm_helpers.runtime.packed import save_packed

    stories = fl.open_corpus("builtin", 50).stories("train")
    vocabulary = fl.Vocabulary.build(stories, 405)
    small = fl.ModelConfig(
        "small",
        width=32,
        blocks=2,
        hidden=16,
        sequence_length=32,
        kernel_size=3,
        vocabulary_size=len(vocabulary),
    )
    hybrid = replace(small, mixers=("conv", "attention"), heads=2, window=5, layer_scale=True)

    contents = []
    for bits, config in ((8, small), (32, hybrid)):
        model = fl.PyTorchModel(fl.FlashLM(config), vocabulary)
        save_packed(folder / "small", model, bits)
        contents.append((folder / "small").read_bytes())
    return contents


if __name__ == "__main__":
    from flashlm_helpers.runtime.bolt import SOURCE

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        build(SOURCE, Path(name) / "bolt")
        print(
            dict(fuzz(Path(name) / "bolt", small_models(Path(name)), args.files, args.seed)),
            file=sys.stderr,
        )
