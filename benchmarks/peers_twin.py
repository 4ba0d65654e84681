"""A twin of a BERT from stock layers, which torch.func and BackPACK can differentiate by sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mat.suite.config import BertConfig
from mat.suite.models.bert import MaskedEncoder

KINDS = ("weight", "bias")
NORMS = ("embedding_norm", "final_norm", "transform_norm")


class TwinBlock(nn.Module):
    """One pre-norm block of stock layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-12)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up = nn.Linear(width, config.ffn_hidden)
        self.down = nn.Linear(config.ffn_hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(n, T, D) to (n, T, D)."""

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        z = self.attention_norm(x)
        q, k, v = (
            linear(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)  # (n, H, T, K)
            for linear in (self.query, self.key, self.value)
        )
        q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
        # Fused kernels have no batching rule and no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            context = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(context.transpose(-3, -2).flatten(-2))  # (n, T, D)
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Twin(nn.Module):
    """A pre-norm rotary ``mat.suite.models.bert.Bert`` from stock layers, with its weights.

    Args:
        model: The model to copy.
    """

    def __init__(self, model: MaskedEncoder) -> None:
        super().__init__()
        config = model.config
        vocabulary, width = model.tokens.weight.shape
        dtype, rotary = model.tokens.weight.dtype, model.blocks[0].attention.rotary
        self.tokens = nn.Embedding(vocabulary, width)
        for name in NORMS:
            setattr(self, name, nn.LayerNorm(width, eps=1e-12))
        self.blocks = nn.ModuleList(TwinBlock(config) for _ in range(config.layers))
        self.transform, self.vocabulary = nn.Linear(width, width), nn.Linear(width, vocabulary)
        self.to(dtype)
        self.register_buffer("rotary", rotary.detach().to(dtype))
        with torch.no_grad():
            copies = {"tokens": model.tokens, "vocabulary": model.decoder}
            copies |= {name: model.get_submodule(name) for name in ("transform", *NORMS)}
            for name, module in copies.items():
                self.get_submodule(name).load_state_dict(module.state_dict())
            for theirs, ours in zip(self.blocks, model.blocks, strict=True):
                attention = ours.attention
                for kind in ("weight", "bias"):
                    whole = getattr(attention.qkv, kind)  # (3 D, D) or (3 D,)
                    parts = whole.view(config.heads, 3, -1, *whole.shape[1:]).unbind(1)
                    for name, part in zip(("query", "key", "value"), parts, strict=True):
                        getattr(getattr(theirs, name), kind).copy_(part.flatten(0, 1))
                pairs = {"out": attention.out, "up": ours.ffn.up, "down": ours.ffn.down}
                pairs |= {name: getattr(ours, name) for name in ("attention_norm", "ffn_norm")}
                for name, module in pairs.items():
                    getattr(theirs, name).load_state_dict(module.state_dict())

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (n, T) and masked positions (n, M) to logits (n, M, V)."""
        x = self.embedding_norm(self.tokens(tokens))
        cos, sin = self.rotary[:, : tokens.shape[-1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = torch.take_along_dim(self.final_norm(x), positions[..., None], -2)
        return self.vocabulary(self.transform_norm(F.gelu(self.transform(x))))


def sliced(config: BertConfig) -> list[list[tuple[str, int, int]]]:
    """(parameter, its axis that is split, number of units), by layer in the units' order."""
    groups: list[list[tuple[str, int, int]]] = []
    heads, ffn = config.heads, config.ffn_groups
    for i in range(config.layers):
        block = f"blocks.{i}"
        names = [f"{block}.{p}.{kind}" for p in ("query", "key", "value") for kind in KINDS]
        groups.append([*((name, 0, heads) for name in names), (f"{block}.out.weight", 1, heads)])
        up = [(f"{block}.up.{kind}", 0, ffn) for kind in KINDS]
        groups.append([*up, (f"{block}.down.weight", 1, ffn)])
    return groups


def of_unit(tensor: Tensor, axis: int, units: int, u: int) -> Tensor:
    """One unit's slice of (rows, *parameter.shape), as (rows, entries)."""
    return tensor.chunk(units, axis + 1)[u].flatten(1)


def exact(gradients: Tensor) -> Tensor:
    """Gram products are float32 at least, as ours."""
    return gradients.to(torch.promote_types(gradients.dtype, torch.float32))


def kernels_of(gradients: dict[str, Tensor], config: BertConfig) -> Tensor:
    """(units, n, n) of per-sample gradients (n, *parameter.shape)."""
    kernels = []
    for group in sliced(config):
        for u in range(group[0][2]):
            parts = [of_unit(gradients[name], axis, units, u) for name, axis, units in group]
            kernels.append(sum(part @ part.T for part in map(exact, parts)))
    return torch.stack(kernels)
