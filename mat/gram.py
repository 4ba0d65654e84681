"""Gram matrices of per-sample unit gradients, contracted the cheaper way under a memory bound.

For one weight the gradient of sample i and unit u is ``A[i, :, u].T @ B[i]`` with a per-unit factor
A (N, T, U, p) and a shared factor B (N, T, q): input and output gradient of a product over T
positions (``mat.taps``). Two contractions give the same matrices:

``gradients``  form the per-sample gradients, then multiply them: N U p q (T + N) multiply-adds;
``pairs``      contract pairs of positions without forming gradients: N² T² (U p + q + U).

On a CUDA device ``gradients`` of bf16 factors runs in a Triton kernel that never writes a gradient,
where that fits (``mat.gram_triton``).
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Factors = Sequence[tuple[Tensor, ...]]

# Matrix-product FLOPs that take as long as multiplying and adding up one pair of positions
# (measured).
ELEMENTWISE = 200


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


def plan(
    samples: int, tokens: int, units: int, p: int, q: int, memory_bytes: int, itemsize: int = 4
) -> Plan:
    """Choose the contraction by cost and the chunks by memory.

    Args:
        samples: N.
        tokens: T.
        units: U.
        p: Width of the per-unit factor.
        q: Width of the shared factor.
        memory_bytes: Bound on the matrices that a chunk forms; copies of the factors come beside
            it. At least one row or sample is always taken.
        itemsize: Bytes of a number in the kernels: 4, or 8 for float64.

    Returns:
        The plan; its ``flops`` are what a FLOPs counter sees.
    """
    forming = 2 * samples * tokens * units * p * q
    products = 2 * samples * samples * units * p * q
    token_pairs = samples * samples * tokens * tokens
    pairs = 2 * token_pairs * (units * p + q)
    elementwise = ELEMENTWISE * token_pairs * units  # no matrix product, so not in ``flops``
    if forming + products <= pairs + elementwise:
        # A row of gradients, in the factors' precision and in the kernels'.
        fit = max(1, memory_bytes // (samples * q * 2 * itemsize))
        return Plan("gradients", forming + products, max(1, min(units, fit // p)), min(p, fit))
    sample_bytes = itemsize * tokens * samples * tokens  # pairs of one sample, of one factor
    chunk = max(1, min(samples, memory_bytes // (3 * sample_bytes)))
    # The pairs of the shared factor stand beside those of each unit and their products.
    unit_chunk = max(1, min(units, (memory_bytes // (sample_bytes * chunk) - 1) // 2))
    shared = 2 * token_pairs * q
    return Plan("pairs", pairs - shared + shared * -(-units // unit_chunk), unit_chunk, chunk)


def unit_gram(factors: Factors, bias: bool, memory_bytes: int) -> Tensor:
    """Gram matrices of the per-sample gradients of one weight, and of its bias if it has one.

    Args:
        factors: Pairs of A (n, T, U, p) and B (n, T, q), one for every batch and projection; the
            kernel's rows are theirs one after the other, N in all.
        bias: Add the Gram matrices of A summed over positions (the gradient of a bias (U, p)).
        memory_bytes: Bound on working memory.

    Returns:
        (U, N, N), float32 (float64 for float64 factors); products accumulate in that precision.
    """
    per_unit, shared = factors[0]
    _, tokens, units, p = per_unit.shape
    samples, q = sum(len(a) for a, _ in factors), shared.shape[2]
    exact = torch.float64 if per_unit.dtype == torch.float64 else torch.float32
    gram = torch.zeros(units, samples, samples, dtype=exact, device=per_unit.device)
    chosen = plan(samples, tokens, units, p, q, memory_bytes, exact.itemsize)
    with torch.autocast(per_unit.device.type, enabled=False):
        contract = _by_gradients if chosen.contraction == "gradients" else _by_pairs
        contract(gram, factors, chosen)
        if bias:
            # ``gradients`` are rounded to the factors' type, and so is this one: a float32 sum
            # would copy A first.
            rounded = per_unit.dtype if chosen.contraction == "gradients" else exact
            sums = torch.cat([a.sum(1, dtype=rounded) for a, _ in factors]).to(exact)  # (N, U, p)
            gram.baddbmm_(sums.transpose(0, 1), sums.permute(1, 2, 0))
    return gram


def unit_flops(
    samples: int, tokens: int, units: int, p: int, q: int, bias: bool, memory_bytes: int
) -> int:
    """FLOPs of :func:`unit_gram`."""
    of_bias = 2 * samples * samples * units * p * bias
    return plan(samples, tokens, units, p, q, memory_bytes).flops + of_bias


def _by_gradients(gram: Tensor, factors: Factors, chosen: Plan) -> None:
    _, _, units, p = factors[0][0].shape
    # Under autocast one factor is the input before the cast: the narrower type is what the product
    # itself used.
    dtype = min(factors[0][0].dtype, factors[0][1].dtype, key=lambda d: d.itemsize)
    shared = {id(b): b.to(dtype) for _, b in factors}  # projections share an input: one copy
    if gram.is_cuda and importlib.util.find_spec("triton"):
        from mat import gram_triton

        if gram_triton.fits(gram.shape[1], p, dtype, gram.device):
            a = torch.cat([a.to(dtype) for a, _ in factors])
            gram += gram_triton.gram(a, torch.cat([shared[id(b)] for _, b in factors]))
            return
    for u in range(0, units, chosen.units):
        for r in range(0, p, chosen.rows):
            chunk = slice(u, u + chosen.units), slice(r, r + chosen.rows)
            parts = [(a[:, :, *chunk].to(dtype), shared[id(b)]) for a, b in factors]
            _, _, width, height = parts[0][0].shape
            q = parts[0][1].shape[2]
            gradients = gram.new_empty(gram.shape[1], width * height, q)  # (N, u r, q)
            targets = torch.split(gradients, [len(a) for a, _ in parts])
            for (a, b), target in zip(parts, targets, strict=True):
                left = a.flatten(2).transpose(1, 2)  # (n, u r, T)
                if dtype == gram.dtype:
                    torch.bmm(left, b, out=target)
                else:
                    target.copy_(torch.bmm(left, b))
            flat = gradients.view(-1, width, height * q).transpose(0, 1)  # (u, N, r q), no copy
            gram[u : u + chosen.units].baddbmm_(flat, flat.transpose(1, 2))


def _by_pairs(gram: Tensor, factors: Factors, chosen: Plan) -> None:
    per_unit, b = (torch.cat([pair[side] for pair in factors]) for side in (0, 1))
    samples, tokens, units, _ = per_unit.shape
    b = b.to(gram.dtype)
    flat_b = b.flatten(0, 1)  # (N T, q)
    for u in range(0, units, chosen.units):
        a = per_unit[:, :, u : u + chosen.units].to(gram.dtype).permute(2, 0, 1, 3)  # (u, N, T, p)
        flat_a = a.flatten(1, 2)  # (u, N T, p)
        for i in range(0, samples, chosen.rows):
            pair_b = b[i : i + chosen.rows].flatten(0, 1) @ flat_b.T  # (c T, N T)
            rows = a[:, i : i + chosen.rows].flatten(1, 2)  # (u, c T, p)
            products = torch.bmm(rows, flat_a.transpose(1, 2)) * pair_b  # (u, c T, N T)
            products = products.view(a.shape[0], -1, tokens, samples, tokens)
            gram[u : u + chosen.units, i : i + chosen.rows] += products.sum((2, 4))


def routed_gram(factors: Factors, bias: bool, memory_bytes: int) -> Tensor:
    """The same for a layer that sends every row to one unit: nothing is formed for other units.

    Args:
        factors: Triples of A (P, p), B (P, q) and sizes (U, n), one for every batch and projection:
            how many of the P rows each unit has in each sample. Rows are sorted by unit, then by
            sample.
        bias: As in :func:`unit_gram`.
        memory_bytes: Bound on working memory.

    Returns:
        As :func:`unit_gram`; zero for a unit without rows.
    """
    first_a, first_b, first_sizes = factors[0]
    units, p, q = len(first_sizes), first_a.shape[1], first_b.shape[1]
    dtype = min(first_a.dtype, first_b.dtype, key=lambda d: d.itemsize)
    exact = torch.float64 if first_a.dtype == torch.float64 else torch.float32
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(units)]  # by row of the kernel
    for a, b, sizes in factors:
        n, counts = sizes.shape[1], sizes.flatten().tolist()
        rows = torch.split(a.to(dtype), counts), torch.split(b.to(dtype), counts)
        pairs = list(zip(*rows, strict=True))
        for u, part in enumerate(parts):
            part += pairs[u * n : (u + 1) * n]
    samples = len(parts[0])
    gram = torch.zeros(units, samples, samples, dtype=exact, device=first_a.device)
    chunk = max(1, min(p, memory_bytes // (samples * q * exact.itemsize)))
    with torch.autocast(first_a.device.type, enabled=False):
        for r in range(0, p, chunk):
            gradients = gram.new_empty(samples, min(chunk, p - r), q)
            flat = gradients.flatten(1)  # (N, r q)
            for u in range(units):
                for row, (left, right) in zip(gradients, parts[u], strict=True):
                    row.copy_(left[:, r : r + chunk].T @ right)
                gram[u] += flat @ flat.T
        if bias:
            sums = [torch.stack([left.sum(0, dtype=exact) for left, _ in part]) for part in parts]
            summed = torch.stack(sums)  # (U, N, p)
            gram.baddbmm_(summed, summed.transpose(1, 2))
    return gram


def routed_flops(samples: int, positions: int, units: int, p: int, q: int, bias: bool) -> int:
    """FLOPs of :func:`routed_gram` for N samples, P rows in all."""
    return 2 * positions * p * q + 2 * samples * samples * units * p * (q + bias)
