"""Experts as units in transformers' mixtures, against dense references in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mat

pytest.importorskip("transformers")
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

VOCABULARY, EXPERTS = 19, 4
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
DECODER = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "head_dim": 4,
}
SWITCH = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 12,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": EXPERTS,
    "expert_capacity": 3,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
    "decoder_start_token_id": 0,
}
STACKED = ("mixtral eager", "mixtral grouped_mm", "mixtral batched_mm", "gpt_oss eager")
ALL = ("switch eager", *STACKED)


def build(name: str, attention: str = "eager") -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model with large random weights, and a batch with labels."""
    family, implementation = name.split()
    torch.manual_seed(1)
    model: Any
    ids = torch.randint(2, VOCABULARY, (2, 7))
    batch = {"input_ids": ids, "labels": ids.flip(1).contiguous()}
    if family == "switch":
        config = SwitchTransformersConfig(**COMMON, **SWITCH, attn_implementation=implementation)
        model = SwitchTransformersForConditionalGeneration(config)
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, 5:] = 0
    else:
        cls = (
            (MixtralConfig, MixtralForCausalLM)
            if family == "mixtral"
            else (GptOssConfig, GptOssForCausalLM)
        )
        config = cls[0](**COMMON, **DECODER, attn_implementation=attention)
        model = cls[1](config)
        model.set_experts_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    for module in model.modules():
        if hasattr(module, "router"):
            module.router.dtype = torch.float64
    # torch's grouped product has no float64.
    return model if implementation == "grouped_mm" else model.double(), batch


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), found


def containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            yield name, module


def cut_reference(model: nn.Module, active: np.ndarray) -> Callable[[], None]:
    """Make frozen experts' outputs constants, written anew from the definition of each layer.

    Args:
        model: The untouched model.
        active: (layers, E).
    """
    undo = []
    for row, (_, module) in zip(active, containers(model), strict=True):

        def forward(
            x: Tensor, index: Tensor, weights: Tensor, module: Any = module, row: Any = row
        ) -> Tensor:
            y = torch.zeros_like(x)
            for token in range(len(x)):
                for k in range(weights.shape[1]):
                    if isinstance(module, nn.ModuleDict):
                        hot = index[token, 0]
                        if not hot.any():
                            continue
                        unit = int(hot.argmax())
                        out = module[f"expert_{unit}"](x[token][None])[0]
                    else:
                        unit = int(index[token, k])
                        out = stacked_expert(module, unit, x[token])
                    y[token] = y[token] + weights[token, k] * (out if row[unit] else out.detach())
            return y

        module.forward = forward
        undo.append(module)

    def restore() -> None:
        for module in undo:
            del module.forward

    return restore


def stacked_expert(module: Any, unit: int, x: Tensor) -> Tensor:
    """One token through one expert of Mixtral or GPT-OSS."""
    up, down = module.gate_up_proj[unit], module.down_proj[unit]
    if module.is_transposed:
        z = x @ up + module.gate_up_proj_bias[unit]
        return module._apply_gate(z[None])[0] @ down + module.down_proj_bias[unit]
    gate, value = (up @ x).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * value)


