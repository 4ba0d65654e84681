"""The FLOPs ledger: what a step of any model costs, in the paper's columns (sections 4 and 5).

Two FLOPs per multiply-add; matrix products, convolutions and attention kernels only. The paper's
figure is the sum of forward, input gradient, weight gradient and overhead (the estimator). Products
with the vocabulary have a column of their own outside it. Recomputation, inside attention kernels
and by gradient checkpointing, is not counted.

A :class:`Ledger` records one dense forward pass and reads off the autograd graph which products a
backward pass runs. The cost for any state of the gates is then arithmetic: sites say what share of
a product they run (:meth:`mat.layers.site.Site.shares`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from mat import ntk
from mat.kernels import shapes_of
from mat.layers.site import WHOLE, Shares
from mat.operations import Recorder, Term, flop_counter, graph_of, undisturbed
from mat.probe import run, samples_of, untouched
from mat.taps import Tape
from mat.units import Units

__all__ = ["Flops", "Ledger", "estimate", "flop_counter"]


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
    def backward(self) -> int:
        """Input and weight gradients."""
        return self.input_grad + self.weight_grad

    @property
    def figure(self) -> int:
        """The paper's figure: everything but the products with the vocabulary."""
        return self.forward + self.backward + self.overhead

    @property
    def everything(self) -> int:
        """All columns: what a FLOPs counter sees."""
        return self.figure + self.vocabulary


class Ledger:
    """What steps and estimates on batches of one shape cost.

    Random states, buffers, gradients and modes of the model stay as they are.

    Args:
        model: The model, attached or not.
        forward: Computes what the backward pass starts from, the loss, as a step does.
        vocabulary: Paths of the modules (the decoder) that have the column ``vocabulary``.
        training: Run it as a training step does; else in evaluation mode, as the estimator does.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[], Any],
        vocabulary: Sequence[str] = (),
        training: bool = True,
    ) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        recorder = Recorder(self.paths)
        with undisturbed(model, training), recorder, torch.enable_grad():
            outputs = forward()
        self.terms = recorder.terms
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.nodes = graph_of(outputs, self.terms, names)
        for term in self.terms:
            term.vocabulary = not set(vocabulary).isdisjoint(term.operation.path)

    def step(self, executed: bool = True) -> Flops:
        """FLOPs of a training step with the gates as they stand.

        Args:
            executed: Count what runs, padding included; else what the active set needs. Experts
                are counted with the routing of the recorded pass.
        """
        return self._count(*self._state(executed))

    def backward(self, dense: bool = False) -> Counter[str]:
        """FLOPs of the backward pass by the name of a product's weight; "" where it has none.

        Args:
            dense: As if nothing were gated; else with the gates as they stand.
        """
        total: Counter[str] = Counter()
        for term, *gradients in self._gradients(*(self._dense() if dense else self._state())):
            total[term.operation.weight] += int(sum(gradients))
        return total

    def _dense(self) -> tuple[list[Shares], list[bool]]:
        """What :meth:`_count` takes where nothing is gated."""
        return [WHOLE] * len(self.terms), [True] * len(self.nodes)

    def _state(self, executed: bool = True) -> tuple[list[Shares], list[bool]]:
        """What it takes with the gates as they stand."""
        gates = getattr(self.model, "_gates", None)
        sites = {self.paths[site.module]: site for site in gates.sites} if gates else {}
        parts = gates.parts() if gates else ()
        idle = {id(p.parameter) for p in parts if not (p.wanted if executed else p.count)}
        shares = []
        for term in self.terms:
            # The module that has the weight, else the innermost that it runs in.
            places = term.operation.weight.rpartition(".")[0], *reversed(term.operation.path)
            site = next((sites[path] for path in places if path in sites), None)
            shares.append(site.shares(term.operation, executed) if site else WHOLE)
        wanted = [False] * len(self.nodes)
        for at in reversed(range(len(self.nodes))):  # a node stands before its children
            node = self.nodes[at]
            # Autograd also forms gradients that a closed layer stops; they are not needed.
            passes = executed or all(shares[term.number].input_grad for term in node.terms)
            below = passes and any(wanted[child] for child in node.children)
            wanted[at] = below or not idle.issuperset(node.parameters)
        return shares, wanted

    def passes(self, backward: int) -> Flops:
        """FLOPs of a forward pass and so many backward passes, as if nothing were gated."""
        once = self._count(*self._dense())
        forward = sum(term.operation.flops for term in self.terms if term.vocabulary)
        return Flops(
            once.forward,
            backward * once.input_grad,
            backward * once.weight_grad,
            vocabulary=forward + backward * (once.vocabulary - forward),
        )

    def _count(self, shares: Sequence[Shares], wanted: Sequence[bool]) -> Flops:
        """FLOPs of a forward and a backward pass.

        Args:
            shares: Of every product.
            wanted: Of every node whether its gradient is.
        """
        columns = [Fraction(0)] * 4

        def add(term: Term, column: int, flops: Fraction) -> None:
            columns[3 if term.vocabulary else column] += flops

        for term in self.terms:
            add(term, 0, shares[term.number].forward * term.operation.flops)
        for term, inputs, weights in self._gradients(shares, wanted):
            add(term, 1, inputs)
            add(term, 2, weights)
        forward, input_grad, weight_grad, vocabulary = (int(total) for total in columns)
        return Flops(forward, input_grad, weight_grad, vocabulary=vocabulary)

    def _gradients(
        self, shares: Sequence[Shares], wanted: Sequence[bool]
    ) -> Iterator[tuple[Term, Fraction, Fraction]]:
        """FLOPs of the input and weight gradients of every product that a backward pass reaches."""
        reached = [at == 0 for at in range(len(self.nodes))]
        for at, node in enumerate(self.nodes):
            if not reached[at]:
                continue
            children = [child for child in node.children if wanted[child]]
            for term in node.terms:
                one_each = len(children) if term.factors else term.inputs
                inputs = min(term.inputs, one_each) if children else 0
                share, flops = shares[term.number], term.operation.flops
                yield (
                    term,
                    flops * inputs * share.input_grad,
                    flops * term.weights * share.weight_grad,
                )
            if all(shares[term.number].input_grad for term in node.terms):
                for child in children:
                    reached[child] = True


def estimate(
    model: nn.Module,
    batch: Any,
    units: Units | None = None,
    *,
    passes: int = 1,
    samples: int | None = None,
    memory_bytes: int = ntk.MEMORY_BYTES,
    vocabulary: Sequence[str] = (),
) -> Flops:
    """FLOPs of :func:`mat.ntk.estimate` on one batch, with columns overhead and vocabulary.

    Args:
        model: The model.
        batch: The probe.
        units: As the estimator's.
        passes: Its backward passes: m projections, k outputs (``full``), else 1.
        samples: As the estimator's.
        memory_bytes: As the estimator's.
        vocabulary: As of :class:`Ledger`.
    """
    units = ntk.units_of(model, units)
    n = samples_of(batch) if samples is None else samples
    tape = Tape(model, units)  # before gradients are off: it leaves out what does not train
    with untouched(model), tape:
        tape.begin(n)
        ledger = Ledger(model, lambda: run(model, batch), vocabulary, training=False)
        shapes = shapes_of(tape.taps)
    cost = ledger.passes(passes)
    kernels = ntk.kernel_flops(shapes, len(units), n * passes, memory_bytes)
    return Flops(overhead=cost.figure + kernels, vocabulary=cost.vocabulary)
