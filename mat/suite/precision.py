"""How precisely a run computes: what ``hardware.precision=auto`` means on this machine, and what it
changes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mat.suite.interface import Batch

CPUINFO = "/proc/cpuinfo"
CAPABILITY = 8  # of the first CUDA devices that multiply bfloat16 (Ampere)


def machine_precision(device: str) -> str:
    """bfloat16 where the processor or the CUDA device multiplies it in hardware, else float32."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability()[0] >= CAPABILITY else "float32"
    return "bfloat16" if _processor_has_bfloat16() else "float32"


def _processor_has_bfloat16() -> bool:
    """AVX512-BF16 or AMX, as the system lists the processor's instructions; False where it lists
    none.
    """
    try:
        with open(CPUINFO) as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of forward passes: products in bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def batch_in(batch: Batch, precision: str) -> Batch:
    """The batch with real numbers of a precision: doubles for float64, else as they are."""
    if precision != "float64":
        return batch
    real: dict[str, Tensor] = {
        k: v.double() for k, v in vars(batch).items() if v.is_floating_point()
    }
    return replace(batch, **real)
