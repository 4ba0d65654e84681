"""What training costs: FLOPs by the library's ledger, for any way to train less of a model.

Every method is counted alike: the products that its forward and backward passes really run, and
those of the estimator. A frozen parameter costs no weight gradient; what lies below the last one
that trains costs no input gradient.
"""

from collections.abc import Mapping

import torch
from mat.flops import Ledger
from torch import Tensor, nn

from mat import Gates, ntk

Batch = Mapping[str, Tensor]


class Meter:
    """FLOPs of steps and selections on batches of one shape.

    Args:
        model: A model of transformers, which gives the loss of a batch; as it trains.
        batch: A batch of the shape that all have, on the model's device.
        gates: Of the model, if it is attached.
        probe: Batch that scores are measured on, if they are; also there.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, gates: Gates | None = None, probe: Batch | None = None
    ) -> None:
        self.gates = gates
        self._ledger = Ledger(model, lambda: model(**batch).loss)
        self._known: dict[bytes, int] = {}  # FLOPs of a step by the active set
        self.selection = self._selection(model, batch, gates, probe) if gates is not None else 0

    def step(self) -> int:
        """FLOPs of a training step with the gates as they stand."""
        key = b"" if self.gates is None else self.gates.active.tobytes()
        if key not in self._known:
            self._known[key] = self._ledger.step().everything
        return self._known[key]

    def _selection(self, model: nn.Module, batch: Batch, gates: Gates, probe: Batch | None) -> int:
        """FLOPs of a selection: kernels, and the passes over the probe where there is one."""
        if not gates.policy.needs_score:
            return 0
        units, measured_on = gates.units, batch if probe is None else probe
        count = gates.config.projections if gates.config.reduction == "random" else 1
        shapes = ntk.kernel_shapes(model, measured_on, units)
        rows = count * len(next(iter(measured_on.values())))
        kernels = ntk.kernel_flops(shapes, len(units), rows)
        if probe is None:  # read off a training step, which the ledger counts
            return kernels
        passes = Ledger(model, lambda: model(**probe).logits, training=False)
        measured = {p.parameter.rpartition(".")[0] for la in units.layers for p in la.parts}
        return passes.estimate(measured, count, kernels).everything


def peak_memory(device: str) -> int | None:
    """Bytes of a CUDA device at most in use since its statistics were reset; None on others."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
