"""Gates and the optimiser behind them: skipped means not computed, and not touched."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import naive
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import shapes, tiny_batch, tiny_bert
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mat.suite.bert import Attention, Bert, FeedForward
from mat.suite.optim import UnitAdamW
from mat.suite.units import BackwardMode, UnitIndex, UnitLayer, unit_layers

BETAS, EPS, DECAY = (0.9, 0.98), 1e-6, 0.1
MATRICES = {"tokens", "positions", "transform_weight", "qkv_weight", "in_weight", "out_weight"}
N_UNITS = 12  # of tiny_bert: heads and groups of two layers, three each
ACTIVE = {
    "none": [False] * 12,
    "all": [True] * 12,
    "one": [i == 4 for i in range(12)],
    "lowest heads frozen": [i >= 3 for i in range(12)],
    "layer 0 frozen": [i >= 6 for i in range(12)],
    "layer 1 frozen": [i < 6 for i in range(12)],
    "ffn frozen": [i % 6 < 3 for i in range(12)],
    "a third of each": [i % 3 == i // 3 % 3 for i in range(12)],
    "mixed": [True, False, True, False, True, False, False, False, False, True, True, True],
}


def set_gates(model: nn.Module, active: Iterable[bool], mode: BackwardMode = "cut") -> None:
    UnitIndex(unit_layers(model)).set_active(np.array(list(active)), mode)


def named_layers(model: nn.Module) -> dict[str, UnitLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, UnitLayer)}


def frozen_units(model: nn.Module) -> set[naive.Unit]:
    return {(name, int(u)) for name, layer in named_layers(model).items() for u in np.flatnonzero(~layer.active)}


def active_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter's gradient; of unit parameters the rows of the active units."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for prefix, layer in named_layers(model).items():
        found |= {f"{prefix}.{name}": layer.gradient(name) for name in layer.unit_parameters()}
    return found


def active_rows(model: nn.Module, dense: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """What :func:`active_gradients` should be, given dense gradients."""
    expected = dict(dense)
    for prefix, layer in named_layers(model).items():
        for name in layer.unit_parameters():
            gradient = dense[f"{prefix}.{name}"]
            rows = None if gradient is None else gradient[torch.from_numpy(layer.active)]
            expected[f"{prefix}.{name}"] = rows if rows is not None and len(rows) else None
    return expected


def assert_same_gradients(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], rtol: float) -> None:
    """Within rtol of each gradient's largest entry, and None exactly where None is expected."""
    assert found.keys() == expected.keys()
    assert {n for n, g in found.items() if g is None} == {n for n, g in expected.items() if g is None}
    for name, gradient in found.items():
        wanted = expected[name]
        if gradient is not None and wanted is not None:
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                gradient, wanted, rtol=0, atol=rtol * max(scale, 1e-3), msg=lambda m, name=name: f"{name}: {m}"
            )


def bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def set_lr(optimisers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr


# --- gradients


@settings(max_examples=12, deadline=None, derandomize=True)
@given(active=st.lists(st.booleans(), min_size=N_UNITS, max_size=N_UNITS))
@example(active=ACTIVE["none"])
@example(active=ACTIVE["all"])
@example(active=ACTIVE["layer 0 frozen"])
@example(active=ACTIVE["layer 1 frozen"])
@example(active=ACTIVE["ffn frozen"])
@pytest.mark.parametrize("norm, positions", [("pre", "rotary"), ("post", "learned")])
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_gradients_equal_the_reference(mode: BackwardMode, norm: str, positions: str, active: list[bool]) -> None:
    """``cut``: as if frozen units' outputs were detached. ``exact``: the dense gradients, without frozen rows."""
    model, batch = tiny_bert(norm=norm, positions=positions), tiny_batch()
    set_gates(model, active, mode)
    model.loss(batch).backward()
    expected = naive.gradients(model, batch, frozen_units(model) if mode == "cut" else ())
    assert_same_gradients(active_gradients(model), active_rows(model, expected), rtol=1e-11)
    assert all(layer.get_parameter(n).grad is None for layer in unit_layers(model) for n in layer.unit_parameters()
               if layer.n_active < layer.n_units)  # fmt: skip


def test_pre_norm_of_a_sublayer_without_active_units_gets_no_gradient_and_no_update() -> None:
    model = tiny_bert(norm="pre")
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    for _ in train(model, optimiser, range(3)):  # momentum that must not act
        pass
    set_gates(model, ACTIVE["ffn frozen"])
    per_layer = ("ffn_norm.weight", "ffn_norm.bias", "ffn.in_weight", "ffn.in_bias", "ffn.out_weight")
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in per_layer}
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimiser.state_dict())
    for _ in train(model, optimiser, range(3, 6)):
        assert {name for name, gradient in active_gradients(model).items() if gradient is None} == expected
    assert {name for name, value in model.state_dict().items() if value.equal(before[name])} == expected
    unmoved = {n for n, s in optimiser.state_dict().items() if all(s[k].equal(state[n][k]) for k in s)}
    assert unmoved == expected


