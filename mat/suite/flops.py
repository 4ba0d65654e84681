"""The FLOPs ledger: what a step costs by formula, in the paper's columns (paper sections 4 and 5).

Two FLOPs per multiply-add; matrix products and convolutions only. The paper's figure is the sum of four columns:
forward, input gradient, weight gradient, overhead (estimator). Input embeddings cost no products; the tied vocabulary
projection has a column of its own and is left out of the figure. Evaluation is not counted. Recomputation inside
attention kernels is not counted: the backward of attention is two times its forward.

``flop_counter`` gives torch's counter with the attention formulas that it lacks; tests hold the ledger against it.
"""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mat import gram
from mat.suite import ntk
from mat.suite.interface import Flops, UnitModel
from mat.suite.units import UnitLayer, unit_layers


def training_step(model: UnitModel, batch: Any, padded: bool = True, accumulation: int = 1) -> Flops:
    """FLOPs of one training step with the gates as they stand.

    Args:
        model: The model.
        batch: The step's batch.
        padded: Count what runs (executed); else what the active set needs, without padding.
        accumulation: Micro-batches that the step is computed in; in each an expert's slots are rounded up.
    """
    total = Flops()
    for part in [batch] if accumulation == 1 else batch.split(accumulation):
        total += model.rest_flops(part)
        for layer in unit_layers(model):
            total += layer.step_flops(part.samples, part.length, layer.n_active, layer.mode, padded)
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
    samples, length = batch.samples, batch.length
    rest = model.rest_flops(batch)
    passes = {"random": projections, "full": model.outputs_per_sample(batch)}.get(reduction, 1)
    forward = backward = rest.forward  # matrix products: an input gradient costs what the forward does
    reached = False
    for layer in unit_layers(model):
        up, down = layer.probe_flops(samples, length, first=layer is gated[0])
        forward += up
        reached |= layer is gated[0]
        backward += down if reached else 0
    overhead = forward + passes * backward + kernels(gated, samples * passes, length, memory_bytes)
    return Flops(overhead=overhead, vocabulary=rest.vocabulary // 3 * (1 + passes))


def kernels(gated: list[UnitLayer], rows: int, length: int, memory_bytes: int) -> int:
    """FLOPs of all units' kernels of so many rows and of their top eigenvalues; an online estimate adds these alone."""
    total = ntk.eigenvalue_flops(sum(layer.n_units for layer in gated), rows)
    for layer in gated:
        for tap in layer.tap_shapes(length):
            routed = gram.routed_flops(rows, rows * tap[0], *tap[1:])
            total += routed if layer.routed else gram.unit_flops(rows, *tap, memory_bytes)
    return total


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
