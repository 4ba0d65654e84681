"""VGG with batch norm, unit-major: filters with their bias and batch-norm affine pair are the units (paper section 5).

The features equal ``torchvision.models.vgg16_bn`` given the same weights (``load_torchvision``, ``to_torchvision``);
one linear classifier follows. A stage ends in a 2 x 2 max pool, which is left out where the map is 1 x 1 already,
so that images of any size go in: 32 x 32 ends at 1 x 1, and so does 8 x 8 from the third stage on.

Without residual connections ``cut`` starves the lower layers, so VGG trains in ``exact``. Both modes run the dense
forward; frozen filters normalise with the batch and keep updating running statistics.

Shapes: N images, C filters, I input channels, S x S maps, P channels that carry a gradient (padding included).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.suite.config import HardwareConfig, VggConfig
from mat.suite.interface import Batch, Flops, UnitModel
from mat.suite.units import BackwardMode, UnitLayer, UnitTensors

EPS, MOMENTUM = 1e-5, 0.1  # of batch norm
TORCHVISION = {  # our tensors of a layer: which of its modules there has them (convolution, batch norm, ReLU), as what
    "weight": (0, "weight"), "bias": (0, "bias"),
    "gain": (1, "weight"), "shift": (1, "bias"), "mean": (1, "running_mean"), "variance": (1, "running_var"),
}  # fmt: skip


@dataclass(frozen=True)
class Maps:
    """What flows between filter layers.

    Attributes:
        values: (N, C, S, S).
        carrier: The tensor that gradients flow back through: ``values``, or a stand-in (N, P, S, S) without memory
            or meaningful values for some channels, so that the gradients of the others are never formed.
        channels: (P,) the stand-in's channels; None when ``carrier`` is ``values``.
    """

    values: Tensor
    carrier: Tensor
    channels: Tensor | None = None

    def joined(self) -> Tensor:
        """The values as one differentiable tensor."""
        if self.channels is None:
            return self.values
        joined: Tensor = _Join.apply(self.carrier, self.values, self.channels)
        return joined


class FilterLayer(UnitLayer):
    """Convolution, batch norm, ReLU and perhaps a max pool, whose units are filters.

    Args:
        below: The layer that feeds this one, or the number of image channels I.
        filters: C.
        size: S of the input maps.
        pool: Whether a 2 x 2 max pool follows.
        block: Gathered channels are padded to multiples of this.
        gather: Largest share of the channels, padding included, that is gathered; beyond it the backward is dense.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    gain: nn.Parameter
    shift: nn.Parameter
    mean: Tensor
    variance: Tensor

    def __init__(self, below: "FilterLayer | int", filters: int, size: int, pool: bool, block: int, gather: float):
        super().__init__("filters", filters)
        inputs = below if isinstance(below, int) else below.n_units
        weight = nn.init.kaiming_normal_(torch.empty(filters, inputs, 3, 3), mode="fan_out", nonlinearity="relu")
        self.add_unit_parameter("weight", _channels_last(weight).contiguous())  # (C, 3, 3, I)
        self.add_unit_parameter("bias", torch.zeros(filters))
        self.add_unit_parameter("gain", torch.ones(filters))
        self.add_unit_parameter("shift", torch.zeros(filters))
        self.register_buffer("mean", torch.zeros(filters))
        self.register_buffer("variance", torch.ones(filters))
        self.products = {"weight": "bias", "affine": None}
        self.size, self.pool, self.block, self.gather = size, pool, block, gather
        # In tuples: neighbours are no submodules.
        self._below: tuple[FilterLayer, ...] = () if isinstance(below, int) else (below,)
        self._above: tuple[FilterLayer, ...] = ()
        for layer in self._below:
            layer._above = (self,)

    def compute(self, x: Maps, w: UnitTensors) -> Maps:
        """All filters with a dense gradient, or the estimator's pass."""
        if self.tape is not None:
            return self._recorded(x.values)
        if x.channels is None:
            z = F.conv2d(x.values, _channels_first(w["weight"]), w["bias"], padding=1)
        else:
            z = _Convolution.apply(x.carrier, w["weight"], w["bias"], self, x, None, None)[0]
        y = self.activated(z, w["gain"], w["shift"], self.mean, self.variance)
        return Maps(y, y)

    def gated(self, x: Maps) -> Maps:
        """One dense forward, and a backward by the mode."""
        return self._exact(x) if self.mode == "exact" else self._cut(x)

    def _exact(self, x: Maps) -> Maps:
        """Dense gradients but for the weights of frozen filters."""
        weight, bias, gain, shift = self._leaves()
        z = _Convolution.apply(x.carrier, weight, bias, self, x, None, None)[0]
        gains, shifts = self.gain.detach(), self.shift.detach()
        if gain is not None and shift is not None:
            active = self.active_index(z.device)
            gains, shifts = gains.index_copy(0, active, gain), shifts.index_copy(0, active, shift)
        y = self.activated(z, gains, shifts, self.mean, self.variance)
        return Maps(y, y)

    def _cut(self, x: Maps) -> Maps:
        """The active filters pass the gradient on; those that padding adds to them pass on zeros."""
        weight, bias, gain, shift = self._leaves()
        active, frozen = self.active_index(self.weight.device), self.frozen_index(self.weight.device)
        scale = torch.zeros_like(self.gain.detach()).index_fill_(0, active, 1.0)
        rows, count = None, self.carrying()
        if count < self.n_units:
            rows = torch.cat([active, frozen[: count - len(active)]])
            scale = scale[rows]
        z, carrier = _Convolution.apply(x.carrier, weight, bias, self, x, rows, scale)
        y, carrier = _Activation.apply(z if rows is None else carrier, gain, shift, self, z, rows)
        return Maps(y, y if rows is None else carrier, rows)

    def _leaves(self) -> list[Tensor | None]:
        return [*self.active_leaves()] if self.n_active else [None] * 4

    def padded(self, count: int) -> int:
        """Channels that a backward over ``count`` of them runs: whole blocks, or all where gathering does not pay."""
        padded = -(-count // self.block) * self.block
        return padded if padded <= self.gather * self.n_units else self.n_units

    def activated(self, z: Tensor, gain: Tensor, shift: Tensor, mean: Tensor | None, variance: Tensor | None) -> Tensor:
        """Batch norm, ReLU and pool; running statistics (if given) move in training."""
        training = self.training or mean is None
        y = F.batch_norm(z, mean, variance, gain, shift, training, MOMENTUM, EPS)
        return self._rectified(y)

    def _rectified(self, y: Tensor) -> Tensor:
        y = F.relu(y, inplace=True)
        return F.max_pool2d(y, 2) if self.pool else y

    def _recorded(self, x: Tensor) -> Maps:
        """The estimator's pass: statistics of the probe, held fixed (paper section 5, batch norm)."""
        assert self.tape is not None
        if self.training:
            raise ValueError("batch norm couples the samples of a training step: measure filters by ntk.estimate")
        z = F.conv2d(x, _channels_first(self.weight), self.bias, padding=1)
        positions = z.flatten(2).transpose(1, 2).unsqueeze(3)  # (n, T, C, 1)
        recorded = self.tap("weight", x, True, positions)
        z = recorded.squeeze(3).transpose(1, 2).view(z.shape)
        if id(self) not in self.tape.constants:
            self.tape.constants[id(self)] = torch.var_mean(z.detach().to(self.gain.dtype), (0, 2, 3), correction=0)
        variance, mean = self.tape.constants[id(self)]
        normal = F.batch_norm(z, mean, variance, None, None, False, 0.0, EPS)
        # Every sample has a copy of the affine pair, whose gradient is the sample's: a product with 1.
        pair = torch.stack([self.gain, self.shift], 1).to(z.dtype).expand(len(x), 1, -1, -1)  # (n, 1, C, 2)
        pair = self.tap("affine", x.new_ones(len(x), 1, 1), True, pair.clone())
        gain, shift = pair.transpose(1, 2).unsqueeze(4).unbind(3)  # (n, C, 1, 1) each
        y = self._rectified(torch.addcmul(shift, normal, gain))
        return Maps(y, y)

    # --- the ledger

    @property
    def _wants_gradient(self) -> bool:
        """Whether a gradient of the output would be of use here or below."""
        passes_on = self.mode != "cut" and any(layer._wants_gradient for layer in self._below)
        return self.n_active > 0 or passes_on

    @property
    def _reached(self) -> bool:
        """Whether the layers above pass a gradient on."""
        return all((layer.n_active > 0 or layer.mode != "cut") and layer._reached for layer in self._above)

    def carrying(self, padded: bool = True) -> int:
        """Number of filters whose gradient is formed, with the gate as it stands."""
        n, units = self.n_active, self.n_units
        if n == units or self.mode == "exact":
            return units
        return self.padded(n) if padded else n

    def step_flops(self, samples: int, length: int, n_active: int, mode: BackwardMode, padded: bool = True) -> Flops:
        """See :meth:`UnitLayer.step_flops`; the layers above and below count with their gates as they stand."""
        position = 2 * samples * self.size**2 * 9  # FLOPs per input channel and filter
        inputs = self.weight.shape[3]
        forward = position * self.n_units * inputs
        if not self._reached:
            return Flops(forward=forward)
        rows = n_active if not padded or n_active in (0, self.n_units) else self.padded(n_active)
        below = sum(layer.carrying(padded) for layer in self._below if layer._wants_gradient)
        passed = self.carrying(padded) if self._wants_gradient else 0
        return Flops(forward, position * passed * below, position * rows * inputs)

    def tap_shapes(self, length: int) -> list[tuple[int, int, int, int, bool]]:
        """The convolution with its bias, and the affine pair."""
        return [(self.size**2, self.n_units, 1, 9 * self.weight.shape[3], True), (1, self.n_units, 2, 1, False)]

    def unfold(self, weight: str, factor: Tensor) -> Tensor:
        """Input maps (n, I, S, S) to what every filter sees at every position, (n, T, 9 I)."""
        return F.unfold(factor, 3, padding=1).transpose(1, 2) if weight == "weight" else factor

    def probe_flops(self, samples: int, length: int, first: bool) -> tuple[int, int]:
        """See :meth:`UnitLayer.probe_flops`."""
        forward = 2 * samples * self.size**2 * self.weight.numel()
        return forward, 0 if first else forward


class _Convolution(torch.autograd.Function):
    """All filters forward; backward with no product of a frozen filter that nobody asked for.

    Inputs: carrier of x; weight and bias of the active filters (None if there are none); layer; x; the P rows that
    carry and their factors, both None for a dense gradient. Outputs: z (N, C, S, S), and a carrier if there are rows.
    """

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, weight: Tensor | None, bias: Tensor | None, layer: FilterLayer, x: Maps,
        rows: Tensor | None, scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        z = F.conv2d(x.values, _channels_first(layer.weight), layer.bias, padding=1)
        ctx.layer, ctx.shape, ctx.channels, ctx.rows, ctx.scale = layer, x.carrier.shape, x.channels, rows, scale
        ctx.save_for_backward(None if weight is None else x.values.to(z.dtype))
        ctx.set_materialize_grads(False)
        if rows is None:
            return z, None
        ctx.mark_non_differentiable(z)
        return z, _stand_in(z, rows)

    @staticmethod
    def backward(ctx: Any, dense: Tensor | None, compact: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,), layer, rows = ctx.saved_tensors, ctx.layer, ctx.rows
        g = dense if rows is None else compact
        assert g is not None
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            w = layer.weight.detach() if rows is None else layer.weight.detach().index_select(0, rows)
            w = w if ctx.channels is None else _gather(w, ctx.channels)
            w = w if ctx.scale is None else w * ctx.scale.view(-1, 1, 1, 1)
            like = torch.empty(ctx.shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
            d_x = _convolution_backward(g, like, _channels_first(w.to(g.dtype)), True)[0]
        if x is not None:
            d_weight, d_bias = _Convolution.weight_gradient(layer, x, g, rows is not None)
        return d_x, d_weight, d_bias, None, None, None, None

    @staticmethod
    def weight_gradient(layer: FilterLayer, x: Tensor, g: Tensor, compact: bool) -> tuple[Tensor, Tensor]:
        """Gradients of the active filters' weights (n_active, 3, 3, I) and biases."""
        n, count = layer.n_active, layer.padded(layer.n_active)
        kept: slice | Tensor = slice(n)
        active = layer.active_index(g.device) if n < layer.n_units else None
        if compact:
            g = g[:, :count]  # the active filters come first
        elif active is not None and count < layer.n_units:
            rows = torch.cat([active, active[:1].expand(count - n)])
            g = _channels_first(_gather(_channels_last(g), rows))
        elif active is not None:
            kept = active
        like = _channels_first(torch.empty_like(layer.weight[: g.shape[1]], dtype=g.dtype))
        _, d_weight, d_bias = _convolution_backward(g, x, like, False)
        return _channels_last(d_weight)[kept], d_bias[kept]


class _Activation(torch.autograd.Function):
    """Batch norm, ReLU and pool of all filters; backward for the P rows, by running them again.

    Inputs: carrier of z; gain and shift of the active filters; layer; z; rows (None: all of z).
    """

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, gain: Tensor | None, shift: Tensor | None, layer: FilterLayer, z: Tensor,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.layer, ctx.rows = layer, rows
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z if rows is None else _channels_first(_gather(_channels_last(z), rows)))
        y = layer.activated(z, layer.gain, layer.shift, layer.mean, layer.variance)
        if rows is None:
            return y, None
        ctx.mark_non_differentiable(y)
        return y, _stand_in(y, rows)

    @staticmethod
    def backward(ctx: Any, dense: Tensor | None, compact: Tensor | None) -> tuple[Tensor | None, ...]:
        (z,), layer, rows = ctx.saved_tensors, ctx.layer, ctx.rows
        fixed = (layer.gain, layer.shift, *([None, None] if layer.training else [layer.mean, layer.variance]))
        gain, shift, *statistics = (t if t is None or rows is None else t.detach()[rows] for t in fixed)
        leaves = [t.detach().requires_grad_() for t in (z, gain, shift)]
        with torch.enable_grad():
            y = layer.activated(*leaves, *statistics)
        d_z, d_gain, d_shift = torch.autograd.grad(y, leaves, dense if rows is None else compact)
        if not layer.n_active:
            return d_z, None, None, None, None, None
        kept = slice(layer.n_active) if rows is not None else layer.active_index(z.device)
        return d_z, d_gain[kept], d_shift[kept], None, None, None


class _Join(torch.autograd.Function):
    """The values of maps whose gradient some channels carry."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, values: Tensor, channels: Tensor) -> Tensor:
        ctx.channels = channels
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient[:, ctx.channels], None, None


def _channels_last(maps: Tensor) -> Tensor:
    """(N, C, S, S) as (N, S, S, C): a view, contiguous as maps lie in memory."""
    return maps.permute(0, 2, 3, 1)


def _channels_first(stored: Tensor) -> Tensor:
    """(N, S, S, C) as (N, C, S, S), and weights as they are stored (C, 3, 3, I) as (C, I, 3, 3): a view."""
    return stored.permute(0, 3, 1, 2)


def _gather(stored: Tensor, channels: Tensor) -> Tensor:
    """Some channels of the last axis."""
    return torch.gather(stored, 3, channels.expand(*stored.shape[:3], -1))


def _stand_in(values: Tensor, rows: Tensor) -> Tensor:
    """A shape for autograd to hang a gradient of some channels on; NaN, so that nobody computes with it."""
    return values.new_full((1, 1, 1, 1), float("nan")).expand(len(values), len(rows), *values.shape[2:])


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, for_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    mask = [True, False, False] if for_input else [False, True, True]
    one = [1, 1]
    found = torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], one, one, one, False, [0, 0], 1, mask)
    return cast(tuple[Tensor, Tensor, Tensor], found)


class Vgg(UnitModel):
    """Stages of filter layers and one linear classifier.

    Args:
        config: The model's configuration.
        classes: Number of classes.
        channels: Channels of the images.
        size: Their height and width.
        hardware: When the gates gather.
    """

    best_by = "accuracy"

    def __init__(self, config: VggConfig, classes: int, channels: int, size: int, hardware: HardwareConfig) -> None:
        super().__init__()
        below: FilterLayer | int = channels
        layers: list[FilterLayer] = []
        for stage in config.stages:
            for i, filters in enumerate(stage):
                pool = i == len(stage) - 1 and size > 1
                below = FilterLayer(below, filters, size, pool, hardware.gather_block, hardware.gather_share)
                layers.append(below)
            size = max(1, size // 2)
        self.stages = config.stages
        self.features = nn.ModuleList(layers)
        self.classifier = nn.Linear(layers[-1].n_units, classes)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def maps(self, images: Tensor) -> Tensor:
        """Images (N, channels, size, size) to the last stage's maps."""
        x = images.contiguous(memory_format=torch.channels_last)
        maps = Maps(x, x)
        for layer in self.features:
            maps = layer(maps)
        return maps.joined()

    def forward(self, batch: Batch) -> Tensor:
        """Logits (N, classes)."""
        return cast(Tensor, self.classifier(self.maps(batch.inputs).mean((2, 3))))

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy."""
        return {"accuracy": (outputs.argmax(1) == batch.targets).float().mean()}

    @torch.no_grad()
    def fix_constants(self, batches: Sequence[Batch]) -> None:
        """Statistics of all images at once: a layer's depend on how the layers below normalise."""
        self.maps(torch.cat([batch.inputs for batch in batches]))

    def rest_flops(self, batch: Batch) -> Flops:
        """The classifier; no input gradient if no filter wants one."""
        product = 2 * batch.samples * self.classifier.weight.numel()
        wanted = cast(FilterLayer, self.features[-1])._wants_gradient
        return Flops(forward=product, input_grad=wanted * product, weight_grad=product)

    def outputs_per_sample(self, batch: Batch) -> int:
        """Number of classes."""
        return self.classifier.out_features

    def _torchvision_names(self) -> dict[str, str]:
        """Our names of the features' tensors to torchvision's."""
        names: dict[str, str] = {}
        position = layer = 0
        for stage in self.stages:
            for _ in stage:
                for ours, (part, theirs) in TORCHVISION.items():
                    names[f"features.{layer}.{ours}"] = f"features.{position + part}.{theirs}"
                layer, position = layer + 1, position + 3
            position += 1  # the pool
        return names

    def to_torchvision(self) -> dict[str, Tensor]:
        """The features' weights and statistics under the names of ``torchvision.models.vgg16_bn``."""
        state = {ours: _channels_first(t) if t.dim() == 4 else t for ours, t in self.state_dict().items()}
        return {theirs: state[ours].clone() for ours, theirs in self._torchvision_names().items()}

    def load_torchvision(self, state: dict[str, Tensor]) -> None:
        """Take the features of a ``torchvision.models.vgg16_bn``; its classifier is left aside.

        Args:
            state: Its state dict.

        Raises:
            ValueError: If a key is missing or a shape differs.
        """
        own = {ours: _channels_first(t) if t.dim() == 4 else t for ours, t in self.state_dict().items()}
        for ours, theirs in self._torchvision_names().items():
            if theirs not in state or state[theirs].shape != own[ours].shape:
                raise ValueError(f"the state dict does not fit this model: {theirs} is missing or has another shape")
            own[ours].copy_(state[theirs])
