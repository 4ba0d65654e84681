"""The tape: records what every measured weight multiplies, and waits for the output's gradient.

It hooks ``nn.Linear`` and ``nn.Conv2d``. Layers of experts bring a recording of their own
(``mat.units.UnitLayer``); any other module that computes its products itself has a recorder, see
:func:`recorder`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mat.products import (
    ROUTED,
    Group,
    Layout,
    Product,
    Tap,
    convolution,
    groups_of,
)
from mat.units import Part, Units

Recorder = Callable[[nn.Module], Callable[..., Any] | None]
RECORDERS: list[Recorder] = []


def recorder(function: Recorder) -> Recorder:
    """Register a recorder: shown a module, it gives what runs in its place while a tape records.

    It returns None for a module that it does not know, else ``forward(tape, *inputs, **named)``,
    which has the module's inputs and outputs, is differentiable in inputs and parameters, and hands
    its products to :meth:`Tape.product`. Nothing below the module is hooked.
    """
    RECORDERS.append(function)
    return function


@dataclass(frozen=True)
class _Share:
    """What the units of a layer own of a parameter; unit 0 is row ``first`` of the table."""

    part: Part
    first: int
    kind: str


class _Start(torch.autograd.Function):
    """Gives a tensor outside the graph a place in it, without a copy."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Tape:
    """Records the products of all units of a model while it is entered.

    Args:
        model: The model.
        units: The units; what of them has ``requires_grad`` off is left out.
        on_gradient: Called with a tap whenever a backward pass has brought it a gradient.

    Attributes:
        samples: n of the batch in hand.
        recording: Whether there are to be taps.
        taps: Of the last forward pass, in its order.
        anchor: What backward passes are taken to, so that no parameter gets a gradient.
        constants: Variance and mean of every use of every batch norm, see ``mat.recorders``.

    Raises:
        ValueError: If nothing is left to measure, the units are another model's, or a parameter
            belongs to a module of a kind that has no record.
    """

    def __init__(
        self, model: nn.Module, units: Units, on_gradient: Callable[[Tap], None] | None = None
    ) -> None:
        self.model, self.on_gradient = model, on_gradient
        self.samples, self.recording = 0, True
        self.taps: list[Tap] = []
        self.constants: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.device = next(model.parameters()).device
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        # Only there can a tensor (n, n, q) be meant either way.
        self._sequence_first = any(
            getattr(m, "batch_first", True) is False for m in model.modules()
        )
        self._shares = _shares(model, units)  # by id of the parameter
        self._recordings = {  # by path: first row, and what runs in place of the forward
            layer.recording[0]: (rows.start, layer.recording[1])
            for layer, rows in units.slices()
            if layer.recording is not None
        }
        self._homes: dict[int, set[int]] = {}  # ids of the modules that have a parameter
        for module in model.modules():
            for parameter in module._parameters.values():
                self._homes.setdefault(id(parameter), set()).add(id(module))
        self._calls: dict[int, int] = {}
        self._met: set[int] = set()
        # By id of the weight, and first row or number of the expert.
        self._products: dict[tuple[int, int], Product] = {}
        self._hooks: list[Any] = []
        self._forwards: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> "Tape":
        below: set[int] = set()  # ids of modules that a recorder answers for
        try:
            for path, module in self.model.named_modules():
                if id(module) in below:
                    continue
                forward = self._recorded(path, module)
                if forward is not None:
                    below |= set(map(id, module.modules()))
                    self._forwards.append((module, module.__dict__.get("forward")))
                    module.forward = forward
                else:
                    self._hook(path, module)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, forward in self._forwards:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._hooks, self._forwards = [], []

    def begin(self, samples: int) -> None:
        """Forget the taps: a forward pass of n samples follows."""
        self.samples, self.taps, self._calls = samples, [], {}
        self._met.clear()

    def check(self) -> None:
        """Refuse a forward pass that missed a product.

        Raises:
            ValueError: Names the parameter.
        """
        for key, share in self._shares.items():
            if key not in self._met:
                raise ValueError(
                    f"{share.part.parameter} met no input that is differentiated: does the forward "
                    "pass call its module?"
                )

    def call_number(self, module: nn.Module) -> int:
        """How often a module has run before in this forward pass; counts the call."""
        number = self._calls.get(id(module), 0)
        self._calls[id(module)] = number + 1
        return number

    def product(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        path: str,
        layout: Layout | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """Record ``y = F.linear(x, weight, bias)``, or what a layout makes one.

        Args:
            x: Input (..., q).
            y: Output (..., p).
            weight: A parameter of the model (p, q); (p,) where x is 1.
            bias: A parameter of the model (p,), or None.
            path: What messages call it.
            layout: Rows by sample (n, ..., .), (T, n, .) or (n T, .) when None.
            rows: Which rows of weight and bias the product has; units must own rows then.

        Returns:
            The output to go on with.
        """
        if layout is None:
            arrange = partial(self._by_sample, path)
            layout = Layout(arrange, arrange)
        of_weight, of_bias = self._shares.get(id(weight)), self._shares.get(id(bias))
        both = (
            of_weight is not None
            and of_bias is not None
            and of_weight.part.dim == 0
            and of_weight.first == of_bias.first
            and np.array_equal(of_weight.part.owner, of_bias.part.owner)
            and self._homes[id(weight)] == self._homes[id(bias)]
        )
        if of_weight is not None:
            y = self._tap(self._product(path, weight, of_weight, both, rows), x, y, layout)
            self._met |= {id(weight), id(bias)} if both else {id(weight)}
        if bias is not None and of_bias is not None and not both:
            ones = torch.ones_like(y.detach().narrow(layout.channel, 0, 1))
            product = self._product(path, bias, of_bias, False, rows)
            y = self._tap(product, ones, y, Layout(layout.outputs, layout.outputs, layout.channel))
            self._met.add(id(bias))
        return y

    def _experts(
        self, path: str, module: nn.Module, first: int, recording: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What runs in place of a layer of experts, unit 0 being row ``first`` of the table."""

        def forward(*inputs: Any, **named: Any) -> Any:
            self._met |= set(map(id, module.parameters()))  # some experts may have no token
            tokens = inputs[0].numel() // inputs[0].shape[-1]  # N

            def record(
                weight: str, bias: str | None, unit: int, x: Tensor, y: Tensor, token: Tensor
            ) -> Tensor:
                key = id(module.get_parameter(weight)), unit
                if key[0] not in self._shares:
                    return y
                if key not in self._products:
                    own = bias is not None and id(module.get_parameter(bias)) in self._shares
                    groups = [Group(slice(first + unit, first + unit + 1), slice(0), 1, y.shape[1])]
                    shared = x.shape[1]
                    self._products[key] = Product(path, groups, False, shared, own, routed=True)
                if any(tap.product is self._products[key] for tap in self.taps):
                    raise ValueError(f"{path} can be measured if a forward pass uses it once")
                sample = token // (tokens // self.samples)
                sizes = torch.bincount(sample, minlength=self.samples)
                return self._tap(self._products[key], x, y, ROUTED, sizes[None])

            return recording(module, record, *inputs, **named)

        return forward

    def _recorded(self, path: str, module: nn.Module) -> Callable[..., Any] | None:
        """What runs in a module's place, if its kind wants that."""
        if path in self._recordings:
            return self._experts(path, module, *self._recordings[path])
        measured = any(id(parameter) in self._shares for parameter in module.parameters())
        if measured or isinstance(module, _BatchNorm):
            for known in RECORDERS:
                forward = known(module)
                if forward is not None:
                    return partial(forward, self)
        return None

    def _hook(self, path: str, module: nn.Module) -> None:
        """Record a module's product whenever it runs."""
        own = [self._shares[id(p)] for p in module._parameters.values() if id(p) in self._shares]
        if not own:
            return
        conv = isinstance(module, nn.Conv2d) and module.groups == 1
        if not (conv or isinstance(module, nn.Linear)) or own[0].kind == "experts":
            raise ValueError(
                f"{own[0].part.parameter} cannot be measured: its module, a "
                f"{type(module).__name__}, has no recorder (mat.taps.recorder)"
            )
        layout = convolution(module) if isinstance(module, nn.Conv2d) else None

        def hook(layer: Any, inputs: Any, named: Any, y: Tensor) -> Tensor:
            x = inputs[0] if inputs else named["input"]
            return self.product(x, y, layer.weight, layer.bias, path, layout)

        self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _product(
        self, path: str, weight: Tensor, share: _Share, bias: bool, rows: slice
    ) -> Product:
        """The product of a parameter; all layers that share the parameter share it."""
        key = id(weight), rows.start or 0
        if key not in self._products:
            columns, owner = share.part.dim == 1, share.part.owner
            if columns:
                owner = owner.repeat(weight[0, 0].numel())  # the numbers of a kernel of a channel
            groups = groups_of(owner if columns else owner[rows], share.first, self.device)
            shared = len(weight) if columns else weight[0].numel()
            self._products[key] = Product(path, groups, columns, shared, bias)
        return self._products[key]

    def _tap(
        self, product: Product, x: Tensor, y: Tensor, layout: Layout, sizes: Tensor | None = None
    ) -> Tensor:
        """Keep the input, and wait for the gradient of the output."""
        recomputed = torch._C._current_graph_task_id() != -1  # by gradient checkpointing
        if recomputed or not self.recording or not torch.is_grad_enabled():
            return y
        if not y.requires_grad:
            y = _Start.apply(self.anchor, y.detach())
        positions = y.numel() // y.shape[layout.channel]
        tap = Tap(product, layout, self.samples, positions, x.detach(), sizes)
        # In-place work on a view leaves its place in the graph, but not that of its base.
        base = y._base if y._base is not None and y._base.numel() == y.numel() else y
        base.register_hook(partial(self._arrive, tap, y.shape))  # type: ignore[no-untyped-call]
        self.taps.append(tap)
        return y

    def _arrive(self, tap: Tap, shape: torch.Size, gradient: Tensor) -> None:
        tap.gradients.append(gradient.view(shape))
        if self.on_gradient is not None:
            self.on_gradient(tap)

    def _by_sample(self, path: str, rows: Tensor, n: int) -> Tensor:
        """(n, ..., q), (T, n, q) or (n T, q) to (n, T, q)."""
        lead, width = rows.shape[:-1], rows.shape[-1]
        second = len(lead) > 1 and lead[1] == n > 1
        if lead[0] % n == 0 and not second:
            return rows.reshape(n, -1, width)
        if lead[0] == n and not self._sequence_first:
            return rows.reshape(n, -1, width)
        if second and (lead[0] % n or (self._sequence_first and lead[0] != n)):
            return rows.transpose(0, 1).reshape(n, -1, width)
        raise ValueError(
            f"{path} has a tensor of shape {tuple(rows.shape)}, in which {n} samples cannot be "
            "told apart: give their number (samples=), or take another"
        )


def _shares(model: nn.Module, units: Units) -> dict[int, _Share]:
    """What units own of the parameters that train, by id of the parameter."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shares: dict[int, _Share] = {}
    for layer, rows in units.slices():
        for part in layer.parts:
            if part.parameter not in parameters:
                raise ValueError(f"the units are another model's: this has no {part.parameter}")
            parameter = parameters[part.parameter]
            if parameter.requires_grad:
                shares[id(parameter)] = _Share(part, rows.start, layer.kind)
    if not shares:
        raise ValueError("there is no unit to measure: none is given that has a parameter to train")
    return shares
