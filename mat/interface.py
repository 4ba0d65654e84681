"""What the engine, the ledger and the estimator need of a batch and of a model."""

from typing import Any, Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """Samples that a model turns into outputs."""

    @property
    def samples(self) -> int:
        """Number of samples n."""
        ...


class UnitModel(nn.Module):
    """A model with unit layers: outputs, loss, and the FLOPs of what is not a unit layer."""

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch in nats."""
        return self.loss_of_outputs(self(batch), batch)

    def loss_of_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        """The same, given the outputs (rows grouped by sample, equally many rows each)."""
        raise NotImplementedError

    def head_flops(self, batch: Any) -> tuple[int, int]:
        """Forward FLOPs behind the unit layers: (the head, the vocabulary projection)."""
        raise NotImplementedError

    def outputs_per_sample(self, batch: Any) -> int:
        """Number k of outputs of a sample."""
        raise NotImplementedError
