"""PyTorch's streaming, compiled: one program for a token of one text, which reads a byte for each ternary weight."""

import torch
from torch import Tensor, nn

from flashlm_helpers.fastpath import compile_failure, keep_programs, missing_compiler
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import BitLinear, freeze_ternary, ternarize
from flashlm_helpers.runtime.bolt import NoRuntime


class _ByteLinear(nn.Module):
    """A BitLinear (..., D_in) -> (..., D_out) whose ternary weights are bytes.

    Written as a product and a sum, of which the compiler makes one loop; F.linear would need four bytes a weight.
    """

    def __init__(self, layer: BitLinear):
        super().__init__()
        ternary, scale = ternarize(layer.weight.detach())
        self.register_buffer("ternary", ternary)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.ternary).sum(-1) * self.scale


class CompiledModel:
    """A FlashLM for generation.stream(): the same logits up to rounding, faster where one story is written.

    A token takes as long as its weights take to be read, and the ternary ones are a quarter as large. Compiling takes
    some ten seconds at first, less when data/compiled has its result; texts of several ids, and several texts, run as
    ever.
    Raises NoRuntime, in one line, if there is no C++ compiler or it fails.
    """

    def __init__(self, model: FlashLM):
        if missing_compiler():
            raise NoRuntime("there is no C++ compiler (install g++ or clang to have one)")
        keep_programs()
        self._frozen = freeze_ternary(model)
        ternary = all(layer.ternary for layer in model.modules() if isinstance(layer, BitLinear))
        self._small = freeze_ternary(model, _ByteLinear) if ternary else self._frozen
        self._step = torch.compile(self._one, dynamic=False)
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long)
            past = self.read(ids)[1]
        try:
            with torch.inference_mode(), torch._dynamo.config.patch(
                    suppress_errors=False, recompile_limit=64, fail_on_recompile_limit_hit=True):
                self.read(ids, past)
        except Exception as error:  # a compiler that is there need not work
            raise NoRuntime(compile_failure(error)) from error

    def _one(self, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        hidden, past = self._small.hidden(ids, past)
        return self._small.head(hidden), past

    def read(self, ids: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """ids (B, T), and the states before them; returns the logits (B, 1, V) of what follows, and the states then.

        To be called in inference mode, which the program is compiled for.
        """
        if past is None or ids.shape != (1, 1):
            hidden, past = self._frozen.hidden(ids, past)
            return self._frozen.head(hidden[:, -1:]), past
        return self._step(ids, [state.flatten().view(state.shape) for state in past])  # strides, too, are compiled in
