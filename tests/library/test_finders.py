"""What is found in known models, that its gates compute what they promise, and what is left out."""

import numpy as np
import pytest
import torch
from reference import expected, gradients, some_active
from torch import nn
from zoo import TRANSFORMERS, build

import mat
from mat.units import BoolArray

QUIET = {"log": False}
# Model, attention implementation, mode: every pair of two occurs.
CASES = [
    ("bert", "eager", "cut"), ("bert", "sdpa", "exact"), ("roberta", "sdpa", "cut"),
    ("distilbert", "eager", "exact"), ("distilbert", "sdpa", "cut"), ("vit", "eager", "cut"),
    ("vit", "sdpa", "exact"), ("llama", "eager", "exact"), ("llama", "sdpa", "cut"),
    ("qwen2", "eager", "cut"), ("qwen2", "sdpa", "exact"), ("encoder", "sdpa", "cut"),
    ("encoder_pre", "sdpa", "cut"), ("encoder_pre", "sdpa", "exact"), ("decoder", "sdpa", "cut"),
    ("sequential", "sdpa", "cut"), ("sequential", "sdpa", "exact"),
]  # fmt: skip


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of gradients over the largest gradient."""
    largest = max(float(w.abs().max()) for w in wanted.values())
    return max(float((found[n] - w).abs().max()) for n, w in wanted.items()) / largest


@pytest.mark.parametrize(("name", "attention", "mode"), CASES)
def test_gated_gradients_are_the_references(name: str, attention: str, mode: str) -> None:
    model, loss = build(name, attention)
    units = mat.find_units(model)
    active = some_active(units)
    wanted = expected(model, loss, units, active, mode)
    plain = loss(model)
    gates = mat.attach_(model, mat.MATConfig(mode=mode, log=False))
    gates.set_active(active)
    assert torch.allclose(loss(model), plain, rtol=1e-12)
    found = gradients(model, loss)
    # Eager attention of Llama and Qwen2 has its softmax in float32.
    tolerance = 1e-6 if attention == "eager" and name in ("llama", "qwen2") else 1e-12
    assert difference(found, wanted) < tolerance


@pytest.mark.parametrize("active", [np.zeros, np.ones])
@pytest.mark.parametrize("name", ["bert", "encoder", "sequential"])
def test_none_and_all_active_are_the_references(name: str, active: type) -> None:
    model, loss = build(name)
    units = mat.find_units(model)
    chosen: BoolArray = active(len(units), bool)
    wanted = expected(model, loss, units, chosen, "cut")
    mat.attach_(model, mat.MATConfig(**QUIET)).set_active(chosen)
    found = gradients(model, loss)
    assert difference(found, wanted) < 1e-12
    assert all(p.grad is not None for p in model.parameters())  # data-parallel waits for each


def test_heads_without_their_output_columns_let_those_train() -> None:
    model, loss = build("bert")
    units = mat.find_units(model)
    owned = mat.find_units(model, head_output=False)
    active = some_active(units)
    wanted = expected(model, loss, units, active, "cut", owned)
    mat.attach_(model, mat.MATConfig(head_output=False, log=False)).set_active(active)
    assert difference(gradients(model, loss), wanted) < 1e-12


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_all_heads_and_groups_of_transformers_are_found(name: str) -> None:
    model, _ = build(name)
    units = mat.find_units(model)
    heads = 2 if name in ("llama", "qwen2") else 4  # grouped queries: key-value heads
    sizes = {(layer.kind, layer.n_units) for layer in units.layers}
    assert sizes == {("heads", heads), ("ffn", 4)}
    assert len(units.layers) == 6


def test_unbatched_and_weighted_attention_is_as_before() -> None:
    model = nn.MultiheadAttention(24, 4, batch_first=True).double()
    x, mask = torch.randn(5, 24, dtype=torch.float64), torch.ones(4, 5, 5, dtype=torch.bool).tril()
    wanted = model(x, x, x, attn_mask=~mask, average_attn_weights=False)
    mat.attach_(model, mat.MATConfig(**QUIET)).set_active([True, False, True, False])
    found = model(x, x, x, attn_mask=~mask, average_attn_weights=False)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)


def test_units_by_hand_get_zero_gradients_anywhere() -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 1), nn.Flatten(), nn.Linear(30, 8), nn.Linear(8, 2)
    ).double()
    units = [
        mat.Unit(
            "left",
            mat.rows("0.weight", 0, 3),
            mat.rows("2.weight", 0, 4),
            mat.cols("3.weight", 0, 4),
        ),
        mat.Unit("right", mat.rows("0.weight", 3, 6), mat.rows("2.weight", 4, 8)),
    ]
    gates = mat.attach_(model, mat.MATConfig(mode="exact", log=False), units=units)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    dense = gradients(model, lambda m: m(x).square().sum())
    model.zero_grad()
    gates.set_active([False, True])
    found = gradients(model, lambda m: m(x).square().sum())
    for name, frozen in (("0.weight", slice(3)), ("2.weight", slice(4))):
        dense[name][frozen] = 0
    dense["3.weight"][:, :4] = 0
    assert difference(found, dense) < 1e-12


def test_nothing_known_says_how_to_name_units() -> None:
    with pytest.raises(ValueError, match=r"name them by hand.*mat\.rows\('weight', 0"):
        mat.attach_(nn.Linear(3, 3))


def test_left_out_layers_have_reasons() -> None:
    model, _ = build("bert")
    left_out = mat.find_units(model).left_out
    assert "tied" in left_out["cls.predictions.decoder"]
    assert "rest" in left_out["cls.predictions.transform.dense"]


def test_subclasses_and_frozen_layers_are_left_out() -> None:
    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.ReLU(),
        Quantised(8, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 2),
    )
    model[3].requires_grad_(False)
    units = mat.find_units(model)
    assert [layer.name for layer in units.layers] == ["0", "4"]
    assert "Quantised" in units.left_out["2"]
    assert "frozen" in units.left_out["3"]


def test_lora_leaves_base_weights_out_and_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    peft = pytest.importorskip("peft")
    model, loss = build("bert", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], r=2))
    for name, parameter in model.named_parameters():
        if ".intermediate." in name or name.endswith(("output.dense.weight", "output.dense.bias")):
            parameter.requires_grad_(True)  # groups train beside the adapters
    gates = mat.attach_(adapted)
    assert set(gates.units.kind) == {"ffn"}
    assert capsys.readouterr().out.count("weights are frozen") == 1
    gates.set_active(np.arange(len(gates.units)) % 3 == 0)
    loss(adapted).backward()
    lora = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert lora and all(bool(grad.any()) for grad in lora)


def test_fully_adapted_model_is_refused_with_the_reason() -> None:
    peft = pytest.importorskip("peft")
    model, _ = build("bert", dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match="frozen"):
        mat.attach_(adapted)


def test_units_print_as_a_table() -> None:
    lines = repr(mat.find_units(build("sequential")[0])).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert "ffn" in lines[1] and "rows of weight" in lines[1]
    assert lines[-1].startswith("left out: 8")
