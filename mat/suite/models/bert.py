"""BERT (Devlin et al. 2019) for masked language modelling, as an ordinary module.

``MaskedEncoder`` is what every masked language model here shares; ``Bert`` is the one with plain
feed-forward layers. With learned positions and post-norm its logits equal those of
``transformers.BertForMaskedLM`` given the same weights. ``positions="rotary"`` and ``norm="pre"``
make a small model leave the plateau near the unigram entropy within minutes.

Shapes: B sequences, T tokens, D width, H heads, K = D / H, F hidden neurons, P masked positions of
the whole batch, V pieces in the vocabulary.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.suite.config import BertConfig
from mat.suite.data.masking import MaskedBatch
from mat.suite.interface import Model
from mat.suite.models.attention import attention, attention_matrices, rotary_table

TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
# Our modules to those of transformers.BertForMaskedLM.
TRANSFORMERS = {
    "tokens": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
    "decoder": "cls.predictions.decoder",
}
TRANSFORMERS_BLOCK = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn.up": "intermediate.dense",
    "ffn.down": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


def initial_weight(*shape: int, width: int) -> Tensor:
    """BERT's 0.02 at its width of 768, scaled so that narrow models start with equal products."""
    return torch.empty(*shape).normal_(0.0, 0.02 * math.sqrt(768 / width))


def linear(weight: Tensor, bias: bool = True) -> nn.Linear:
    """A linear layer with this weight (outputs, inputs) and a bias of zeros."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta")  # which draws no random numbers
    layer.weight = nn.Parameter(weight)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding (rows, width) with BERT's initial weights."""
    layer = nn.Embedding(rows, width, device="meta")
    layer.weight = nn.Parameter(torch.empty(rows, width).normal_(0.0, 0.02))
    return layer


class Attention(nn.Module):
    """Multi-head self-attention.

    Head h owns rows 3 K h to 3 K (h + 1) of ``qkv`` (queries, keys, values) and columns K h to
    K (h + 1) of ``out``.

    Args:
        width: D.
        heads: H.
        rotary: Table of rotary positions, or None.
    """

    rotary: Tensor | None

    def __init__(self, width: int, heads: int, rotary: Tensor | None) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = linear(initial_weight(3 * width, width, width=width))
        self.out = linear(initial_weight(width, width, width=width).T.contiguous())
        self.register_buffer("rotary", rotary, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return cast(Tensor, self.out(self.core(self.qkv(x))))

    def core(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 K h) to context (B, T, K h), for any h of the heads side by side."""
        return attention(self._split(qkv), self.rotary).flatten(2)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Attention matrices (B, H, T, T) of an input (B, T, D)."""
        return attention_matrices(self._split(self.qkv(x)), self.rotary)

    def _split(self, qkv: Tensor) -> Tensor:
        return qkv.view(*qkv.shape[:2], -1, 3, self.head_width)  # (B, T, h, 3, K)


class FeedForward(nn.Module):
    """Two linear layers around a GELU.

    Args:
        width: D.
        hidden: F.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = linear(initial_weight(hidden, width, width=width))
        self.activation = nn.GELU()
        self.down = linear(initial_weight(hidden, width, width=width).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), through (B, T, F)."""
        return cast(Tensor, self.down(self.activation(self.up(x))))


class Block(nn.Module):
    """Attention and feed-forward sublayers with residual connections, normalised before or after.

    Args:
        config: The model's configuration.
        attention: The first sublayer.
        ffn: The second.
    """

    def __init__(self, config: BertConfig, attention: Attention, ffn: nn.Module) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = attention
        self.attention_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.ffn = ffn
        self.ffn_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x)))
            return cast(Tensor, x + self.dropout(self.ffn(self.ffn_norm(x))))
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return cast(Tensor, self.ffn_norm(x + self.dropout(self.ffn(x))))


