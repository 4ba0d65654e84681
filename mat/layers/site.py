"""A site: one module that runs differently while some units are frozen.

Attaching sets ``module.forward`` on the instance. Class, name, parameters, hooks and state dict of
the module stay as they are, and so does its forward while all units are active.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mat.layers.gate import Gate, Index, take


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

    @torch.compiler.disable
    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The module's output, differentiable through what the gates let through."""
        if all(gate.open for gate in self.gates):
            return self.original(*inputs, **named)
        return self.gated(*inputs, **named)

    def gated(self, *inputs: Any, **named: Any) -> Any:
        """The same while some units are frozen."""
        raise NotImplementedError


class Compact:
    """A way back for the gradient of a part of a tensor's last axis, or of a map's channels.

    A gated product gives its consumer the values of all units, and beside them a stand-in of shape
    (..., k), or (N, k, H, W), for the k active columns. A consumer that knows hands its gradient to the stand-in, and
    no gradient of frozen columns is ever formed; any other code differentiates the values as usual.

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
    part = None if dense is None else take(dense, index, dense.dim() - 1).flatten(0, -2)
    if compact is None:
        return part
    compact = compact.flatten(0, -2)
    return compact if part is None else part + compact
