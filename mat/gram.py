"""Gram matrices of per-sample unit gradients, contracted the cheaper way and chunked under a memory bound.

For one weight of a unit layer the gradient of sample i and unit u is ``A[i, :, u].T @ B[i]`` with a per-unit factor A
(N, T, U, p) and a shared factor B (N, T, q) (see ``mat.units.Tap``). Two contractions give the same Gram matrices:

``gradients``  form the per-sample gradients, then multiply them: N U p q (T + N) multiply-adds;
``pairs``      contract token pairs without forming gradients: N² T² (U p + q + U) multiply-adds.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


ELEMENTWISE = 200  # matrix-product FLOPs that take as long as multiplying and adding up one token pair (measured)


@dataclass(frozen=True)
class Plan:
    """How one Gram contraction is computed.

    Attributes:
        contraction: The cheaper of the two.
        flops: Its matrix-product FLOPs, two per multiply-add.
        units: Units per chunk.
        rows: ``gradients``: rows of p per chunk. ``pairs``: samples per chunk.
    """

    contraction: Literal["gradients", "pairs"]
    flops: int
    units: int
    rows: int


def plan(samples: int, tokens: int, units: int, p: int, q: int, memory_bytes: int) -> Plan:
    """Choose the contraction by cost and the chunks by memory.

    Args:
        samples: N.
        tokens: T.
        units: U.
        p: Width of the per-unit factor.
        q: Width of the shared factor.
        memory_bytes: Bound on the matrices that a chunk forms; copies of the factors come beside it. At least one
            row or sample is always taken.

    Returns:
        The plan; its ``flops`` are what a FLOPs counter sees.
    """
    forming = 2 * samples * tokens * units * p * q
    products = 2 * samples * samples * units * p * q
    pairs = 2 * samples * samples * tokens * tokens * (units * p + q)
    elementwise = ELEMENTWISE * samples * samples * tokens * tokens * units  # no matrix product, so not in ``flops``
    if forming + products <= pairs + elementwise:
        row_bytes = samples * q * (4 + 4)  # a row of gradients in the factors' precision and in float32
        fit = max(1, memory_bytes // row_bytes)
        return Plan("gradients", forming + products, max(1, min(units, fit // p)), min(p, fit))
    sample_bytes = 4 * tokens * samples * tokens  # one sample's pairs, of the shared factor or of a unit
    chunk = max(1, min(samples, memory_bytes // (3 * sample_bytes)))
    unit_chunk = max(1, min(units, (memory_bytes // (sample_bytes * chunk) - 1) // 2))  # a unit's, and their products
    shared = 2 * samples * samples * tokens * tokens * q
    return Plan("pairs", pairs - shared + shared * -(-units // unit_chunk), unit_chunk, chunk)


def unit_gram(per_unit: Tensor, shared: Tensor, bias: bool, memory_bytes: int) -> Tensor:
    """Gram matrices of the per-sample gradients of one weight, and of its bias if it has one.

    Args:
        per_unit: A, (N, T, U, p).
        shared: B, (N, T, q).
        bias: Add the Gram matrices of A summed over tokens (the gradient of a bias (U, p)).
        memory_bytes: Bound on working memory.

    Returns:
        (U, N, N), float32 (float64 for float64 factors); products of gradients accumulate in that precision.
    """
    samples, tokens, units, p = per_unit.shape
    q = shared.shape[2]
    exact = torch.float64 if per_unit.dtype == torch.float64 else torch.float32
    gram = torch.zeros(units, samples, samples, dtype=exact, device=per_unit.device)
    chosen = plan(samples, tokens, units, p, q, memory_bytes)
    with torch.autocast(per_unit.device.type, enabled=False):
        if chosen.contraction == "gradients":
            _by_gradients(gram, per_unit, shared, chosen)
        else:
            _by_pairs(gram, per_unit, shared, chosen)
        if bias:
            summed = per_unit.sum(1, dtype=exact).transpose(0, 1)  # (U, N, p)
            gram.baddbmm_(summed, summed.transpose(1, 2))
    return gram


def _by_gradients(gram: Tensor, per_unit: Tensor, shared: Tensor, chosen: Plan) -> None:
    samples, _, units, p = per_unit.shape
    # Under autocast one factor is the input before the cast: the narrower type is what the product itself used.
    dtype = min(per_unit.dtype, shared.dtype, key=lambda d: d.itemsize)
    shared = shared.to(dtype)
    for u in range(0, units, chosen.units):
        for r in range(0, p, chosen.rows):
            a = per_unit[:, :, u : u + chosen.units, r : r + chosen.rows].to(dtype)
            gradients = torch.bmm(a.flatten(2).transpose(1, 2), shared)  # (N, u r, q)
            # (u, N, r q): strides alone, no copy
            rows = gradients.to(gram.dtype).view(samples, a.shape[2], -1).transpose(0, 1)
            gram[u : u + chosen.units].baddbmm_(rows, rows.transpose(1, 2))


def _by_pairs(gram: Tensor, per_unit: Tensor, shared: Tensor, chosen: Plan) -> None:
    samples, tokens, units, _ = per_unit.shape
    b = shared.to(gram.dtype)
    flat_b = b.flatten(0, 1)  # (N T, q)
    for u in range(0, units, chosen.units):
        a = per_unit[:, :, u : u + chosen.units].to(gram.dtype).permute(2, 0, 1, 3)  # (u, N, T, p)
        flat_a = a.flatten(1, 2)
        for i in range(0, samples, chosen.rows):
            pair_b = b[i : i + chosen.rows].flatten(0, 1) @ flat_b.T  # (c T, N T)
            pair_a = torch.bmm(a[:, i : i + chosen.rows].flatten(1, 2), flat_a.transpose(1, 2))
            products = (pair_a * pair_b).view(a.shape[0], -1, tokens, samples, tokens)
            gram[u : u + chosen.units, i : i + chosen.rows] += products.sum((2, 4))