@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE)
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_forward_does_not_depend_on_the_gates(mode: BackwardMode, active: list[bool]) -> None:
    model, batch = tiny_bert(), tiny_batch()
    expected = model(batch)
    set_gates(model, active, mode)
    torch.testing.assert_close(model(batch), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("case", shapes(mode=("cut", "exact"), active=("all", "mixed", "none")), ids=str)
def test_accumulation_equals_the_full_batch(case: dict[str, Any], parts: int) -> None:
    model, batch = tiny_bert(), tiny_batch(samples=5)
    set_gates(model, ACTIVE[case["active"]], case["mode"])
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    model.loss(batch).backward()
    expected = {name: None if g is None else g.clone() for name, g in active_gradients(model).items()}
    optimiser.clear()
    assert not optimiser.gradients()
    for part in batch.split(parts):
        (model.loss(part) * (part.samples / batch.samples)).backward()
    assert_same_gradients(active_gradients(model), expected, rtol=1e-12)


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_bfloat16_autocast(mode: BackwardMode) -> None:
    """Gradients are float32 and point where the float64 ones do; bf16 has 8 bits, so within 5 % of their norm."""
    model, batch = tiny_bert(dtype=torch.float32), tiny_batch()
    set_gates(model, ACTIVE["mixed"], mode)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)
    loss.backward()
    found = active_gradients(model)
    exact = copy.deepcopy(model).double()
    expected = active_rows(exact, naive.gradients(exact, batch, frozen_units(model) if mode == "cut" else ()))
    pairs = [(found[name], g) for name, g in expected.items() if g is not None]
    assert all(g is not None and g.dtype == torch.float32 for g, _ in pairs)
    found_flat, wanted = (torch.cat([p[side].double().flatten() for p in pairs]) for side in (0, 1))  # type: ignore[union-attr]
    error = float((found_flat - wanted).norm() / wanted.norm())
    assert error < 0.05, f"relative error {error:.3f}"


@pytest.mark.parametrize("shape", [(2,), (4,), (), (3, 1), (1,)])
def test_active_set_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="for 3 units"):
        FeedForward(4, 6, 3).set_active(np.ones(shape, bool))


def test_the_active_units_numbers_are_copied_to_a_device_once() -> None:
    layer = FeedForward(4, 6, 3)
    layer.set_active(np.array([True, False, True]))
    meta = torch.device("meta")
    assert layer.active_index(meta) is layer.active_index(meta)


def test_parameter_with_a_wrong_number_of_units_is_refused() -> None:
    with pytest.raises(ValueError, match="in has 2 rows for 3 units"):
        UnitLayer("ffn", 3).add_unit_parameter("in", torch.zeros(2, 5))


# --- operators


