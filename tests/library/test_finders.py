"""What is found in known models, that its gates compute what they promise, and what is left out."""

from typing import Any

import numpy as np
import pytest
import torch
from reference import expected, gradients, some_active
from torch import nn
from zoo import SIZES, TRANSFORMERS, build

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


def lookalike(name: str) -> nn.Module:
    """A model of transformers with familiar names for what computes something else."""
    import transformers as t

    sizes = SIZES | {"num_hidden_layers": 1, "head_dim": 8, "num_key_value_heads": 2}
    whole = {"layer_types": ["full_attention"]}
    if name == "bart":
        sizes = {"vocab_size": 40, "encoder_layers": 1, "decoder_layers": 1}
        return t.BartModel(
            t.BartConfig(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **sizes)
        )
    if name == "qwen3_next":
        return t.Qwen3NextModel(t.Qwen3NextConfig(mlp_only_layers=[0], **whole, **sizes))
    if name == "gpt_oss":
        return t.GptOssModel(t.GptOssConfig(num_local_experts=2, **whole, **sizes))
    config = t.Gemma3nTextConfig(
        activation_sparsity_pattern=[0.5], num_kv_shared_layers=0, vocab_size_per_layer_input=40,
        hidden_size_per_layer_input=8, laurel_rank=4, **whole, **sizes,
    )  # fmt: skip
    return t.Gemma3nTextModel(config)


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("bart", "decoder.layers.0.fc1", "BartDecoderLayer is more than a feed-forward network"),
        ("qwen3_next", "layers.0.self_attn.q_proj", "more of its projections"),
        ("gpt_oss", "layers.0.self_attn.q_proj", "parameters of its own: sinks"),
        ("gemma3n", "layers.0.mlp.down_proj", "Gemma3nTextMLP does more between its matrices"),
    ],
)
def test_modules_that_only_share_names_are_left_out(name: str, path: str, reason: str) -> None:
    units = mat.find_units(nn.ModuleDict({"known": build("bert")[0], "other": lookalike(name)}))
    assert reason in units.left_out[f"other.{path}"]
    owners = {part.parameter for layer in units.layers for part in layer.parts}
    assert f"other.{path}.weight" not in owners


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.PReLU(), "has parameters"),
        (lambda h: h.softmax(-1), "not elementwise"),
        (lambda h: h.cumsum(-1), "not elementwise"),
        (lambda h: h.tanh() * h, None),
    ],
)
def test_neurons_that_the_activation_mixes_are_left_out(activation: Any, reason: Any) -> None:
    model = nn.TransformerEncoderLayer(24, 4, 32, activation=activation, batch_first=True)
    random = torch.get_rng_state()
    units = mat.find_units(model)
    assert ("ffn" in units.kind) == (reason is None)
    assert reason is None or reason in units.left_out["linear1"] == units.left_out["linear2"]
    assert torch.equal(random, torch.get_rng_state()) and model.dropout.training


def test_attention_kernels_see_their_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KERNELS

    sdpa, names = KERNELS["sdpa"], set()

    def kernel(module: Any, *inputs: Any, **named: Any) -> Any:
        names.add(module.config._attn_implementation)
        return sdpa(module, *inputs, **named)

    monkeypatch.setitem(KERNELS._global_mapping, "sdpa", kernel)
    model, loss = build("llama")
    gates = mat.attach_(model, mat.MATConfig(log=False))
    gates.set_active(some_active(gates.units))
    loss(model).backward()
    assert names == {"sdpa"}
