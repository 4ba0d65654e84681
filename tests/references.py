"""References written to be obviously right: one unit, one sample, one token at a time.

``p`` are a model's parameters by name. The contributions of frozen units are detached, which is
what the backward mode ``cut`` promises; a unit is the name of its layer, and its number there.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mat.suite.config import BertConfig
from mat.suite.data.masking import MaskedBatch
from mat.suite.models.attention import rotary_table

Parameters = Mapping[str, Tensor]
Unit = tuple[str, int]


def _norm(x: Tensor, p: Parameters, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred / deviation * p[f"{name}.weight"] + p[f"{name}.bias"]


def rotate(x: Tensor) -> Tensor:
    """(T, K) rotated as T x K/2 complex numbers whose parts are K/2 apart."""
    table = rotary_table(*x.shape).to(x.dtype)
    z = torch.complex(*x.chunk(2, -1)) * torch.complex(*table)
    return torch.cat([z.real, z.imag], -1)


def head(x: Tensor, p: Parameters, name: str, u: int, heads: int, rotary: bool) -> Tensor:
    """Contribution of one head to one sequence (T, D)."""
    width = x.shape[1] // heads
    own = slice(3 * width * u, 3 * width * (u + 1))
    q, k, v = (x @ p[f"{name}.qkv.weight"][own].T + p[f"{name}.qkv.bias"][own]).chunk(3, -1)
    if rotary:
        q, k = rotate(q), rotate(k)
    probabilities = torch.softmax(q @ k.T / width**0.5, -1)
    return probabilities @ v @ p[f"{name}.out.weight"][:, width * u : width * (u + 1)].T


def group(x: Tensor, p: Parameters, name: str, u: int, groups: int) -> Tensor:
    """Contribution of one feed-forward group to one sequence (T, D)."""
    width = len(p[f"{name}.up.bias"]) // groups
    own = slice(width * u, width * (u + 1))
    z = x @ p[f"{name}.up.weight"][own].T + p[f"{name}.up.bias"][own]
    return F.gelu(z) @ p[f"{name}.down.weight"][:, own].T


def experts(
    x: Tensor, p: Parameters, name: str, capacity: int | None = None, frozen: Collection[Unit] = ()
) -> Tensor:
    """Output (N, D) of a layer of experts for tokens (N, D) in order.

    An expert that has had ``capacity`` tokens adds nothing to any other.
    """
    taken = [0] * len(p[f"{name}.router.weight"])
    rows = []
    for token in x:
        probabilities = torch.softmax(p[f"{name}.router.weight"] @ token, 0)
        e = probabilities.tolist().index(max(probabilities.tolist()))
        taken[e] += 1
        hidden = F.gelu(p[f"{name}.in_weight"][e] @ token + p[f"{name}.in_bias"][e])
        y = p[f"{name}.out_weight"][e] @ hidden + p[f"{name}.out_bias"][e]
        y = y.detach() if (name, e) in frozen else y
        dropped = capacity is not None and taken[e] > capacity
        rows.append(torch.zeros_like(token) if dropped else probabilities[e] * y)
    return torch.stack(rows)


def logits(
    p: Parameters, config: BertConfig, batch: MaskedBatch, frozen: Collection[Unit] = ()
) -> Tensor:
    """Logits (P, V) of a BERT or Switch without dropout and drops."""

    def sublayer(x: Tensor, name: str) -> Tensor:
        if f"{name}.router.weight" in p:
            return experts(x, p, name, frozen=frozen)
        if name.endswith("attention"):
            rotary, units = config.positions == "rotary", config.heads
            parts = [head(x, p, name, u, units, rotary) for u in range(units)]
            bias = p[f"{name}.out.bias"]
        else:
            units = config.ffn_groups
            parts = [group(x, p, name, u, units) for u in range(units)]
            bias = p[f"{name}.down.bias"]
        return sum(y.detach() if (name, u) in frozen else y for u, y in enumerate(parts)) + bias

    def hidden(tokens: Tensor) -> Tensor:
        x = p["tokens.weight"][tokens]
        if config.positions == "learned":
            x = x + p["positions.weight"][: len(tokens)]
        x = _norm(x, p, "embedding_norm")
        for i in range(config.layers):
            for name in (f"blocks.{i}.attention", f"blocks.{i}.ffn"):
                if config.norm == "pre":
                    x = x + sublayer(_norm(x, p, f"{name}_norm"), name)
                else:
                    x = _norm(x + sublayer(x, name), p, f"{name}_norm")
        return _norm(x, p, "final_norm") if config.norm == "pre" else x

    x = torch.cat([hidden(tokens) for tokens in batch.inputs])[batch.positions]
    x = F.gelu(x @ p["transform.weight"].T + p["transform.bias"])
    return _norm(x, p, "transform_norm") @ p["tokens.weight"].T + p["decoder.bias"]


def filters(
    p: Parameters, stages: Sequence[Sequence[int]], images: Tensor,
    frozen: Collection[Unit] = (), statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
    """Logits (N, classes) of a VGG; mean and variance by batch norm: the batch's unless given."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    x, position = images, 0
    for stage in stages:
        for _ in stage:
            name, norm = f"features.{position}", f"features.{position + 1}"
            weight, bias, maps = p[f"{name}.weight"], p[f"{name}.bias"], []
            for u in range(len(weight)):
                z = F.conv2d(x, weight[u : u + 1], bias[u : u + 1], padding=1)[:, 0]
                mean, variance = z.mean(), z.var(correction=0)
                if statistics is not None:
                    mean, variance = (each[u] for each in statistics[norm])
                y = (z - mean) / (variance + 1e-5).sqrt() * p[f"{norm}.weight"][u]
                y = (y + p[f"{norm}.bias"][u]).clamp_min(0)
                maps.append((y.detach() if (name, u) in frozen else y, mean, variance))
            x = torch.stack([y for y, _, _ in maps], 1)
            means, variances = (
                torch.stack([m for _, m, _ in maps]),
                torch.stack([v for _, _, v in maps]),
            )
            found[norm] = means.detach(), variances.detach()
            position += 3
        position += 1
        if x.shape[2] > 1:
            size = x.shape[2] // 2 * 2
            corners = [x[:, :, a:size:2, b:size:2] for a in (0, 1) for b in (0, 1)]
            x = torch.stack(corners).amax(0)
    return x.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"], found
