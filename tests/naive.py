"""References written to be obviously right: one unit, one sample, one output at a time."""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mat.suite.attention import rotary_table
from mat.suite.bert import MaskedEncoder
from mat.suite.config import BertConfig
from mat.suite.data.images import ImageBatch
from mat.suite.data.masking import MaskedBatch
from mat.suite.vgg import Vgg

Unit = tuple[str, int]  # name of the unit layer in the model, and which unit


def _norm(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """(T, K) rotated as T x K/2 complex numbers whose parts are K/2 apart."""
    a, b = x.chunk(2, -1)
    z = torch.complex(a, b) * torch.complex(*rotary[:, : len(x)].to(x.dtype))
    return torch.cat([z.real, z.imag], -1)


def _head(x: Tensor, p: Mapping[str, Tensor], name: str, u: int, rotary: Tensor | None) -> Tensor:
    """Contribution of one head to one sequence (T, D)."""
    q, k, v = (x @ p[f"{name}.qkv_weight"][u].T + p[f"{name}.qkv_bias"][u]).chunk(3, -1)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    probabilities = torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1)
    return probabilities @ v @ p[f"{name}.out_weight"][u]


def _group(x: Tensor, p: Mapping[str, Tensor], name: str, u: int) -> Tensor:
    """Contribution of one feed-forward group to one sequence (T, D)."""
    z = x @ p[f"{name}.in_weight"][u].T + p[f"{name}.in_bias"][u]
    return F.gelu(z) @ p[f"{name}.out_weight"][u]


def experts(
    x: Tensor, p: Mapping[str, Tensor], name: str, capacity: int | None = None, frozen: Collection[Unit] = ()
) -> Tensor:
    """A switch layer's output (N, D) for tokens (N, D) in order; frozen experts' outputs are detached.

    An expert that has had ``capacity`` tokens adds nothing to any other.
    """
    taken = [0] * len(p[f"{name}.router"])
    rows = []
    for token in x:
        probabilities = torch.softmax(p[f"{name}.router"] @ token, 0)
        e = probabilities.tolist().index(max(probabilities.tolist()))
        taken[e] += 1
        hidden = F.gelu(p[f"{name}.in_weight"][e] @ token + p[f"{name}.in_bias"][e])
        y = p[f"{name}.out_weight"][e] @ hidden + p[f"{name}.out_bias"][e]
        y = y.detach() if (name, e) in frozen else y
        rows.append(torch.zeros_like(token) if capacity is not None and taken[e] > capacity else probabilities[e] * y)
    return torch.stack(rows)


