"""The number format in which this processor computes matmuls fastest."""

import torch


def has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 itself; emulation is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    return any(capabilities.get(name) for name in names)


def matmul_autocast(bfloat16: bool | None = None) -> torch.autocast:
    """Return the context in which matmuls are computed in bfloat16.

    bfloat16: None means where the processor has it. Weights, norms, the residual stream, softmax
    and loss stay float32.
    """
    if bfloat16 is None:
        bfloat16 = has_bfloat16()
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
