"""Small ordinary models with units, and their Jacobians, one sample and output at a time."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat import ntk
from mat.adapters import find_units
from mat.units import Part, Unit, UnitLayer, Units, by_hand, cols, rows

IDS = {"pad_token_id": 0, "attn_implementation": "sdpa"}
SIZES = {
    "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 10,
    "vocab_size": 20, "max_position_embeddings": 16,
}  # fmt: skip


@dataclass
class Case:
    """A model, its units, a probe, and each of its samples alone (padding removed)."""

    model: nn.Module
    units: Units
    batch: Any
    singles: list[Any]
    samples: int | None = None
    output: Callable[[Any], Tensor] | None = None
    rtol: float = 1e-9

    @property
    def options(self) -> dict[str, Any]:
        return {"samples": self.samples, "output": self.output}

    def outputs(self, model: nn.Module, single: Any) -> Tensor:
        """(k,) of one sample."""
        if isinstance(single, dict):
            result = model(**single)
        else:
            result = model(*single) if isinstance(single, tuple) else model(single)
        picked = result if self.output is None else self.output(result)
        return (picked if isinstance(picked, Tensor) else picked.logits).flatten()


def jacobian(case: Case) -> dict[str, Tensor]:
    """(n, k, *shape) of every parameter; batch norm has the statistics of the whole probe."""
    model = evaluated(case)
    parameters = dict(model.named_parameters())
    found: list[list[tuple[Tensor, ...]]] = []
    for single in case.singles:
        outputs = case.outputs(model, single)
        found.append([
            torch.autograd.grad(
                y, list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for y in outputs
        ])  # fmt: skip
    return {
        name: torch.stack([torch.stack([row[i] for row in sample]) for sample in found])
        for i, name in enumerate(parameters)
    }


def evaluated(case: Case) -> nn.Module:
    """A copy whose running statistics are those of the probe, layer after layer."""
    model = copy.deepcopy(case.model).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def take(layer: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        x = inputs[0].transpose(0, 1).flatten(1)
        layer.running_mean, layer.running_var = x.mean(1).detach(), x.var(1, correction=0).detach()

    hooks = [layer.register_forward_pre_hook(take) for layer in layers]
    if layers:
        case.outputs(model, case.batch)
    for hook in hooks:
        hook.remove()
    return model


def unit_jacobians(case: Case, found: dict[str, Tensor]) -> list[Tensor]:
    """(n, k, p) of every unit, in the order of the table."""
    units = []
    for layer in case.units.layers:
        for u in range(layer.n_units):
            pieces = [
                found[part.parameter].index_select(
                    2 + part.dim, torch.from_numpy(np.flatnonzero(part.owner == u))
                )
                for part in layer.parts
            ]
            units.append(torch.cat([piece.flatten(2) for piece in pieces], 2))
    return units


def kernel(jacobian: Tensor, weight: Tensor) -> Tensor:
    """(r, r) of (n, k, p) reduced by (m, n, k); rows are projection-major."""
    reduced = torch.einsum("mnk,nkp->mnp", weight, jacobian).flatten(0, 1)
    return reduced @ reduced.T


def build(name: str) -> Case:
    """A case by its name, in float64, all parameters random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = CASES[name]()
        for parameter in case.model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return case


@functools.cache
def reference(name: str) -> tuple[Case, dict[str, Tensor], list[Tensor]]:
    case = build(name)
    found = jacobian(case)
    return case, found, unit_jacobians(case, found)


def mean_square(outputs: Tensor, _: Any) -> Tensor:
    return outputs.square().mean()


def estimate(case: Case, **options: Any) -> ntk.Mntk:
    """With kernels and signs of seed 7."""
    settings = {"loss": mean_square, "kernels": True, "seed": 7, **case.options, **options}
    return ntk.estimate(case.model, settings.pop("batch", case.batch), case.units, **settings)


def assert_equal(a: Tensor | None, b: Tensor | None, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-2 * rtol)


def _irregular() -> Case:
    """Units of unequal sizes, scattered rows, a bias without its weight, and leftovers."""
    model = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    units = [
        Unit("wide", rows("0.weight", 0, 5), rows("0.bias", 0, 5), cols("2.weight", 0, 5)),
        Unit("apart", rows("0.weight", 5, 7), rows("0.weight", 10, 11), cols("2.weight", 5, 7)),
        Unit("narrow", rows("0.weight", 7, 10), cols("2.weight", 11, 12)),
        Unit("bias", rows("2.bias", 1, 3)),
    ]
    x = torch.randn(4, 3).double()
    return Case(model, Units(by_hand(model, units)), x, [each[None] for each in x])


class Reused(nn.Module):
    """A layer used twice, with in-place work behind it, and a matrix tied to another layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(torch.tanh(self.layer(x)))
        y += x
        return self.other(torch.tanh(y)).mean(1)


def _reused() -> Case:
    model = Reused().double()
    parts = [Part.even(f"layer.{name}", 0, 2, 4) for name in ("weight", "bias")]
    x = torch.randn(3, 2, 4).double()
    units = Units([UnitLayer("neurons", "layer", 2, parts)])
    return Case(model, units, x, [each[None] for each in x])


def _bert() -> Case:
    import transformers as t

    off = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = t.BertForSequenceClassification(
        t.BertConfig(**SIZES, **IDS, **off, num_labels=3)
    ).double()
    return _texts(model, [5, 2, 4])


def _llama() -> Case:
    """Grouped queries; the logits of the last token."""
    import transformers as t

    config = t.LlamaConfig(**SIZES | {"num_attention_heads": 6}, **IDS, num_key_value_heads=2)
    model = with_exact_norms(t.LlamaForCausalLM(config))
    case = _texts(model.double(), [3, 3, 3])
    case.output = lambda result: result.logits[:, -1]
    return case


def _texts(model: nn.Module, lengths: list[int]) -> Case:
    """Token ids padded to the longest."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 20, (length,))
    singles = [{"input_ids": row[None, :n]} for row, n in zip(ids, lengths, strict=True)]
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    return Case(model, find_units(model), batch, singles)