class MaskedEncoder(Model):
    """A Transformer encoder for masked language modelling; logits at masked positions only.

    Args:
        config: The model's configuration.
        vocabulary: V.
        length: Longest sequence T.
    """

    def __init__(self, config: BertConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.heads
        self.tokens = embedding(vocabulary, width)
        self.positions = embedding(length, width) if config.positions == "learned" else None
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        rotary = rotary_table(length, width // heads) if config.positions == "rotary" else None
        self.blocks = nn.ModuleList(
            Block(config, Attention(width, heads, rotary), self.feed_forward(number))
            for number in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=1e-12) if config.norm == "pre" else nn.Identity()
        self.transform = linear(initial_weight(width, width, width=width))
        self.transform_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = linear(self.tokens.weight.detach())
        self.decoder.weight = self.tokens.weight  # tied
        if config.norm == "pre":  # GPT-2's rule: so depth does not add variance
            for name, parameter in self.blocks.named_parameters():
                if name.endswith(("attention.out.weight", "ffn.down.weight", "ffn.out_weight")):
                    parameter.data.div_(math.sqrt(2 * config.layers))

    def feed_forward(self, number: int) -> nn.Module:
        """The second sublayer of a block."""
        return FeedForward(self.config.width, self.config.ffn_hidden)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to the last layer's output (B, T, D)."""
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(self.embedding_norm(x))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.final_norm(x))

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Logits (P, V) at the masked positions."""
        x = self.hidden(batch.inputs).flatten(0, 1).index_select(0, batch.positions)  # (P, D)
        return cast(Tensor, self.decoder(self.transform_norm(F.gelu(self.transform(x)))))


class Bert(MaskedEncoder):
    """BERT, and its ``transformers`` form; made as :class:`MaskedEncoder` is."""

    def to_transformers(self) -> dict[str, Tensor]:
        """The state dict of a ``transformers.BertForMaskedLM`` with these weights.

        Token type 0 is all zeros; tied weights are given under each of their names.

        Raises:
            ValueError: If the model has rotary positions or pre-norm, which that class has not.
        """
        if self.positions is None or self.config.norm != "post":
            raise ValueError(
                "only positions=learned with norm=post has the form of transformers.BertForMaskedLM"
            )
        types = {TOKEN_TYPES: torch.zeros(2, self.config.width)}
        return types | {name: ours.reshape(shape) for name, (ours, shape) in self._theirs().items()}

    @torch.no_grad()
    def load_transformers(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a ``transformers.BertForMaskedLM``.

        There is one segment only, so token type 0 is folded into the positions.

        Args:
            state: Its state dict.

        Raises:
            ValueError: If a key is missing or left over, or a shape differs.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in self.to_transformers().items()}
        state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
        differing = sorted(wanted.keys() ^ state.keys())
        if differing:
            raise ValueError(f"{differing[0]} is missing or left over: give a model of this form")
        for name, shape in wanted.items():
            if state[name].shape != shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, wanted {shape}")
        for name, (ours, _) in self._theirs().items():
            ours.copy_(state[name].view(ours.shape))
        cast(nn.Embedding, self.positions).weight.add_(state[TOKEN_TYPES][0])

    def _theirs(self) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Views of our weights by their names in transformers, and their shapes there."""
        modules = dict(TRANSFORMERS)
        views: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        for i, block in enumerate(self.blocks):
            layer, own = f"bert.encoder.layer.{i}", cast(Block, block).attention
            for ours, theirs in TRANSFORMERS_BLOCK.items():
                modules[f"blocks.{i}.{ours}"] = f"{layer}.{theirs}"
            for name, tensor in own.qkv.named_parameters():  # (3 D, D), (3 D)
                rest = tensor.shape[1:]
                parts = tensor.detach().view(own.heads, 3, own.head_width, *rest).unbind(1)
                for part, view in zip(("query", "key", "value"), parts, strict=True):
                    shape = (self.config.width, *rest)  # of (H, K, D), (H, K)
                    views[f"{layer}.attention.self.{part}.{name}"] = view, shape
        for ours, theirs in modules.items():
            for name, tensor in self.get_submodule(ours).named_parameters():
                views[f"{theirs}.{name}"] = tensor.detach(), tuple(tensor.shape)
        views["cls.predictions.bias"] = views["cls.predictions.decoder.bias"]
        return views
