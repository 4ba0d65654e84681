"""What training costs: FLOPs by the library's ledger, for any way to train less of a model.

Every method is counted alike: the products that its forward and backward passes really run, and
those of the estimator. A frozen parameter costs no weight gradient; what lies below the last one
that trains costs no input gradient.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mat import Gates, ntk
from mat.flops import Ledger, estimate
from mat.probe import samples_of


class Meter:
    """FLOPs of steps and selections on batches of one shape.

    Args:
        model: The model, as it trains.
        loss: Computes the loss of a training batch.
        gates: Of the model, if it is attached.
        scored: What scores are read off, if they are: the probe, or a training batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        gates: Gates | None = None,
        scored: Any = None,
    ) -> None:
        self.gates = gates
        self._ledger = Ledger(model, loss)
        self._known: dict[bytes, int] = {}  # FLOPs of a step by the active set
        self.selection = 0
        if gates is not None and gates.policy.needs_score:
            self.selection = _selection(model, gates, scored)

    def step(self) -> int:
        """FLOPs of a training step with the gates as they stand."""
        key = b"" if self.gates is None else self.gates.active.tobytes()
        if key not in self._known:
            self._known[key] = self._ledger.step().everything
        return self._known[key]


def _selection(model: nn.Module, gates: Gates, scored: Any) -> int:
    """FLOPs of a selection beside the training step that it may be read off."""
    config = gates.config
    if config.reduction != "online":
        passes = config.projections if config.reduction == "random" else 1
        return estimate(model, scored, gates.units, passes=passes).everything
    shapes = ntk.kernel_shapes(model, scored, gates.units)
    return ntk.kernel_flops(shapes, len(gates.units), samples_of(scored))


def schedule(progress: float, warm_up: float = 0.1) -> float:
    """Factor of the learning rate by the share of the FLOPs that are spent: linear up and down."""
    return max(0.0, min(progress / warm_up, (1 - progress) / (1 - warm_up)))


def now() -> float:
    """Seconds of a clock, once a CUDA device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> int | None:
    """Bytes of a CUDA device at most in use since its statistics were reset; None on others."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
