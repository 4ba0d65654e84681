"""Attention against PyTorch's own and against plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from naive import rotate
from tiny import shapes
from torch import Tensor

from mat.suite.attention import attention, rotary_table

CASES = shapes(batch=(1, 3), length=(1, 7, 16), heads=(1, 3), width=(2, 6), rotary=(False, True))


def inputs(batch: int, length: int, heads: int, width: int, rotary: bool) -> tuple[Tensor, Tensor | None]:
    """Random qkv, and a table that is longer than the sequence, as it is in a model."""
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, heads, 3, width, generator=random, dtype=torch.float64)
    return qkv, rotary_table(length + 3, width).double() if rotary else None


def reference(qkv: Tensor, table: Tensor | None) -> Tensor:
    q, k, v = qkv.permute(3, 0, 2, 1, 4)
    if table is not None:
        q, k = (torch.stack([torch.stack([rotate(head, table) for head in b]) for b in part]) for part in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch(case: dict[str, object], device: str) -> None:
    qkv, table = inputs(**case)
    qkv.requires_grad_()
    weight = torch.randn(qkv[:, :, :, 0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = reference(qkv, table)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), qkv)
    context = attention(qkv.to(device), None if table is None else table.to(device))
    (gradient,) = torch.autograd.grad((context.cpu() * weight).sum(), qkv)
    assert context.is_contiguous()
    torch.testing.assert_close(context.cpu(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotary", [False, True])
def test_gradcheck(rotary: bool) -> None:
    qkv, table = inputs(2, 3, 2, 4, rotary)
    assert torch.autograd.gradcheck(lambda x: attention(x, table), qkv.requires_grad_())


@pytest.mark.parametrize(
    "case", shapes(batch=(2,), length=(7, 32), heads=(3,), width=(8,), rotary=(False, True)), ids=str
)
def test_bfloat16_is_close(case: dict[str, object]) -> None:
    """bf16 keeps 8 bits: 2^-8 relative for a value, a few times that after two products and a softmax."""
    qkv, table = inputs(**case)
    half = qkv.bfloat16().requires_grad_()
    exact = half.detach().double().requires_grad_()
    weight = torch.randn(qkv[:, :, :, 0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        context = attention(half, None if table is None else table.float())
    expected = reference(exact, table)
    (gradient,) = torch.autograd.grad((context * weight).sum(), half)
    (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
    assert context.dtype == gradient.dtype == torch.bfloat16
    for found, wanted in ((context, expected), (gradient, expected_gradient)):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 4 * 2**-8, f"relative error {float(error):.2e}"


def test_rotary_table_holds_the_angles() -> None:
    cos, sin = rotary_table(50, 8).double()
    for t in (0, 1, 49):
        for i in range(4):
            angle = torch.tensor(t * 10000 ** (-2 * i / 8), dtype=torch.float64)
            # the table is float32, so an angle t carries t * 2^-24 of rounding
            torch.testing.assert_close(cos[t, i], angle.cos(), rtol=0, atol=1e-5)
            torch.testing.assert_close(sin[t, i], angle.sin(), rtol=0, atol=1e-5)