def some(layers: int, seed: int = 0) -> np.ndarray:
    """Half of the experts of every layer."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(EXPERTS), (layers, 1)), axis=1)
    return order < EXPERTS // 2


def attach(model: nn.Module, active: np.ndarray, mode: str) -> mat.Gates:
    gates = mat.attach_(model, mat.MATConfig(share=0.5, mode=mode, units=("experts",)))
    gates.set_active(active.flatten())
    return gates


def close(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    for name, value in wanted.items():
        other = found[name]
        if value is None or other is None:
            rest = value if other is None else other
            assert rest is None or not rest.any(), name
        else:
            exact = value.dtype == torch.float64
            rtol, atol = (1e-9, 1e-12) if exact else (1e-3, 1e-4)
            torch.testing.assert_close(other, value, rtol=rtol, atol=atol, msg=name)


def clear_frozen(gates: mat.Gates, wanted: dict[str, Tensor | None]) -> None:
    """Zero the gradients of frozen slices."""
    for part in gates.parts():
        dense = wanted[part.part.parameter]
        if dense is not None:
            keep = torch.from_numpy((part.part.owner == -1) | part.gate.active[part.part.owner])
            dense.transpose(0, part.dim)[~keep] = 0


@pytest.mark.parametrize("name", ALL)
def test_all_experts_active_is_the_model_bitwise(name: str) -> None:
    model, batch = build(name)
    loss, wanted = gradients(model, batch)
    attach(model, np.ones((2, EXPERTS), bool), "cut")
    again, found = gradients(model, batch)
    assert loss == again
    for key, value in wanted.items():
        assert (value is None) == (found[key] is None)
        assert value is None or torch.equal(value, found[key])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("active", ["half", "none", "one layer"])
def test_cut_equals_frozen_outputs_detached(name: str, active: str) -> None:
    model, batch = build(name)
    chosen = some(2)
    chosen[0] &= active == "half"
    chosen[1] &= active != "none"
    restore = cut_reference(model, chosen)
    loss, wanted = gradients(model, batch)
    restore()
    attach(model, chosen, "cut")
    again, found = gradients(model, batch)
    assert again == pytest.approx(
        loss, rel=1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-5
    )
    close(found, wanted)


@pytest.mark.parametrize("name", ALL)
def test_exact_gives_active_experts_the_dense_gradient(name: str) -> None:
    model, batch = build(name)
    chosen = some(2)
    _, wanted = gradients(model, batch)
    gates = attach(model, chosen, "exact")
    clear_frozen(gates, wanted)
    _, found = gradients(model, batch)
    close(found, wanted)


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager", "mixtral batched_mm"])
def test_backward_computes_active_experts_only(name: str, mode: str) -> None:
    """Products are counted: two per row of an active expert (one of input gradients if frozen)."""
    model, _ = build(name)
    chosen = some(2)
    attach(model, chosen, mode)
    _, module = next(iter(containers(model)))
    x, inputs, expert = routed(module)
    counts = np.bincount(expert, minlength=EXPERTS)
    y = module(x, *inputs)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    active, frozen = counts[chosen[0]].sum(), counts[~chosen[0]].sum()
    weights = sum(p.numel() for p in module.parameters()) // EXPERTS
    products = 2 * active + (frozen if mode == "exact" else 0)
    assert counter.get_total_flops() == 2 * weights * products


def routed(
    module: nn.Module, used: int = EXPERTS
) -> tuple[Tensor, tuple[Tensor, Tensor], np.ndarray]:
    """Tokens, routing inputs of a layer of experts, and the expert of every pair."""
    x = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    k = 1 if isinstance(module, nn.ModuleDict) else 2
    expert = torch.stack([torch.randperm(used)[:k] for _ in range(11)])
    weights = torch.rand(11, k, dtype=torch.float64, requires_grad=True)
    if k == 1:
        return x, (nn.functional.one_hot(expert, EXPERTS), weights), expert.flatten().numpy()
    return x, (expert, weights), expert.flatten().numpy()


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_frozen_parameters_always_get_zeros(name: str, mode: str) -> None:
    """Also those of experts without tokens and of whole layers; only untouched code gives None."""
    model, _ = build(name)
    for chosen in (np.arange(EXPERTS) >= 2, np.zeros(EXPERTS, bool)):
        gates = attach(model, np.stack([chosen, chosen]), mode)
        _, module = next(iter(containers(model)))
        x, inputs, _ = routed(module, used=2)
        module(x, *inputs).sum().backward()
        for part in gates.layers[0].parts.values():
            gradient = part.parameter.grad
            if gradient is None:
                assert part.count and name == "switch eager"
            else:
                assert gradient.shape == part.parameter.shape
                assert not gradient[part.frozen if part.count else slice(None)].any()
        assert inputs[1].grad is not None and inputs[1].grad.all()
        model.zero_grad()
        mat.detach_(model)


@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_compact_gradients_are_blocks_of_active_experts(name: str) -> None:
    model, batch = build(name)
    chosen = some(2)
    gates = attach(model, chosen, "cut")
    _, dense = gradients(model, batch)
    for part in gates.parts():
        part.compact = True
    model(**batch).loss.backward()
    for part in gates.parts():
        whole, block = dense[part.part.parameter], part.gradient()
        if whole is None:
            assert block is None
        elif part.count:
            assert part.whole or part.parameter.grad is None
            torch.testing.assert_close(block, whole if part.whole else whole[part.active])


@pytest.mark.parametrize("name", ["switch eager", "mixtral eager"])
def test_a_second_derivative_is_refused(name: str) -> None:
    model, _ = build(name)
    gates = attach(model, some(2), "cut")
    for part in gates.parts():
        part.compact = not part.whole
    _, module = next(iter(containers(model)))
    x, inputs, _ = routed(module)
    homes = [part.home(part.parameter) for part in gates.layers[0].parts.values()]
    first = torch.autograd.grad(
        module(x, *inputs).square().sum(), homes, create_graph=True, allow_unused=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        sum(g.square().sum() for g in first if g is not None).backward()


def detach_columns(model: nn.Module, units: mat.Gates, active: np.ndarray) -> list[Any]:
    """Make what frozen heads and groups give to the last matrix of their layer constant."""
    handles = []
    for layer, rows in units.units.slices():
        if layer.kind == "experts":
            continue
        last = {"heads": ("o_proj", "o"), "ffn": ("wo",)}[layer.kind]
        module = model.get_submodule(layer.name)
        linear = next(getattr(module, name) for name in last if hasattr(module, name))
        keep = torch.from_numpy(np.repeat(active[rows], linear.in_features // layer.n_units))

        def hook(_: Any, inputs: Any, keep: Tensor = keep) -> Tensor:
            return torch.where(keep, inputs[0], inputs[0].detach())

        handles.append(linear.register_forward_pre_hook(hook))
    return handles


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("name", ["switch eager", "mixtral eager eager", "mixtral batched_mm sdpa"])
def test_heads_groups_and_experts_of_a_whole_model_together(name: str, mode: str) -> None:
    family, implementation, *attention = name.split()
    model, batch = build(f"{family} {implementation}", *attention)
    gates = mat.attach_(model, mat.MATConfig(share=0.5))
    again, bitwise = gradients(model, batch)
    mat.detach_(model)
    loss, wanted = gradients(model, batch)
    assert again == loss
    assert all(v is None or torch.equal(v, bitwise[n]) for n, v in wanted.items())  # type: ignore[arg-type]

    random = np.random.default_rng(3)
    sizes = [layer.n_units for layer in gates.units.layers]
    active = np.concatenate([random.permutation(np.arange(n) < n // 2) for n in sizes])
    experts = active[gates.units.kind == "experts"].reshape(2, EXPERTS)
    if mode == "cut":
        restore = cut_reference(model, experts)
        handles = detach_columns(model, gates, active)
        loss, wanted = gradients(model, batch)
        restore()
        for handle in handles:
            handle.remove()
    gates = mat.attach_(model, mat.MATConfig(share=0.5, mode=mode))
    gates.set_active(active)
    clear_frozen(gates, wanted)
    again, found = gradients(model, batch)
    assert again == pytest.approx(loss, rel=1e-12)
    close(found, wanted)
