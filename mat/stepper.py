"""One training step: forward, backward, clipping and update; on CUDA replayed as a graph while the gates stand.

A gated step is hundreds of small kernels, and a GPU runs them faster than Python launches them: launched one by one,
a step with a third of the units active takes longer than a dense one. Recorded as a CUDA graph a step costs one
launch, and what the gates skip shows on the clock. A recording holds for one state of the gates: the first step with
new gates is launched kernel by kernel, the second is recorded, all others replay the same kernels on the same memory.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mat.interface import Batch, UnitModel
from mat.optim import UnitOptimiser
from mat.units import UnitLayer, unit_layers

GRAPHS = 4  # kept: multirate has two sets of units that take turns, each with an epoch's short last batch
Key = tuple[object, ...]


class Outcome:
    """What a step showed; reading it waits for the device.

    Args:
        names: ``loss``, ``norm`` (of the gradient before clipping), and the model's metrics.
        values: Theirs, on the device.
    """

    def __init__(self, names: tuple[str, ...], values: Tensor) -> None:
        self._names, self._values = names, values

    def read(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(zip(self._names, self._values.tolist(), strict=True))


class Stepper:
    """Makes training steps of a model with the gates as they stand.

    Args:
        model: The model, on its device.
        optimiser: Updates its active units and the rest.
        context: Makes the context of forward passes: autocast or none.
        clip: Bound on the gradient norm, or None.
        accumulation: Micro-batches that a step is computed in.
        drifting: Layers whose frozen units drift (multirate).
        graphs: Record and replay (CUDA); else every kernel is launched by itself.
    """

    def __init__(
        self, model: UnitModel, optimiser: UnitOptimiser, context: Callable[[], AbstractContextManager[object]],
        clip: float | None, accumulation: int = 1, drifting: Sequence[UnitLayer] = (), graphs: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.optimiser, self.context = model, optimiser, context
        self.clip, self.accumulation, self.drifting, self.graphs = clip, accumulation, drifting, graphs
        self.device = next(model.parameters()).device
        self._layers = unit_layers(model)
        self._recorded: OrderedDict[Key, _Recorded | None] = OrderedDict()  # None: seen once
        self._lr = torch.zeros((), device=self.device)

    def step(self, batch: Batch, lr: float, record: bool = True) -> Outcome:
        """Update the model; on CUDA this returns before the device is done.

        Args:
            batch: Its samples.
            lr: Learning rate.
            record: Whether a graph will do; not where hooks want to see the step.
        """
        self.model.train()
        if not (self.graphs and record):
            return self._compute(batch.to(self.device), lr)
        key = self.key(batch)
        recorded = self._recorded.get(key)
        self._lr.fill_(lr)
        if key not in self._recorded:
            self._recorded[key] = None
            if len(self._recorded) > GRAPHS:
                self._recorded.popitem(last=False)
            return self._compute(batch.to(self.device), self._lr)
        self._recorded.move_to_end(key)
        recorded = self._recorded[key] = recorded or self._record(batch)
        return recorded.replay(batch)

    def key(self, batch: Batch) -> Key:
        """What the kernels of a step, and their cost, depend on: the gates and the shapes."""
        gates = [(layer.mode, layer.active.tobytes()) for layer in self._layers]
        return (*gates, *(tensor.shape for tensor in vars(batch).values()))

    def _record(self, batch: Batch) -> "_Recorded":
        static = batch.to(self.device)
        for layer in self._layers:
            layer.before_capture(self.device)
        graph = torch.cuda.CUDAGraph()
        others = [recorded.graph.pool() for recorded in self._recorded.values() if recorded]
        with torch.cuda.graph(graph, pool=others[0] if others else None):  # one at a time replays, so they share
            outcome = self._compute(static, self._lr)
        held = [tensor for layer in self._layers for tensor in layer.after_capture()]
        self.optimiser.clear()  # its gradients lie in the graph's memory
        return _Recorded(graph, static, outcome, held)

    def _compute(self, batch: Batch, lr: float | Tensor) -> Outcome:
        self.optimiser.clear()
        values: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64, device=self.device)}
        for part in [batch] if self.accumulation == 1 else batch.split(self.accumulation):
            weight = part.samples / batch.samples
            with self.context():
                outputs = self.model(part)
                loss = self.model.loss_of_outputs(outputs, part)
                extra = self.model.auxiliary_loss()
            torch.autograd.backward((loss if extra is None else loss + extra) * weight)
            for name, value in {"loss": loss.detach(), **self.model.metrics(outputs.detach(), part)}.items():
                values[name] = values.get(name, 0.0) + value.double() * weight
        values["norm"] = self.optimiser.clip(self.clip).double()
        self.optimiser.step(lr)
        if self.drifting:
            self.optimiser.drift(self.drifting, lr)
        return Outcome(tuple(values), torch.stack(list(values.values())))


class _Recorded:
    """A step as a CUDA graph, the batch that it reads, what it says, and the tensors that live as long as it."""

    def __init__(self, graph: torch.cuda.CUDAGraph, batch: Batch, outcome: Outcome, held: list[Tensor]) -> None:
        self.graph, self.batch, self.outcome, self.held = graph, batch, outcome, held

    def replay(self, batch: Batch) -> Outcome:
        for name, tensor in vars(batch).items():
            getattr(self.batch, name).copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outcome
