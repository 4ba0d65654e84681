"""What the engine, the ledger and the estimator need of data, batches and models."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Flops:
    """FLOPs by column (paper section 4); ``vocabulary`` is outside the paper's figure."""

    forward: int = 0
    input_grad: int = 0
    weight_grad: int = 0
    overhead: int = 0
    vocabulary: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def figure(self) -> int:
        """The paper's figure: everything but the vocabulary projection."""
        return self.forward + self.input_grad + self.weight_grad + self.overhead

    @property
    def everything(self) -> int:
        """All columns: what a FLOPs counter sees."""
        return self.figure + self.vocabulary


class Batch(Protocol):
    """Samples that a model turns into outputs.

    Attributes:
        targets: What the outputs should say; its first axis is grouped by sample.
    """

    targets: Tensor

    @property
    def samples(self) -> int:
        """Number of samples n."""
        ...

    @property
    def length(self) -> int:
        """Positions per sample: tokens T, or 1 for images."""
        ...

    @property
    def inputs(self) -> Tensor:
        """What the model reads; tells one probe from another."""
        ...

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        ...

    def split(self, parts: int) -> Sequence[Self]:
        """Equal consecutive parts (fewer when there are fewer samples than parts)."""
        ...


class Data(Protocol):
    """A dataset as reproducible batches."""

    @property
    def outputs(self) -> int:
        """What a model has to tell apart: word pieces V, or classes."""
        ...

    def steps_per_epoch(self, batch: int) -> int:
        """Batches of this size in an epoch, a short last one included."""
        ...

    def train_batch(self, step: int, batch: int) -> tuple[Batch, int]:
        """The batch of a step and its epoch."""
        ...

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> Iterable[Batch]:
        """Samples of a split (all when None), the same for all methods and seeds."""
        ...

    def probe_batch(self, samples: int) -> Batch:
        """The estimator's samples, the same at every selection."""
        ...

    def facts(self) -> dict[str, float]:
        """What is worth knowing beside every result, such as the unigram entropy."""
        ...


class UnitModel(nn.Module):
    """A model with unit layers: outputs, loss, and the FLOPs of what is not a unit layer.

    Attributes:
        best_by: The validation score whose best value picks the weights that are tested.
    """

    best_by: ClassVar[Literal["loss", "accuracy"]] = "loss"

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch in nats."""
        return self.loss_of_outputs(self(batch), batch)

    def loss_of_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        """The same, given the outputs: mean cross-entropy of logits (rows grouped by sample, equally many each)."""
        return F.cross_entropy(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), batch.targets)

    def fix_constants(self, batches: Sequence[Any]) -> None:
        """Let the layers note what the estimator holds fixed (``mat.units.Tape``), given all batches of a probe."""

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to the loss of its last forward pass, if anything."""
        return None

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, float]:
        """Means over the batch beside the loss, such as the accuracy."""
        return {}

    def monitors(self) -> dict[str, float]:
        """What the last training forward pass noticed about itself."""
        return {}

    def rest_flops(self, batch: Any) -> Flops:
        """A training step's FLOPs outside the unit layers."""
        raise NotImplementedError

    def outputs_per_sample(self, batch: Any) -> int:
        """Number k of outputs of a sample."""
        raise NotImplementedError
