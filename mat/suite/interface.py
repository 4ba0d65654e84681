"""What the engine needs of batches and models."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Batch:
    """Samples that a model turns into outputs.

    Attributes:
        inputs: What the model reads, a row per sample; tells one probe from another.
        targets: What the outputs should say; its first axis is grouped by sample.
    """

    inputs: Tensor
    targets: Tensor

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int:
        """Positions per sample: tokens T, or 1 for images."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return replace(
            self,
            **{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()},
        )

    def split(self, parts: int) -> Sequence[Self]:
        """Equal consecutive parts (fewer when there are fewer samples than parts)."""
        raise NotImplementedError


class Model(nn.Module):
    """A model of the suite: from a batch to outputs, and what to make of them.

    Attributes:
        best_by: The validation score whose best value picks the weights that are tested.
    """

    best_by: ClassVar[Literal["loss", "accuracy"]] = "loss"

    def loss(self, batch: Any) -> Tensor:
        """Mean loss of a batch in nats."""
        return self.loss_of_outputs(self(batch), batch)

    def loss_of_outputs(self, outputs: Tensor, batch: Any) -> Tensor:
        """The same, given the outputs: mean cross-entropy of logits, whose rows are grouped by
        sample, equally many each; in float32 at least.
        """
        precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return F.cross_entropy(precise, batch.targets)

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to the loss of its last forward pass, if anything."""
        return None

    def metrics(self, outputs: Tensor, batch: Any) -> dict[str, Tensor]:
        """Means over the batch beside the loss, such as the accuracy: scalars, on the device."""
        return {}

    def monitors(self) -> dict[str, Tensor]:
        """What the last training forward pass tells about itself: scalars, on the device."""
        return {}
