"""Tiny mixtures of experts of transformers, and dense references of their gates."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import mat

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
        if hasattr(module, "has_gate") or hasattr(module, "expert_0"):
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


class OldMixture(nn.Module):
    """Mixtral's block before transformers 5: it calls the experts of a ModuleList itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 6)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor, keep: Any = None) -> tuple[Tensor, Tensor]:
        weights, chosen = torch.topk(self.gate(x).softmax(-1), 2, dim=-1)
        y = torch.zeros_like(x)
        for unit, expert in enumerate(self.experts):
            token, place = torch.where(chosen == unit)
            out = expert(x[token])
            out = out if keep is None or keep[unit] else out.detach()
            y.index_add_(0, token, out * weights[token, place, None])
        return y, weights