class Filters(nn.Module):
    """Strides, dilation, padding of two kinds, in-place activations, a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, (3, 2), padding="same", dilation=2, bias=False)
        self.free = nn.BatchNorm2d(6)
        self.third = nn.Conv2d(6, 4, 1, padding=1, padding_mode="circular")
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.free(self.second(x))
        y += x
        y = F.relu(self.third(F.gelu(y)), inplace=True)
        return self.out(y.mean((2, 3)))


def _filters() -> Case:
    model = Filters().double()
    names = ["first.weight", "first.bias", "norm.weight", "norm.bias"]
    layers = [
        UnitLayer("filters", "first", 3, [Part.even(name, 0, 3, 6) for name in names]),
        UnitLayer("channels", "second", 2, [Part.even("second.weight", 1, 2, 6)]),
        UnitLayer("filters", "third", 4, [Part.even("third.weight", 0, 4, 4)]),
    ]
    x = torch.randn(4, 2, 6, 6).double()
    return Case(model, Units(layers), x, [each[None] for each in x])


class SequenceFirst(nn.Module):
    """torch's own layers with positions first: encoder, and cross-attention of a decoder."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": 6, "nhead": 2, "dim_feedforward": 8, "dropout": 0.2}
        self.encoder = nn.TransformerEncoderLayer(**sizes)
        self.decoder = nn.TransformerDecoderLayer(**sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        causal = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.decoder(x, y[:3], tgt_mask=causal).mean(0)


def _sequence_first() -> Case:
    model, layers = SequenceFirst().double(), []
    for path in ("encoder.self_attn", "decoder.self_attn", "decoder.multihead_attn"):
        parts = [
            Part.even(f"{path}.in_proj_weight", 0, 2, 18, blocks=3),
            Part.even(f"{path}.in_proj_bias", 0, 2, 18, blocks=3),
            Part.even(f"{path}.out_proj.weight", 1, 2, 6),
        ]
        layers.append(UnitLayer("heads", path, 2, parts))
    layers.append(UnitLayer("ffn", "encoder", 4, [Part.even("encoder.linear1.weight", 0, 4, 8)]))
    x = torch.randn(4, 3, 6).double()  # (T, n, D)
    return Case(model, Units(layers), x, [x[:, i : i + 1] for i in range(3)], samples=3)


class Experts(nn.Module):
    """Every token goes to one expert; the matrices are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.bias = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return record_experts(self, lambda *product: product[4], x)


def record_experts(module: Experts, record: Callable[..., Tensor], x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    gate, expert = module.router(flat).softmax(-1).max(-1)
    total = torch.zeros_like(flat)
    for e in expert.unique().tolist():
        token = (expert == e).nonzero()[:, 0]
        y = F.linear(flat[token], module.weight[e], module.bias[e])
        y = record("weight", "bias", e, flat[token], y, token)
        total = total.index_add(0, token, y * gate[token, None])
    return total.view_as(x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.experts, self.out = nn.Linear(4, 4), Experts(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.experts(torch.tanh(self.low(x))))).mean(1)


def _stacked_experts() -> Case:
    parts = [Part(f"experts.{name}", 0, np.arange(3)) for name in ("weight", "bias")]
    layer = UnitLayer("experts", "experts", 3, parts, recording=("experts", record_experts))
    x = torch.randn(3, 5, 4).double()
    return Case(Routed().double(), Units([layer]), x, [each[None] for each in x])


def _mixtral() -> Case:
    import transformers as t

    sizes = SIZES | {"num_hidden_layers": 1, "num_key_value_heads": 3}
    sizes |= {"num_local_experts": 3, "num_experts_per_tok": 2}
    model = with_exact_norms(t.MixtralForCausalLM(t.MixtralConfig(**sizes, **IDS)))
    model.set_experts_implementation("eager")
    case = _texts(model.double(), [4, 4, 4])
    case.output = lambda result: result.logits[:, -1, :5]
    case.rtol = 1e-5  # its router rounds to float32
    return case


def _switch() -> Case:
    """Experts that are modules of their own, none too full."""
    import transformers as t

    config = t.SwitchTransformersConfig(
        vocab_size=20, d_model=8, d_kv=4, d_ff=6, num_layers=2, num_sparse_encoder_layers=1,
        num_heads=2, num_experts=3, expert_capacity=9, dropout_rate=0.0, pad_token_id=0,
    )  # fmt: skip
    model = with_exact_norms(t.SwitchTransformersEncoderModel(config))
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.dtype = torch.float64  # it rounds to float32
    case = _texts(model.double(), [4, 4, 4])
    case.output = lambda result: result.last_hidden_state[:, :2, :3]
    return case


def with_exact_norms(model: nn.Module) -> nn.Module:
    """With norms in place of those that round to float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith(("RMSNorm", "TransformersLayerNorm")):
                setattr(module, name, nn.RMSNorm(len(child.weight)))
    return model


CASES: dict[str, Callable[[], Case]] = {
    "irregular": _irregular,
    "reused": _reused,
    "bert": _bert,
    "llama": _llama,
    "filters": _filters,
    "sequence_first": _sequence_first,
    "stacked_experts": _stacked_experts,
    "mixtral": _mixtral,
    "switch": _switch,
}