def logits(p: Mapping[str, Tensor], config: BertConfig, batch: MaskedBatch, frozen: Collection[Unit] = ()) -> Tensor:
    """Logits (P, V) of a BERT or Switch without dropout and drops, with the contributions of frozen units detached."""
    rotary = rotary_table(batch.inputs.shape[1], config.width // config.heads)

    def sublayer(x: Tensor, name: str, units: int) -> Tensor:
        if f"{name}.router" in p:
            return experts(x, p, name, frozen=frozen)
        total = torch.zeros_like(x)
        for u in range(units):
            heads = name.endswith("attention")
            y = (
                _head(x, p, name, u, rotary if config.positions == "rotary" else None)
                if heads
                else _group(x, p, name, u)
            )
            total = total + (y.detach() if (name, u) in frozen else y)
        return total + p[f"{name}_bias"]

    def hidden(tokens: Tensor) -> Tensor:
        x = p["tokens"][tokens]
        if config.positions == "learned":
            x = x + p["positions"][: len(tokens)]
        x = _norm(x, p, "embedding_norm")
        for i in range(config.layers):
            for name, units in ((f"blocks.{i}.attention", config.heads), (f"blocks.{i}.ffn", config.ffn_groups)):
                if config.norm == "pre":
                    x = x + sublayer(_norm(x, p, f"{name}_norm"), name, units)
                else:
                    x = _norm(x + sublayer(x, name, units), p, f"{name}_norm")
        return _norm(x, p, "final_norm") if config.norm == "pre" else x

    x = torch.cat([hidden(tokens) for tokens in batch.inputs])[batch.positions]
    x = _norm(F.gelu(x @ p["transform_weight"].T + p["transform_bias"]), p, "transform_norm")
    return x @ p["tokens"].T + p["vocabulary_bias"]


def filters(
    p: Mapping[str, Tensor], images: Tensor, pools: Sequence[bool], frozen: Collection[Unit] = (),
    statistics: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """Logits (N, classes) of a VGG and each layer's mean and variance, those of the batch unless given.

    The outputs of frozen filters are detached.
    """
    found, x = [], images
    for i, pool in enumerate(pools):
        name = f"features.{i}"
        weight = p[f"{name}.weight"].permute(0, 3, 1, 2)  # stored (C, 3, 3, I)
        maps = []
        for u in range(len(weight)):
            z = F.conv2d(x, weight[u : u + 1], p[f"{name}.bias"][u : u + 1], padding=1)[:, 0]
            mean, variance = (z.mean(), z.var(correction=0)) if statistics is None else (s[u] for s in statistics[i])
            y = ((z - mean) / (variance + 1e-5).sqrt() * p[f"{name}.gain"][u] + p[f"{name}.shift"][u]).clamp_min(0)
            maps.append((y.detach() if (name, u) in frozen else y, mean, variance))
        x, means, variances = (torch.stack(t, 1 if t[0].dim() else 0) for t in zip(*maps, strict=True))
        found.append((means.detach(), variances.detach()))
        if pool:
            size = x.shape[2] // 2 * 2
            x = torch.stack([x[:, :, a:size:2, b:size:2] for a in (0, 1) for b in (0, 1)]).amax(0)
    return x.mean((2, 3)) @ p["classifier.weight"].T + p["classifier.bias"], found


def filter_gradients(model: Vgg, batch: ImageBatch, frozen: Collection[Unit] = ()) -> dict[str, Tensor | None]:
    """Gradient of the mean cross-entropy for every parameter; None where the loss does not depend on it."""
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    logits, _ = filters(p, batch.inputs, pools_of(model), frozen)
    loss = F.cross_entropy(logits, batch.targets)
    return dict(zip(p, torch.autograd.grad(loss, list(p.values()), allow_unused=True), strict=True))


def filter_jacobian(model: Vgg, batch: ImageBatch) -> dict[str, Tensor]:
    """d outputs / d parameter, (n, k, *parameter.shape), with the statistics of the batch as constants (section 5)."""
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    _, statistics = filters(p, batch.inputs, pools_of(model))
    rows = []
    for sample in batch.split(batch.samples):
        outputs = filters(p, sample.inputs, pools_of(model), statistics=statistics)[0].flatten()
        rows.append([torch.autograd.grad(o, list(p.values()), retain_graph=True) for o in outputs])
    return {
        name: torch.stack([torch.stack([output[i] for output in sample]) for sample in rows])
        for i, name in enumerate(p)
    }


def pools_of(model: Vgg) -> list[bool]:
    """Whether a pool follows, by layer: after a stage, unless the maps are 1 x 1 (models of 6 x 6 images: always)."""
    return [i == len(stage) - 1 for stage in model.stages for i in range(len(stage))]


def gradients(model: MaskedEncoder, batch: MaskedBatch, frozen: Collection[Unit] = ()) -> dict[str, Tensor | None]:
    """Gradient of the mean cross-entropy for every parameter; None where the loss does not depend on it."""
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    loss = F.cross_entropy(logits(p, model.config, batch, frozen), batch.targets)
    return dict(zip(p, torch.autograd.grad(loss, list(p.values()), allow_unused=True), strict=True))


def jacobian(model: MaskedEncoder, batch: MaskedBatch) -> dict[str, Tensor]:
    """d outputs / d parameter for every parameter, (n, k, *parameter.shape), each entry of (n, k) by itself."""
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    rows: list[list[tuple[Tensor, ...]]] = []
    for sample in batch.split(batch.samples):
        outputs = logits(p, model.config, sample).flatten()
        rows.append(
            [torch.autograd.grad(o, list(p.values()), retain_graph=True, materialize_grads=True) for o in outputs]
        )
    return {
        name: torch.stack([torch.stack([output[i] for output in sample]) for sample in rows])
        for i, name in enumerate(p)
    }


def unit_jacobian(jacobian: Mapping[str, Tensor], layer: str, u: int) -> Tensor:
    """Columns of one unit's parameters, (n, k, p); the router is no unit's."""
    names = [name for name in jacobian if name.startswith(f"{layer}.") and not name.endswith(".router")]
    return torch.cat([jacobian[name][:, :, u].reshape(*jacobian[name].shape[:2], -1) for name in names], -1)
