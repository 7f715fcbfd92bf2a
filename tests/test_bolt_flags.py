"""bolt.c under every flag that people give to a C compiler: always the same numbers."""

import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import HYBRID, lively, times

from flashlm_helpers.generation import Sampling
from flashlm_helpers.runtime.bolt import SOURCE
from flashlm_helpers.runtime.packed import save_packed
from flashlm_helpers.vocab import BOS, EOS

# Reads ids, and prints -ln p of each but the first; then greedy ids after them, a story alone and
# one of 20. A real number on each line, a short row filled up with EOS.
DRIVER = """
#define BOLT_LIBRARY
#include "SOURCE"
int main(int count, char **words) {
    char error[400];
    uint16_t ids[200], prompts[20 * 200], written[20 * 30];
    float nats[200], surprise[20 * 30], entropy[20 * 30];
    long lengths[20], counts[20], length = (long)fread(ids, 2, 200, stdin);
    int finished[20];
    bolt_model *m = bolt_open(words[1], error, sizeof error);
    if (count != 2 || !m) return fprintf(stderr, "%s\\n", error), 1;
    bolt_state *one = bolt_start(m, 1), *sixteen = bolt_start(m, 16);
    if (bolt_score(one, ids, length, nats)) return 1;
    for (long n = 0; n + 1 < length; n++) printf("%.9g\\n", nats[n]);

    for (int n = 0; n < 20; n++) {
        lengths[n] = 9;
        memcpy(prompts + 9 * n, ids, 2 * 9);
    }
    bolt_settings how = {.tokens = 30, .top_p = 1};
    bolt_state *states[2] = {bolt_start(m, 1), sixteen};
    for (int k = 0; k < 2; k++) {
        if (bolt_generate(states[k], k ? 20 : 1, prompts, lengths, &how, written, surprise, entropy,
                          counts, finished, NULL, NULL))
            return 1;
        uint16_t *last = written + (k ? 19 * 30 : 0);
        for (int n = 0; n < 30; n++) printf("%d\\n", n < counts[k ? 19 : 0] ? last[n] : EOS);
    }
    bolt_end(one);
    bolt_end(states[0]);
    bolt_end(sixteen);
    bolt_close(m);
    return 0;
}
"""
OFTEN = ["-O0 -std=c99", "-Os -std=c11", "-Ofast -march=native -std=gnu17"]
ALL = [
    *OFTEN,
    "-O1",
    "-O2",
    "-O3",
    "-Ofast",
    "-O3 -ffast-math",
    "-O3 -funsafe-math-optimizations",
    "-O3 -ffinite-math-only",
    "-O3 -march=native",
    "-O3 -flto",
    "-O2 -ftrapv",
    "-O2 -fno-strict-aliasing -funsigned-char",
    "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all",
    "-Ofast -fsanitize=address,undefined -fno-sanitize-recover=all",
    "-O3 -std=c99",
    "-O3 -std=c11",
    "-O3 -std=gnu17",
    "-O3 -std=gnu2x",
]
TEXT = 120  # ids


@pytest.fixture(scope="module")
def models(vocabulary, tmp_path_factory):
    """A model of each kind: its file, ids to score, and PyTorch's nats and greedy ids after 9."""
    models = []
    for seed, shape in enumerate(({}, HYBRID)):
        model = lively(vocabulary, **shape)
        path = tmp_path_factory.mktemp("packed") / "model"
        save_packed(path, model, bits=32)
        ids = np.random.default_rng(seed).integers(EOS + 1, len(vocabulary), TEXT)
        ids[0] = BOS
        story = model.write([ids[:9].tolist()], Sampling(tokens=30, temperature=0))[0]
        written = story.ids + [EOS] * (30 - len(story.ids))
        with torch.inference_mode():
            logits = model.network(torch.tensor(ids[None, :-1]))[0]
        nats = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        models.append((path, ids, nats.numpy(), written))
    return models


@pytest.mark.soak
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flags", times(OFTEN, ALL))
def test_every_flag_gives_the_same_numbers(compiler, flags, models, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    (tmp_path / "driver.c").write_text(DRIVER.replace("SOURCE", str(SOURCE)))
    command = [compiler, *flags.split(), "-w", "driver.c", "-o", "driver"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if built.returncode and "sanitize" in flags:
        pytest.skip(f"{compiler} has no sanitizers")
    assert built.returncode == 0, built.stderr

    # Kernels that this processor lacks are those it has.
    for path, ids, nats, written in models:
        for kernels in ("portable", "avx2", "avx512"):
            done = subprocess.run(
                [tmp_path / "driver", path],
                input=ids.astype("<u2").tobytes(),
                capture_output=True,
                env=os.environ | {"BOLT_KERNELS": kernels},
            )
            assert (done.returncode, done.stderr) == (0, b""), done.stderr
            numbers = np.array(done.stdout.split(), float)
            np.testing.assert_allclose(numbers[: TEXT - 1], nats, rtol=1e-4, atol=2e-4)
            assert numbers[TEXT - 1 :].tolist() == 2 * written
