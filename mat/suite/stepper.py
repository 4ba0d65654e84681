"""One training step: forward, backward, clipping and update; on CUDA replayed as a graph.

A gated step is hundreds of small kernels, and a GPU runs them faster than Python launches them:
launched one by one, a step with a third of the units active takes longer than a dense one.
Captured as a CUDA graph a step costs one launch, and what the gates skip shows on the clock. A
graph holds for one state of the gates: the first step with new gates is launched kernel by
kernel, the second is captured, all others replay the same kernels on the same memory. That
memory comes beside what the steps launched kernel by kernel have used.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mat.gates import Gates
from mat.optim import UnitOptimiser
from mat.suite.interface import Batch, Model

# Kept: multirate has two sets of units that take turns, each with an epoch's short last batch.
GRAPHS = 4
Key = tuple[object, ...]


@dataclass(frozen=True)
class Reading:
    """What a step showed.

    Attributes:
        loss: Mean over the batch, without auxiliary losses.
        norm: Of the gradient, before clipping.
        metrics: The model's, means over the batch.
        monitors: What the last forward pass tells about itself.
    """

    loss: float
    norm: float
    metrics: dict[str, float]
    monitors: dict[str, float]


class Outcome:
    """The same, on the device: to be read before the next step, which may write to its memory.

    Args:
        metrics: Names of the metrics.
        monitors: Names of the monitors.
        values: Loss, norm, metrics and monitors.
    """

    def __init__(self, metrics: tuple[str, ...], monitors: tuple[str, ...], values: Tensor) -> None:
        self._metrics, self._monitors, self._values = metrics, monitors, values

    def read(self) -> Reading:
        """Wait for the device, and give the numbers."""
        loss, norm, *others = self._values.tolist()
        named = list(zip((*self._metrics, *self._monitors), others, strict=True))
        count = len(self._metrics)
        return Reading(loss, norm, dict(named[:count]), dict(named[count:]))


class Stepper:
    """Makes training steps of a model with the gates as they stand.

    Args:
        model: The model, on its device.
        gates: Its gates.
        optimiser: Updates its active units and the rest.
        context: Makes the context of forward passes: autocast or none.
        clip: Bound on the gradient norm, or None.
        accumulation: Micro-batches that a step is computed in.
        drifts: Whether frozen units drift (multirate).
        graphs: Capture and replay (CUDA); else every kernel is launched by itself.
    """

    def __init__(
        self,
        model: Model,
        gates: Gates,
        optimiser: UnitOptimiser,
        context: Callable[[], AbstractContextManager[object]],
        clip: float | None,
        accumulation: int = 1,
        drifts: bool = False,
        graphs: bool = False,
    ) -> None:
        self.model, self.gates, self.optimiser, self.context = model, gates, optimiser, context
        self.clip, self.accumulation, self.drifts, self.graphs = clip, accumulation, drifts, graphs
        self.device = next(model.parameters()).device
        self._graphs: OrderedDict[Key, _Graph | None] = OrderedDict()  # None: seen once
        self._lr = torch.zeros((), device=self.device)

    def step(self, batch: Batch, lr: float, capture: bool = True) -> Outcome:
        """Update the model; on CUDA this returns before the device is done.

        Args:
            batch: Its samples.
            lr: Learning rate.
            capture: Whether a graph will do; not where hooks want to see the step.
        """
        self.model.train()
        if not (self.graphs and capture):
            return self._compute(batch.to(self.device), lr)
        key = self.key(batch)
        self._lr.fill_(lr)
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > GRAPHS:
                self._graphs.popitem(last=False)
            return self._compute(batch.to(self.device), self._lr)
        self._graphs.move_to_end(key)
        graph = self._graphs[key] = self._graphs[key] or self._capture(batch)
        return graph.replay(batch)

    def key(self, batch: Batch) -> Key:
        """What the kernels of a step, and their cost, depend on: the gates and the shapes."""
        shapes = (tensor.shape for tensor in vars(batch).values())
        return (self.gates.active.tobytes(), *shapes)

    def _capture(self, batch: Batch) -> "_Graph":
        tensors = {name: t.to(self.device, copy=True) for name, t in vars(batch).items()}
        static = replace(batch, **tensors)
        graph = torch.cuda.CUDAGraph()
        pools = [other.graph.pool() for other in self._graphs.values() if other]
        with torch.cuda.graph(graph, pool=pools[0] if pools else None):  # one at a time replays
            outcome = self._compute(static, self._lr)
        return _Graph(graph, static, outcome, self.gates.indices())

    def _compute(self, batch: Batch, lr: float | Tensor) -> Outcome:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics: dict[str, Tensor] = {}
        for part in [batch] if self.accumulation == 1 else batch.split(self.accumulation):
            weight = part.samples / batch.samples
            with self.context():
                outputs = self.model(part)
                loss = self.model.loss_of_outputs(outputs, part)
                extra = self.model.auxiliary_loss()
            torch.autograd.backward((loss if extra is None else loss + extra) * weight)
            total = total + loss.detach().double() * weight
            for name, value in self.model.metrics(outputs.detach(), part).items():
                metrics[name] = metrics.get(name, 0.0) + value.double() * weight
        norm = self.optimiser.clip_grad_norm_(self.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        if self.drifts:
            self.optimiser.drift()
        self.optimiser.zero_grad()  # the active set may change now
        monitors = self.model.monitors()
        values = [total, norm, *metrics.values(), *monitors.values()]
        return Outcome(
            tuple(metrics), tuple(monitors), torch.stack([value.double() for value in values])
        )


class _Graph:
    """A captured step, the batch that it reads, what it says, and tensors that it keeps alive."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, batch: Batch, outcome: Outcome, held: list[Tensor]
    ) -> None:
        self.graph, self.batch, self.outcome, self.held = graph, batch, outcome, held

    def replay(self, batch: Batch) -> Outcome:
        for name, tensor in vars(batch).items():
            getattr(self.batch, name).copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outcome
