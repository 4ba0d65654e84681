"""The FLOPs ledger: what a step costs by formula, in the paper's columns (paper sections 4 and 5).

Two FLOPs per multiply-add; matrix products and convolutions only. The paper's figure is the sum of four columns:
forward, input gradient, weight gradient, overhead (estimator). Input embeddings cost no products; the tied vocabulary
projection has a column of its own and is left out of the figure. Evaluation is not counted. Recomputation inside
attention kernels is not counted: the backward of attention is two times its forward.

``flop_counter`` gives torch's counter with the attention formulas that it lacks; tests hold the ledger against it.
"""

from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mat import ntk
from mat.interface import UnitModel
from mat.units import BackwardMode, UnitLayer, unit_layers


@dataclass(frozen=True)
class Flops:
    """FLOPs by column; ``vocabulary`` is outside the paper's figure."""

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


def layer_step(layer: UnitLayer, tokens: int, length: int, n_active: int, mode: BackwardMode) -> Flops:
    """A training step's FLOPs of one unit layer.

    Args:
        layer: The layer.
        tokens: Tokens in the batch.
        length: Tokens per sequence.
        n_active: Units that are back-propagated.
        mode: Backward mode.

    Returns:
        FLOPs by column.
    """
    products = sum(2 * tokens * p * q for p, q, _ in layer.product_shapes())
    inner = layer.inner_flops(tokens, length)
    propagated = n_active if mode == "cut" else layer.n_units
    return Flops(
        forward=layer.n_units * (products + inner),
        input_grad=propagated * (products + 2 * inner),
        weight_grad=n_active * products,
    )


def training_step(model: UnitModel, batch: Any) -> Flops:
    """FLOPs of one training step with the gates as they stand."""
    tokens, length = batch.tokens.numel(), batch.tokens.shape[1]
    head, vocabulary = model.head_flops(batch)
    total = Flops(forward=head, input_grad=head, weight_grad=head, vocabulary=3 * vocabulary)
    for layer in unit_layers(model):
        total += layer_step(layer, tokens, length, layer.n_active, layer.mode)
    return total


def estimate(
    model: UnitModel, batch: Any, gated: list[UnitLayer], reduction: ntk.Reduction, projections: int, memory_bytes: int
) -> Flops:
    """FLOPs of one call of the estimator, all of them overhead but for the vocabulary projection.

    Args:
        model: The model.
        batch: The probe.
        gated: Layers whose units are measured, in forward order.
        reduction: The estimator's reduction.
        projections: m, for ``random``.
        memory_bytes: The estimator's memory bound (it decides the contraction's chunks).

    Returns:
        FLOPs with columns overhead and vocabulary.
    """
    tokens, length, samples = batch.tokens.numel(), batch.tokens.shape[1], batch.samples
    head, vocabulary = model.head_flops(batch)
    passes = {"random": projections, "full": model.outputs_per_sample(batch)}.get(reduction, 1)
    forward, backward, reached = head, head, False
    for layer in unit_layers(model):
        step = layer_step(layer, tokens, length, layer.n_units, "cut")
        forward += step.forward
        reached |= layer is gated[0]
        backward += step.input_grad if reached else 0
    p, q, _ = gated[0].product_shapes()[0]  # nothing before the first product wants a gradient
    backward -= gated[0].n_units * 2 * tokens * p * q
    taps = [(length, layer.n_units, *shape) for layer in gated for shape in layer.product_shapes()]
    overhead = forward + passes * backward + ntk.flops(taps, samples * passes, memory_bytes)
    return Flops(overhead=overhead, vocabulary=vocabulary * (1 + passes))


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * _attention_flops(query, key, value)


def _batched_flops(accumulator: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * a[2] * b[2])


def flop_counter() -> FlopCounterMode:
    """The FLOPs counter of torch, with formulas for kernels it does not know or counts with recomputation."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.baddbmm_: _batched_flops,
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
            aten._scaled_dot_product_flash_attention_backward: _attention_backward_flops,
            aten._scaled_dot_product_efficient_attention_backward: _attention_backward_flops,
            aten._scaled_dot_product_cudnn_attention_backward: _attention_backward_flops,
        },
    )
