"""How the outputs of a network become what is differentiated; ``mat.ntk`` has the reductions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Reduction = Literal["random", "sum", "full", "loss"]
LossOfOutputs = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Reducer:
    """How outputs become what is differentiated; ``samples`` is n of the whole probe."""

    reduction: Reduction
    projections: int
    seed: int
    samples: int
    loss: LossOfOutputs | None = None

    def __post_init__(self) -> None:
        known = get_args(Reduction)
        if self.reduction not in known or self.projections < 1 or self.samples < 1:
            raise ValueError(
                f"reduction={self.reduction!r}, projections={self.projections}, {self.samples} "
                f"samples: wanted one of {', '.join(known)}, and at least one of both"
            )

    def outputs_per_sample(self, outputs: Tensor, samples: int) -> int:
        """The number k."""
        if not outputs.dim() or outputs.shape[0] % samples:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} cannot be split evenly into "
                f"{samples} samples"
            )
        return outputs.numel() // samples

    def cotangents(
        self, result: Any, batch: Any, outputs: Tensor, first: int, samples: int
    ) -> Iterator[tuple[Tensor, bool]]:
        """One vector of the outputs' shape per backward pass, and whether it is the last one.

        ``first`` is the number of the batch's first sample in the probe.
        """
        count = outputs.numel() // samples
        if self.reduction == "loss":
            yield self._of_loss(result, batch, outputs) * (samples / self.samples), True
        elif self.reduction == "sum":
            yield torch.full_like(outputs, count**-0.5), True
        elif self.reduction == "full":
            for j in range(count):
                vector = torch.zeros(samples, count, dtype=outputs.dtype, device=outputs.device)
                vector[:, j] = 1
                yield vector.view(outputs.shape), j == count - 1
        else:
            for j in range(self.projections):
                signs = self._signs(outputs, samples, first, j)
                yield signs.view(outputs.shape), j == self.projections - 1

    def signs(self, outputs: Tensor, samples: int) -> Tensor:
        """The random signs (m, n, k) of a probe's outputs; ``random`` multiplies by them."""
        every = [self._signs(outputs, samples, 0, j) for j in range(self.projections)]
        return torch.stack(every)

    def _of_loss(self, result: Any, batch: Any, outputs: Tensor) -> Tensor:
        """Gradient of the mean loss of a batch."""
        if self.loss is not None:
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf, batch), leaf)[0]
        if getattr(result, "loss", None) is None:
            raise ValueError("reduction='loss' needs loss=, or labels in the batch of a model that "
                             "returns its loss")  # fmt: skip
        return torch.autograd.grad(result.loss, outputs, retain_graph=True)[0]

    def _signs(self, outputs: Tensor, samples: int, first: int, projection: int) -> Tensor:
        """(n, k), made on the CPU so that every device sees the same."""
        count = outputs.numel() // samples
        rows = []
        for sample in range(first, first + samples):
            stream = np.random.default_rng([self.seed, projection, sample]).bytes(-(-count // 8))
            rows.append(np.unpackbits(np.frombuffer(stream, np.uint8), count=count))
        bits = torch.from_numpy(np.stack(rows)).to(outputs.device)
        return bits.to(outputs.dtype).mul_(2).sub_(1)