class Products(TorchDispatchMode):
    """Shapes of all matrix products that are dispatched, whatever operator they come as."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[tuple[int, ...], ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in flop_registry:
            self.seen[tuple(tuple(a.shape) for a in args if isinstance(a, Tensor) and a.dim() >= 2)] += 1
        return func(*args, **(kwargs or {}))


def backward_products(output: Tensor) -> Counter[tuple[tuple[int, ...], ...]]:
    with Products() as products:
        output.sum().backward()
    return products.seen


def only(layer: UnitLayer, kept: list[int]) -> UnitLayer:
    """A layer that has only these units."""
    small = copy.deepcopy(layer)
    small.n_units = small.n_active = len(kept)
    small.active = np.ones(len(kept), bool)
    for name, parameter in layer.unit_parameters().items():
        setattr(small, name, nn.Parameter(parameter.detach()[kept]))
    return small


@pytest.mark.parametrize("kept", [[1], [0, 5], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("layer", [Attention(42, 6, None), FeedForward(16, 30, 6)], ids=["heads", "ffn"])
def test_cut_backward_runs_the_products_of_a_layer_that_has_only_the_active_units(
    layer: UnitLayer, kept: list[int]
) -> None:
    layer = copy.deepcopy(layer)
    x = torch.randn(2, 5, layer.product_shapes()[0][1], requires_grad=True)
    dense = backward_products(layer(x))
    layer.set_active(np.isin(np.arange(6), kept), "cut")
    found = backward_products(layer(x))
    assert found == backward_products(only(layer, kept)(x))
    assert found != dense


def test_no_product_of_the_backward_has_dense_rows_at_a_third_active() -> None:
    model, batch = tiny_bert(ffn_hidden=21), tiny_batch(samples=5)
    dense_sizes = {3 * 12, 21, 5 * 3}  # rows of Q, K, V; hidden neurons; sequences times heads
    sizes = {}
    for case in ("all", "a third of each"):
        set_gates(model, ACTIVE[case])
        products = backward_products(model.loss(batch))
        sizes[case] = {size for product in products for shape in product for size in shape}
    assert dense_sizes <= sizes["all"]
    assert not dense_sizes & sizes["a third of each"]


# --- the optimiser


def train(
    model: Bert, optimiser: UnitAdamW, steps: Iterable[int], *, lr: float = 0.01, clip: float = 1e9
) -> Iterator[int]:
    """Steps on a batch per step number; yields between the gradients and the update."""
    for step in steps:
        optimiser.clear()
        model.loss(tiny_batch(seed=step)).backward()
        optimiser.clip(clip)
        yield step
        optimiser.step(lr)


@pytest.mark.parametrize("clip", [0.5, 1e9])
@pytest.mark.parametrize("norm, positions", [("pre", "rotary"), ("post", "learned")])
def test_all_units_active_equals_torch_bitwise(norm: str, positions: str, clip: float) -> None:
    model = tiny_bert(norm=norm, positions=positions)
    twin = copy.deepcopy(model)
    set_gates(model, ACTIVE["mixed"])
    set_gates(model, ACTIVE["all"])
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    groups = [
        {"params": [p for n, p in twin.named_parameters() if (n.split(".")[-1] in MATRICES) == decays],
         "weight_decay": DECAY * decays} for decays in (True, False)
    ]  # fmt: skip
    reference = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
    for step in range(20):
        lr, batch = 0.01 / (1 + step), tiny_batch(seed=step)
        optimiser.clear()
        model.loss(batch).backward()
        norm_before = optimiser.clip(clip)
        optimiser.step(lr)
        reference.zero_grad()
        twin.loss(batch).backward()
        expected = nn.utils.clip_grad_norm_(twin.parameters(), clip)
        set_lr([reference], lr)
        reference.step()
        assert torch.equal(norm_before, expected), f"step {step}: norm {norm_before} instead of {expected}"
    differing = [n for (n, p), q in zip(model.named_parameters(), twin.parameters(), strict=True) if not p.equal(q)]
    assert not differing


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_clipping_sees_active_gradients_and_the_rest_only(mode: BackwardMode) -> None:
    model, batch = tiny_bert(), tiny_batch()
    set_gates(model, ACTIVE["mixed"], mode)
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    model.loss(batch).backward()
    before = [g.clone() for g in active_gradients(model).values() if g is not None]
    norm = optimiser.clip(0.1)
    expected = torch.cat([g.flatten() for g in before]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    after = [g for g in active_gradients(model).values() if g is not None]
    torch.testing.assert_close(after, [g * 0.1 / (expected + 1e-6) for g in before], rtol=1e-12, atol=0)


class LoneUnits:
    """Every unit of every gated parameter alone in a ``torch.optim.AdamW``, stepped only when it has a gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = named_layers(model)
        self.units: dict[tuple[str, str, int], tuple[nn.Parameter, torch.optim.AdamW]] = {}
        for prefix, layer in self.layers.items():
            for name, parameter in layer.unit_parameters().items():
                for u in range(layer.n_units):
                    alone = nn.Parameter(parameter.detach()[u].clone())
                    decay = DECAY if name in MATRICES else 0.0
                    optimiser = torch.optim.AdamW([alone], betas=BETAS, eps=EPS, weight_decay=decay, fused=True)
                    self.units[prefix, name, u] = alone, optimiser

    def step(self, lr: float) -> None:
        set_lr((optimiser for _, optimiser in self.units.values()), lr)
        for prefix, layer in self.layers.items():
            for name in layer.unit_parameters():
                gradient = layer.gradient(name)
                for row, u in enumerate(np.flatnonzero(layer.active)):
                    assert gradient is not None
                    alone, optimiser = self.units[prefix, name, int(u)]
                    alone.grad = gradient[row].clone()
                    optimiser.step()

    def differing(self) -> list[tuple[str, str, int]]:
        return [
            key for key, (alone, _) in self.units.items()
            if not torch.equal(self.layers[key[0]].get_parameter(key[1])[key[2]], alone)
        ]  # fmt: skip


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_frozen_units_stand_still_bitwise_and_thaw_with_their_own_step_count(mode: BackwardMode) -> None:
    """All active for 5 steps, two sets of 25 steps each, then all again; some units are frozen for all 50."""
    model = tiny_bert()
    optimiser, reference = UnitAdamW(model, BETAS, EPS, DECAY), LoneUnits(model)
    first, second = ACTIVE["mixed"], ACTIVE["a third of each"]
    never = ~(np.array(first) | np.array(second))
    assert never.any()
    index = UnitIndex(unit_layers(model))

    def frozen_bits() -> list[Tensor]:
        state = optimiser.state_dict()
        found = []
        for (prefix, layer), (_, rows) in zip(named_layers(model).items(), index.slices(), strict=True):
            for name, parameter in layer.unit_parameters().items():
                for tensor in (parameter, *state[f"{prefix}.{name}"].values()):
                    found += bits(tensor[torch.from_numpy(never[rows])])
        return found

    before: list[Tensor] = []
    for active, steps in ((ACTIVE["all"], range(5)), (first, range(5, 30)), (second, range(30, 55))):
        set_gates(model, active, mode)
        for step in train(model, optimiser, steps):
            before = frozen_bits() if step == 4 else before
            reference.step(lr=0.01)
        if steps.start == 0:
            before = frozen_bits()
    assert len(before) == len(frozen_bits())
    assert all(torch.equal(a, b) for a, b in zip(before, frozen_bits(), strict=True))
    set_gates(model, ACTIVE["all"], mode)
    for _ in train(model, optimiser, range(55, 57)):
        reference.step(lr=0.01)
    assert not reference.differing()


