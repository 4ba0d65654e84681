"""Gates of heads and feed-forward groups over random shapes, active sets and types; what a backward keeps."""

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mat.suite.attention import rotary_table
from mat.suite.bert import Attention, FeedForward
from mat.suite.units import BackwardMode, UnitLayer

# Of the norm of all gradients together: bf16 (autocast, parameters in float32) keeps 8 bits of every factor.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def layer_of(kind: str, units: int, size: int, width: int, rotary: bool, dtype: torch.dtype) -> UnitLayer:
    """With all parameters random; ``size`` neurons, or pairs of a head, per unit."""
    layer: UnitLayer
    if kind == "heads":
        layer = Attention(units * 2 * size, units, rotary_table(9, 2 * size) if rotary else None)
    else:
        layer = FeedForward(width, units * size, units)
    random = torch.Generator().manual_seed(units)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=random))
    return layer.to(dtype)


def reference(layer: UnitLayer, x: Tensor, g: Tensor) -> list[Tensor]:
    """Gradients of the input and of the active units' rows in float64, one unit and one sequence at a time."""
    p = {f"l.{n}": q.detach().double().requires_grad_() for n, q in layer.unit_parameters().items()}
    x = x.detach().double().requires_grad_()
    total = torch.zeros(g.shape, dtype=torch.float64)
    for u in range(layer.n_units):
        if isinstance(layer, Attention):
            table = None if layer.rotary is None else layer.rotary.double()
            y = torch.stack([naive._head(tokens, p, "l", u, table) for tokens in x])
        else:
            y = torch.stack([naive._group(tokens, p, "l", u) for tokens in x])
        total = total + (y.detach() if layer.mode == "cut" and not layer.active[u] else y)
    if not total.requires_grad:
        return []
    d_x, *rest = torch.autograd.grad(total, [x, *p.values()], g.double())
    active = torch.from_numpy(layer.active)
    return [d_x, *(d[active] for d in rest if active.any())]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("kind", ["heads", "ffn"])
def test_gradients_equal_the_reference(kind: str, mode: BackwardMode, dtype: torch.dtype, data: st.DataObject) -> None:
    units, size, width = (data.draw(st.integers(1, most)) for most in (6, 5, 9))
    samples, length, rotary = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8)), data.draw(st.booleans())
    none, every = st.just(frozenset[int]()), frozenset(range(units))
    one = st.sampled_from(sorted(every)).map(lambda u: frozenset({u}))
    chosen = data.draw(st.one_of(none, one, st.just(every), st.frozensets(st.sampled_from(sorted(every)))))
    half = dtype == torch.bfloat16
    layer = layer_of(kind, units, size, width, rotary, torch.float32 if half else dtype)
    layer.set_active(np.isin(np.arange(units), sorted(chosen)), mode)
    random = torch.Generator().manual_seed(length)
    shape = (samples, length, layer.product_shapes()[0][1])
    x, g = (torch.randn(shape, generator=random, dtype=torch.float64).to(next(layer.parameters())) for _ in range(2))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = layer(x)
    expected = reference(layer, x, g)
    assert y.requires_grad == bool(expected)
    if not expected:
        return
    y.backward(g.to(y.dtype))
    found = [x.grad, *(layer.gradient(name) for name in layer.unit_parameters() if chosen)]
    flat, wanted = (torch.cat([d.double().flatten() for d in ds]) for ds in (found, expected))  # type: ignore[union-attr]
    assert all(d is not None and d.dtype == x.dtype for d in found)
    error = float((flat - wanted).norm() / wanted.norm())
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("active", range(6))
@pytest.mark.parametrize("kind", ["heads", "ffn"])
def test_cut_keeps_the_activations_of_active_units_only(kind: str, active: int) -> None:
    """Heads: context, q, k, v and probabilities. Groups: pre-activations. Beside them the input and the weights."""
    layer = layer_of(kind, 6, 4, 16, False, torch.float64)
    layer.set_active(np.arange(6) < active, "cut")
    samples, length, width = 2, 5, layer.product_shapes()[0][1]
    x = torch.randn(samples, length, width, dtype=torch.float64, requires_grad=True)
    known = {
        t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *(layer.active_leaves() if active else ()))
    }
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    per_token = 4 * 8 + length if kind == "heads" else 4
    assert sum(kept.values()) == 8 * active * samples * length * per_token
    assert y.requires_grad == bool(active)
