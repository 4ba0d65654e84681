"""A site: one module that runs differently while some units are frozen.

Attaching sets ``module.forward`` on the instance. Class, name, parameters, hooks and state dict of
the module stay as they are, and so does its forward while all units are active.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from mat.layers.gate import Gate, Index, take


@dataclass(frozen=True)
class Operation:
    """What costs FLOPs in a dense forward: a matrix product, convolution or attention kernel.

    Attributes:
        path: Paths of the modules that it runs in, the innermost last.
        flops: Two per multiply-add.
        shape: Of the innermost module's first input.
        weight: Name of the parameter that is one of its factors, if one is.
        stacked: Where that stacks matrices, how often each of them is used.
    """

    path: tuple[str, ...]
    flops: int
    shape: tuple[int, ...] = ()
    weight: str = ""
    stacked: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shares:
    """What runs of an operation, as shares of its dense forward.

    Attributes:
        forward: 1, but for padding that is not counted.
        input_grad: Of an input's gradient; 0 also says that none goes further down.
        weight_grad: Of its weight's gradient.
    """

    forward: Fraction = Fraction(1)
    input_grad: Fraction = Fraction(1)
    weight_grad: Fraction = Fraction(1)


WHOLE = Shares()


class Site:
    """Runs a module with the gates as they stand.

    Args:
        module: The module.
        gates: The gates that it depends on.
        method: The method that is replaced; ``forward`` unless the module's forward has other work.
    """

    def __init__(self, module: nn.Module, *gates: Gate | None, method: str = "forward") -> None:
        self.module, self.method = module, method
        self.gates = tuple(gate for gate in gates if gate is not None)
        # What another library set on the instance; None where the method is the class's own.
        self.earlier: Any = module.__dict__.get(method)

    def attach(self) -> None:
        """Stand in for the module's method."""
        setattr(self.module, self.method, self.forward)

    def detach(self) -> None:
        """Give the module its own method back."""
        if self.earlier is None:
            self.module.__dict__.pop(self.method, None)
        else:
            setattr(self.module, self.method, self.earlier)

    def original(self, *inputs: Any, **named: Any) -> Any:
        """The module's own method."""
        if self.earlier is not None:
            return self.earlier(*inputs, **named)
        return getattr(type(self.module), self.method)(self.module, *inputs, **named)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's output, differentiable through what the gates let through."""
        for gate in self.gates:
            gate.follow()
        run = self.original if self.untouched(*inputs) else self.gated
        return of_this_set(run(*inputs, **named), self.gates)

    def untouched(self, *inputs: Any) -> bool:
        """Whether the module runs as ever on these inputs."""
        return all(gate.open for gate in self.gates)

    def gated(self, *inputs: Any, **named: Any) -> Any:
        """The same while some units are frozen."""
        raise NotImplementedError

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """What runs of an operation, with the gates as they stand; all of it if not said otherwise.

        Args:
            operation: Of the module's own forward, or with a weight of its own.
            executed: What runs, padding included; else what the active set needs.
        """
        return WHOLE


def of_this_set(result: Any, gates: Sequence[Gate]) -> Any:
    """What a module put out; its backward pass refuses another active set.

    Args:
        result: A tensor or a tuple that has some.
        gates: Those that it depends on.

    Raises:
        RuntimeError: In the backward pass, if a gate's set is not that of the forward pass.
    """
    versions = [gate.version for gate in gates]

    def check(_: Any) -> None:
        if [gate.version for gate in gates] != versions:
            raise RuntimeError(
                "the active set changed between a forward pass and its backward pass: select and "
                "set_active before the forward pass"
            )

    for tensor in result if isinstance(result, tuple) else (result,):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(check)
    return result


class Compact:
    """A way back for the gradient of a part of a tensor's last axis, or of a map's channels.

    A gated product gives its consumer the values of all units, and beside them a stand-in of shape
    (..., k), or (N, k, H, W), for the k active columns. A consumer that knows hands its gradient to
    the stand-in, and no gradient of frozen columns is ever formed; any other code differentiates
    the values as usual.

    Attributes:
        stand_in: Of k columns, without memory or meaningful values.
        index: Which columns.
        version: Of the values when the stand-in was made; in-place work on them makes it void.
    """

    def __init__(self, stand_in: Tensor, index: Index, version: int) -> None:
        self.stand_in, self.index, self.version = stand_in, index, version


def with_compact(values: Tensor, stand_in: Tensor | None, index: Index) -> Tensor:
    """Note the stand-in on the values."""
    if stand_in is not None:
        values._compact = Compact(stand_in, index, values._version)  # type: ignore[attr-defined]
    return values


def note_of(values: Tensor) -> Compact | None:
    """What is noted on a tensor, if it still holds."""
    note: Compact | None = getattr(values, "_compact", None)
    return note if note is not None and note.version == values._version else None


def compact_of(values: Tensor, index: Index) -> Tensor | None:
    """The stand-in for some columns of a tensor, if it has one."""
    note = note_of(values)
    return note.stand_in if note is not None and note.index is index else None


def stand_in(values: Tensor, count: int, dim: int = -1) -> Tensor:
    """Values' shape with ``count`` along an axis, for autograd to hang a gradient on.

    NaN, so that nobody computes with it.
    """
    shape = list(values.shape)
    shape[dim] = count
    return values.new_full((), float("nan")).expand(shape)


def gathered(dense: Tensor | None, compact: Tensor | None, index: Index) -> Tensor | None:
    """The gradient of some columns (N, k), from that of the values, of the stand-in, or both."""
    part = None if dense is None else rows_of(take(dense, index, dense.dim() - 1))
    if compact is None:
        return part
    compact = rows_of(compact)
    return compact if part is None else part + compact


def rows_of(x: Tensor) -> Tensor:
    """(..., k) to (N, k), also where k is 0 or there is no batch."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2)