@pytest.mark.parametrize("before", ["none", "one", "all", "mixed"])
@pytest.mark.parametrize("after", ["none", "one", "all", "a third of each"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_exactly_the_active_units_train_after_the_set_changed(mode: BackwardMode, before: str, after: str) -> None:
    model = tiny_bert()
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    index = UnitIndex(unit_layers(model))
    for case in (before, after):
        set_gates(model, ACTIVE[case], mode)
        start = copy.deepcopy(model)
        for _ in train(model, optimiser, range(2)):
            pass
        moved: list[bool] = []
        for layer, old in zip(index.layers, unit_layers(start), strict=True):
            pairs = [(p, old.get_parameter(n)) for n, p in layer.unit_parameters().items()]
            moved += [all(not p[u].equal(q[u]) for p, q in pairs) for u in range(layer.n_units)]
            assert all(p[u].equal(q[u]) for u in np.flatnonzero(~layer.active) for p, q in pairs)
        assert moved == ACTIVE[case]
        assert not model.tokens.equal(start.tokens)


def change_by_step(model: Bert, optimiser: UnitAdamW) -> None:
    for _ in train(model, optimiser, range(1)):
        pass


def change_by_drift(model: Bert, optimiser: UnitAdamW) -> None:
    optimiser.drift(unit_layers(model), lr=0.1)


def change_by_loading(model: Bert, optimiser: UnitAdamW) -> None:
    model.load_state_dict(tiny_bert(seed=1).state_dict())


@pytest.mark.parametrize("change", [change_by_step, change_by_drift, change_by_loading])
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_training_sees_every_change_of_the_parameters(
    mode: BackwardMode, change: Callable[[Bert, UnitAdamW], None]
) -> None:
    """The gated forward works on gathered rows; they must not go stale."""
    model, batch = tiny_bert(), tiny_batch()
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    for active in ("all", "mixed"):
        set_gates(model, ACTIVE[active], mode)
        for _ in train(model, optimiser, range(2)):
            pass
    before = model(batch)
    change(model, optimiser)
    with torch.no_grad():
        expected = model(batch)
    assert not torch.allclose(before, expected, rtol=1e-6)
    torch.testing.assert_close(model(batch), expected, rtol=1e-12, atol=1e-12)


def test_drift_repeats_the_last_update_at_the_present_learning_rate() -> None:
    """Slow units that had 3, 1 and 0 gradients; the one without any does not move, and decay acts on matrices only."""
    model = tiny_bert(layers=1, ffn_groups=3)
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    ffn = unit_layers(model)[1]
    for active, steps in (((True, False, False), range(2)), ((True, True, False), range(2, 3))):
        ffn.set_active(np.array(active), "cut")
        for _ in train(model, optimiser, steps):
            pass
    state = {name.split(".")[-1]: s for name, s in optimiser.state_dict().items() if ".ffn." in name}
    expected = {}
    lr = 0.007
    for name, parameter in ffn.unit_parameters().items():
        rows = []
        for u, count in enumerate((3, 1, 0)):
            row = parameter.detach()[u].clone()
            assert state[name]["steps"][u] == count
            if count:
                m = state[name]["exp_avg"][u] / (1 - BETAS[0] ** count)
                v = state[name]["exp_avg_sq"][u] / (1 - BETAS[1] ** count)
                row = row - lr * (DECAY if name in MATRICES else 0.0) * row - lr * m / (v.sqrt() + EPS)
            rows.append(row)
        expected[name] = torch.stack(rows)
    others = {n: p.detach().clone() for n, p in model.named_parameters() if ".ffn." not in n}
    states = copy.deepcopy(optimiser.state_dict())
    ffn.set_active(np.zeros(3, bool))
    optimiser.drift([ffn], lr)
    for name, wanted in expected.items():
        # bias correction is computed in float32 there, as torch's kernel keeps its step counts
        torch.testing.assert_close(ffn.get_parameter(name).detach(), wanted, rtol=1e-6, atol=1e-8)
    assert torch.equal(ffn.get_parameter("in_weight")[2], expected["in_weight"][2])
    assert all(torch.equal(model.get_parameter(n), p) for n, p in others.items())
    torch.testing.assert_close(optimiser.state_dict(), states, rtol=0, atol=0)


def test_drift_right_after_a_step_is_that_step_again() -> None:
    """With the decay off, a step's update and the drift's that follows are the same."""
    model = tiny_bert()
    optimiser = UnitAdamW(model, BETAS, EPS, 0.0)
    trail = []
    for _ in train(model, optimiser, range(3)):
        trail = [bits(p for layer in unit_layers(model) for p in layer.parameters())]
    trail.append(bits(p for layer in unit_layers(model) for p in layer.parameters()))
    for layer in unit_layers(model):
        layer.set_active(np.zeros(layer.n_units, bool))
    optimiser.drift(unit_layers(model), lr=0.01)
    trail.append(bits(p for layer in unit_layers(model) for p in layer.parameters()))
    for start, stepped, drifted in zip(*trail, strict=True):
        # float32 step counts in the drift's bias correction
        torch.testing.assert_close(drifted - stepped, stepped - start, rtol=1e-5, atol=1e-9)


def test_optimiser_state_round_trip() -> None:
    model = tiny_bert()
    optimiser = UnitAdamW(model, BETAS, EPS, DECAY)
    set_gates(model, ACTIVE["mixed"])
    for _ in train(model, optimiser, range(3)):
        pass
    twin = copy.deepcopy(model)
    restored = UnitAdamW(twin, BETAS, EPS, DECAY)
    restored.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for both in ((model, optimiser), (twin, restored)):
        for _ in train(*both, range(3, 6)):
            pass
    assert all(p.equal(q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
