"""The ``gradients`` contraction of ``mat.gram`` on CUDA that writes no gradient (Triton).

A program owns one unit and some tiles of its weight. For every tile it forms the gradients of all
samples on chip, (N, P, Q) from bf16 factors in float32, and adds their products to an (N, N)
accumulator in float32. Each program writes its own partial sum, added up afterwards in a fixed
order: the same call gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Most samples whose tile of gradients fits on chip; with more, mat.gram forms gradients in memory.
SAMPLES = 64
PROGRAMS = 512  # enough to fill a device
P, Q = 16, 16  # tile of the weight
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _dot(x, y, interpreted: tl.constexpr):
    """Product of bf16 blocks in float32; the interpreter's own bf16 product is wrong."""
    if interpreted:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y)


@triton.jit
def kernel(
    a, b, out, samples, tokens, p, q, tiles, a_n, a_t, a_u, b_n, b_t,
    n_block: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, T: tl.constexpr,
    interpreted: tl.constexpr,
):  # fmt: skip
    """Factors a (N, T, U, p) and b (N, T, q), their last strides 1; out (programs, U, N, N)."""
    part, unit = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, n_block).to(tl.int64)  # what it multiplies can be larger than 32 bits
    step = tl.arange(0, T)
    across = tl.cdiv(q, Q)
    gram = tl.zeros((n_block, n_block), tl.float32)
    for tile in range(part * tiles, min(part * tiles + tiles, tl.cdiv(p, P) * across)):
        row = tile // across * P + tl.arange(0, P)
        column = tile % across * Q + tl.arange(0, Q)
        gradient = tl.zeros((n_block, P, Q), tl.float32)
        for start in range(0, tokens, T):
            t = start + step
            known = (n < samples)[:, None] & (t < tokens)[None, :]
            at_a = n[:, None, None] * a_n + t[None, None, :] * a_t + unit * a_u + row[None, :, None]
            at_b = n[:, None, None] * b_n + t[None, :, None] * b_t + column[None, None, :]
            x = tl.load(a + at_a, mask=known[:, None, :] & (row < p)[None, :, None], other=0.0)
            y = tl.load(b + at_b, mask=known[:, :, None] & (column < q)[None, None, :], other=0.0)
            gradient += _dot(x, y, interpreted)
        # float32 as the sum of two bf16, 16 of its 24 bits, at the speed of bf16
        flat = tl.reshape(gradient, (n_block, P * Q))
        high = flat.to(tl.bfloat16)
        low = (flat - high.to(tl.float32)).to(tl.bfloat16)
        cross = _dot(high, tl.trans(low), interpreted)
        gram += _dot(high, tl.trans(high), interpreted) + (cross + tl.trans(cross))
    at = ((part * tl.num_programs(1) + unit) * samples + n[:, None]) * samples + n[None, :]
    tl.store(out + at, gram, mask=(n < samples)[:, None] & (n < samples)[None, :])


def fits(samples: int, p: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel is meant for N samples of factors of a type on a device.

    Not for a p smaller than its tile, which would be filled up with zeros (filters: p = 1).
    """
    return device.type == "cuda" and dtype == torch.bfloat16 and samples <= SAMPLES and p >= P


def settings(samples: int) -> dict[str, int]:
    """Blocks and warps for N samples; on-chip memory stays under an A100's 164 KB."""
    block = max(16, triton.next_power_of_2(samples))
    step, warps = (16, 8) if block > 32 else (32, 4)
    return {"n_block": block, "P": P, "Q": Q, "T": step, "num_warps": warps, "num_stages": 2}


def schedule(tiles: int, units: int) -> tuple[int, int]:
    """Tiles of a program, and programs per unit."""
    each = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, units)))
    return each, triton.cdiv(tiles, each)


def gram(per_unit: Tensor, shared: Tensor) -> Tensor:
    """Gram matrices of the per-sample gradients of one weight.

    Args:
        per_unit: A, (N, T, U, p) in bf16, N <= ``SAMPLES``.
        shared: B, (N, T, q) in bf16.

    Returns:
        (U, N, N), float32.
    """
    a, b = (x if x.stride(-1) == 1 else x.contiguous() for x in (per_unit, shared))
    samples, tokens, units, p = a.shape
    q = b.shape[2]
    each, programs = schedule(triton.cdiv(p, P) * triton.cdiv(q, Q), units)
    out = torch.empty(programs, units, samples, samples, device=a.device)
    kernel[programs, units](
        a, b, out, samples, tokens, p, q, each, *a.stride()[:3], *b.stride()[:2],
        interpreted=INTERPRETED, **settings(samples),
    )  # fmt: skip
    return out.sum(0)
