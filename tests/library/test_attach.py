"""An attached model stays an ordinary model: whatever torch and transformers do with one works."""

import copy
import pickle
from pathlib import Path
from typing import Any

import data_parallel
import mixtures
import numpy as np
import pytest
import torch
from reference import expected, gradients, some_active
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from zoo import build

import mat
from mat.gates import Gates

FAMILIES = ("bert", "llama", "encoder", "sequential")


def attach(model: nn.Module, mode: str = "cut", seed: int | None = 0) -> Gates:
    """Gates of a model, with some units frozen unless ``seed`` is None."""
    gates = mat.attach_(model, mat.MATConfig(mode=mode, log=False))
    if seed is not None:
        gates.set_active(some_active(gates.units, seed))
    return gates


def assert_equal(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0
) -> None:
    """Same keys and shapes; values to a tolerance relative to the largest of all."""
    assert list(found) == list(wanted)
    largest = max(float(w.detach().abs().max()) for w in wanted.values() if w.is_floating_point())
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert float((found[name] - value).detach().abs().max()) <= tolerance * largest, name


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_is_the_same_attached_and_detached(name: str) -> None:
    model, _ = build(name)
    before, parameters = values(model), list(model.parameters())
    attach(model)
    assert_equal(values(model), before)
    mat.detach_(model)
    assert_equal(values(model), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_pretrained_folders_round_trip(name: str, tmp_path: Path) -> None:
    model, loss = build(name)
    attach(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).train()
    assert_equal(values(loaded), values(model))
    assert torch.allclose(loss(loaded), loss(model), rtol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_load_attached_and_plain(name: str) -> None:
    (plain, loss), (model, _) = build(name), build(name)
    attach(model)
    for parameter in plain.parameters():
        parameter.data *= 1.1
    model.load_state_dict(plain.state_dict())
    assert torch.allclose(loss(model), loss(plain), rtol=1e-12)
    for parameter in model.parameters():
        parameter.data *= 0.9
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(loss(plain), loss(model), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "mode"), [("bert", "cut"), ("encoder", "exact"), ("vit", "exact")]
)
def test_all_active_is_the_untouched_model_bitwise(name: str, mode: str) -> None:
    (plain, loss), (model, _) = build(name), build(name)
    gates = attach(model, mode)
    gates.set_active(np.ones(len(gates.units), bool))
    for each in (plain, model):
        optimiser = torch.optim.AdamW(each.parameters(), lr=1e-3)
        if each is model:
            gates.guard(optimiser)
        for _ in range(20):
            optimiser.zero_grad()
            loss(each).backward()
            optimiser.step()
    assert_equal(values(model), values(plain))


@pytest.mark.parametrize(("name", "reentrant"), [("bert", True), ("llama", False), ("vit", False)])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model, loss = build(name)
    attach(model)
    wanted = gradients(model, loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_equal(gradients(model, loss), wanted, 1e-12)


@pytest.mark.parametrize(
    ("name", "mode"), [("bert", "cut"), ("llama", "exact"), ("encoder", "cut")]
)
def test_autocast_gradients_are_those_of_the_reference(name: str, mode: str) -> None:
    model, plain_loss = build(name, dtype=torch.float32)

    def loss(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain_loss(m)

    units = mat.find_units(model)
    active = some_active(units)
    wanted = expected(model, loss, units, active, mode)
    attach(model, mode)
    found = gradients(model, loss)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    ours, theirs = (torch.cat([g.flatten() for g in gs.values()]) for gs in (found, wanted))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()  # bf16 keeps 8 bits of every factor


def test_tied_weights_stay_tied_and_ungated() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[4].weight = model[0].weight
    gates = attach(model)
    assert [layer.name for layer in gates.units.layers] == ["2"]
    assert "tied" in gates.units.left_out["0"]
    bert, _ = build("bert")
    attach(bert)
    assert bert.cls.predictions.decoder.weight is bert.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ["vit", "encoder_pre", "sequential"])
def test_compiled_parts_around_gated_layers_agree(name: str) -> None:
    model, loss = build(name)
    gates = attach(model)
    wanted = gradients(model, loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    model.zero_grad()
    loss(compiled).backward()
    assert_equal({n: p.grad for n, p in model.named_parameters()}, wanted, 1e-12)
    model.zero_grad()
    gates.set_active(some_active(gates.units, seed=1))
    loss(compiled).backward()  # a new set needs no new graph
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert_equal(found, gradients(model, loss), 1e-12)


@pytest.mark.parametrize("name", ["bert", "encoder", "sequential"])
def test_functional_call_differentiates_the_weights_it_is_given(name: str) -> None:
    model, loss = build(name)
    other = copy.deepcopy(model)
    given = {n: (1.1 * p).detach().requires_grad_() for n, p in model.named_parameters()}
    for parameter, value in zip(other.parameters(), given.values(), strict=True):
        parameter.data.copy_(value)
    gates = attach(model)
    mat.attach_(other, gates.config).set_active(gates.active)
    wanted = gradients(other, loss)

    class Called(nn.Module):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            return functional_call(model, given, inputs, named)

        def parameters(self, recurse: bool = True) -> Any:
            return model.parameters(recurse)

    loss(Called()).backward()
    assert_equal({n: g.grad for n, g in given.items()}, wanted, 1e-12)  # type: ignore[misc]


@pytest.mark.parametrize("way", ["p.data", ".float()", "load_state_dict"])
@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_new_weights_change_forward_and_backward_alike(name: str, way: str) -> None:
    model, loss = build(name)
    units = mat.find_units(model)
    active = some_active(units)
    attach(model)
    gradients(model, loss)
    model.zero_grad()
    if way == ".float()":
        model.float()
    elif way == "p.data":
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.2
    else:
        model.load_state_dict({key: 1.2 * value for key, value in model.state_dict().items()})
    plain, _ = build(name)
    plain.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    wanted = expected(plain, loss, units, active, "cut")
    assert torch.allclose(loss(model), loss(plain))
    assert_equal(gradients(model, loss), wanted, 1e-5 if way == ".float()" else 1e-12)


@pytest.mark.parametrize("name", ["encoder", "sequential", "llama"])
@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_second_derivative_is_refused(name: str, mode: str) -> None:
    model, loss = build(name)
    attach(model, mode)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss(model), list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_is_attached_on_its_own(name: str, how: str) -> None:
    model, loss = build(name)
    gates = attach(model)
    wanted = gradients(model, loss)
    model.zero_grad()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert_equal(gradients(twin, loss), wanted)
    twin.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    twin._gates.set_active(~gates.active)
    assert (gates.active != twin._gates.active).all()
    assert_equal(gradients(model, loss), wanted)
    plain = build(name)[0]
    assert_equal(
        gradients(twin, loss), expected(plain, loss, gates.units, ~gates.active, "cut"), 1e-12
    )
    optimiser = torch.optim.SGD(twin.parameters(), lr=1.0, weight_decay=0.1)
    gates.guard(optimiser)
    before = values(twin)
    optimiser.step()
    part = next(part for part in twin._gates.parts() if not part.whole)
    moved = (values(twin)[part.part.parameter] != before[part.part.parameter]).movedim(part.dim, 0)
    frozen = torch.tensor([o >= 0 and not part.gate.active[o] for o in part.part.owner.tolist()])
    assert not moved[frozen].any()
    mat.detach_(twin)
    assert gates.sites[0].module.forward is not None and not hasattr(twin, "_gates")


def test_several_backward_passes_add_up() -> None:
    model, loss = build("bert")
    attach(model)
    once = gradients(model, loss)
    for _ in range(2):
        loss(model).backward()
    assert_equal(
        {n: p.grad for n, p in model.named_parameters()}, {n: 3 * g for n, g in once.items()}, 1e-12
    )


class Products(TorchDispatchMode):
    """Sizes of the matrix products, and head counts of attention kernels, that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.heads: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if name.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm"):
            self.sizes |= {size for tensor in tensors for size in tensor.shape[-2:]}
        if "scaled_dot_product" in name:
            self.heads |= {tensor.shape[1] for tensor in tensors if tensor.dim() == 4}
        return func(*args, **(kwargs or {}))


def test_no_product_with_dense_rows_is_dispatched() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=10,
        intermediate_size=42, num_hidden_layers=2, vocab_size=40, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    gates = mat.attach_(model, mat.MATConfig(groups=3, log=False))
    gates.set_active(np.arange(len(gates.units)) % 3 == 1)
    loss = model(torch.arange(16).view(2, 8)).logits.square().mean()
    with Products() as backward:
        loss.backward()
    dense, active = {60, 30, 42}, {20, 10, 14}  # queries, keys and values, hidden neurons
    assert active <= backward.sizes
    assert not dense & backward.sizes
    assert backward.heads == {2, 1} or backward.heads == {2}


def test_cut_keeps_nothing_of_frozen_units() -> None:
    model, loss = build("encoder")
    gates = attach(model, seed=None)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() if tensor.grad_fn is not None or not tensor.is_leaf else 0)
        return tensor

    totals = []
    for active in (np.ones(len(gates.units), bool), np.zeros(len(gates.units), bool)):
        gates.set_active(active)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(model)
        totals.append(sum(kept))
    assert totals[1] < 0.5 * totals[0]


def test_data_parallel_trains_as_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(data_parallel.run, (str(tmp_path),), nprocs=2)
    model, x = data_parallel.network()
    gates = mat.attach_(model, mat.MATConfig(groups=3, log=False))
    data_parallel.train(gates, model, x)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_equal(first, second)
    assert_equal(values(model), first, 1e-12)


def filters() -> tuple[nn.Module, Any]:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    return model, lambda m: m(x).square().mean()


def experts() -> tuple[nn.Module, Any]:
    model, batch = mixtures.build("mixtral eager")
    return model, lambda m: m(**batch).logits.square().mean()


@pytest.mark.parametrize("first", ["some", "all", "checkpointed"])
@pytest.mark.parametrize(
    "made", [lambda: build("bert"), lambda: build("sequential"), filters, experts],
    ids=["bert", "sequential", "filters", "experts"],
)  # fmt: skip
def test_another_set_in_the_backward_pass_is_refused(made: Any, first: str) -> None:
    model, loss = made()
    gates = attach(model, seed=None if first == "all" else 0)
    run = checkpoint if first == "checkpointed" else lambda f, **_: f()
    result = run(lambda: loss(model), use_reentrant=False)
    gates.set_active(some_active(gates.units, 1))
    theirs = "|Recomputed values" if first == "checkpointed" else ""  # torch may see it earlier
    with pytest.raises(RuntimeError, match="changed between a forward pass and its back" + theirs):
        result.backward()
    assert all(p.grad is None for p in gates.sites[0].module.parameters())


class Adapted(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_first_matrices_that_change_after_attaching_are_called(how: str) -> None:
    model, loss = build("encoder")
    gates = attach(model, seed=None)
    for layer in model.layers:
        if how == "hook":
            layer.linear1.register_forward_hook(lambda _, x, y: 2 * y)
        else:
            layer.linear1 = Adapted(layer.linear1)
    wanted = loss(model)
    gates.set_active(np.arange(len(gates.units)) % 2 == 0)
    with pytest.warns(UserWarning, match="linear1 of a .* has changed") as said:
        assert torch.allclose(loss(model), wanted, rtol=1e-12)
        loss(model)
    assert len(said) == len(model.layers)


@pytest.mark.parametrize("kind", ["transformers", "torch"])
def test_attention_weights_pass_gradients_of_active_heads(kind: str) -> None:
    if kind == "torch":
        model: Any = nn.MultiheadAttention(8, 4, batch_first=True).double()
        x, name = torch.randn(2, 3, 8).double(), "in_proj_weight"

        def weights_of(m: Any) -> Tensor:
            return m(x, x, x, average_attn_weights=False)[1]
    else:
        model, name = build("bert", "eager")[0].bert, "encoder.layer.0.attention.self.query.weight"
        ids = torch.arange(12).view(2, 6)

        def weights_of(m: Any) -> Tensor:
            return m(input_ids=ids, output_attentions=True).attentions[0]

    dense = gradients(model, lambda m: weights_of(m)[:, :2].square().sum())[name]
    model.zero_grad()
    gates = attach(model, seed=None)
    gates.set_active(np.arange(len(gates.units)) < 2)  # two heads of the first layer
    found = gradients(model, lambda m: weights_of(m).square().sum())[name]
    rows = dense.abs().sum(1) > 0
    assert rows.any() and torch.allclose(found[rows], dense[rows], rtol=1e-12)
    assert not found[~rows].any()
