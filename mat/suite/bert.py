"""BERT with unit-major parameters: heads and feed-forward groups are the units (paper section 5).

``MaskedEncoder`` is what every masked language model here shares; ``Bert`` is the one with plain feed-forward layers.

With learned positions and post-norm the logits equal ``transformers.BertForMaskedLM`` given the same weights, which
load from and save to that form (``load_transformers``, ``to_transformers``). Token type 0 is folded into the position
embeddings: there is one segment only. ``positions="rotary"`` and ``norm="pre"`` make the mini model leave the
plateau near the unigram entropy within minutes.

Shapes: B sequences, T tokens, D width, H heads, K = D / H, G feed-forward groups, F neurons, M masked positions
per sequence, P = B * M, V pieces in the vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat.suite.attention import attend, attend_backward, attention, rotary_part, rotary_table
from mat.suite.config import BertConfig
from mat.suite.data.masking import MaskedBatch
from mat.suite.interface import Flops, UnitModel
from mat.suite.units import UnitLayer, UnitTensors

TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"


def _embedding(*shape: int) -> Tensor:
    return torch.empty(*shape).normal_(0.0, 0.02)


def initial_weight(*shape: int, width: int) -> Tensor:
    """BERT's 0.02 at its width of 768, scaled so that narrower models start with equally large products."""
    return torch.empty(*shape).normal_(0.0, 0.02 * math.sqrt(768 / width))


class Attention(UnitLayer):
    """Multi-head self-attention whose units are heads: rows of Q, K, V with biases, columns of the output projection.

    Args:
        width: D.
        heads: H.
        rotary: Rotate queries and keys.
    """

    rotary: Tensor | None
    qkv_weight: nn.Parameter
    qkv_bias: nn.Parameter
    out_weight: nn.Parameter

    def __init__(self, width: int, heads: int, rotary: Tensor | None) -> None:
        super().__init__("heads", heads)
        self.head_width = width // heads
        self.add_product("qkv_weight", initial_weight(heads, 3 * self.head_width, width, width=width), "qkv_bias")
        self.add_product("out_weight", initial_weight(heads, self.head_width, width, width=width))
        self.register_buffer("rotary", rotary, persistent=False)

    def compute(self, x: Tensor, w: UnitTensors) -> Tensor:
        """(B, T, D) to (B, T, D) for the heads in ``w``."""
        batch, length, _ = x.shape
        heads = w["qkv_bias"].shape[0]
        qkv = F.linear(x, w["qkv_weight"].flatten(0, 1), w["qkv_bias"].flatten())
        qkv = self.tap("qkv_weight", x, True, qkv.view(batch, length, heads, 3 * self.head_width))
        context = attention(qkv.view(batch, length, heads, 3, self.head_width), self.rotary)
        y = F.linear(context.flatten(2), w["out_weight"].flatten(0, 1).T)
        return self.tap("out_weight", context, False, y)

    def gated(self, x: Tensor) -> Tensor:
        """One dense forward, and a backward of its own; on CUDA PyTorch's fused kernel, for active and frozen apart."""
        if x.device.type != "cpu":
            return cast(Tensor, super().gated(x))
        y: Tensor = _GatedAttention.apply(x, *self.active_leaves(), self)
        return y

    def probabilities(self, x: Tensor) -> Tensor:
        """Attention matrices (B, H, T, T) of an input (B, T, D)."""
        qkv = F.linear(x, self.qkv_weight.flatten(0, 1), self.qkv_bias.flatten())
        qkv = qkv.view(*x.shape[:2], self.n_units, 3, self.head_width)
        return attend(qkv, rotary_part(self.rotary, qkv))[2]

    def inner_flops(self, tokens: int, length: int) -> int:
        """Scores and context: two products of T x T x K per head and sequence."""
        return 4 * tokens * length * self.head_width


class FeedForward(UnitLayer):
    """Two-layer feed-forward network whose units are groups of hidden neurons.

    Args:
        width: D.
        hidden: F, divisible by the number of groups.
        groups: G.
    """

    in_weight: nn.Parameter
    in_bias: nn.Parameter
    out_weight: nn.Parameter

    def __init__(self, width: int, hidden: int, groups: int) -> None:
        super().__init__("ffn", groups)
        self.group_width = hidden // groups
        self.add_product("in_weight", initial_weight(groups, self.group_width, width, width=width), "in_bias")
        self.add_product("out_weight", initial_weight(groups, self.group_width, width, width=width))

    def compute(self, x: Tensor, w: UnitTensors) -> Tensor:
        """(B, T, D) to (B, T, D) for the groups in ``w``."""
        batch, length, _ = x.shape
        groups = w["in_bias"].shape[0]
        z = F.linear(x, w["in_weight"].flatten(0, 1), w["in_bias"].flatten())
        z = self.tap("in_weight", x, True, z.view(batch, length, groups, self.group_width)).flatten(2)
        hidden = F.gelu(z)  # (B, T, F)
        y = F.linear(hidden, w["out_weight"].flatten(0, 1).T)
        return self.tap("out_weight", hidden.view(batch, length, groups, self.group_width), False, y)

    def gated(self, x: Tensor) -> Tensor:
        """One dense forward, and a backward of its own."""
        y: Tensor = _GatedFeedForward.apply(x, *self.active_leaves(), self)
        return y


class _GatedAttention(torch.autograd.Function):
    """All heads forward; backward through the active heads (``cut``), or through all for the active heads' weights.

    In ``cut`` nothing of the frozen heads is kept. Inputs: x (B, T, D), the active heads' rows of qkv weight, qkv bias
    and output weight, the layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, qkv_a: Tensor, bias_a: Tensor, out_a: Tensor, layer: Attention) -> Tensor:
        qkv = F.linear(x, layer.qkv_weight.flatten(0, 1), layer.qkv_bias.flatten())
        qkv = qkv.view(*x.shape[:2], layer.n_units, 3, layer.head_width)
        ctx.table, ctx.layer, ctx.exact = rotary_part(layer.rotary, qkv), layer, layer.mode == "exact"
        context, packed, probabilities = attend(qkv, ctx.table)
        active = layer.active_index(x.device)
        if not ctx.exact:
            packed, probabilities = packed.index_select(2, active), probabilities.index_select(1, active)
        context_a = context.index_select(2, active)
        ctx.save_for_backward(x.to(qkv.dtype), context_a, packed, probabilities, qkv_a, out_a, active)
        return F.linear(context.flatten(2), layer.out_weight.flatten(0, 1).T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, context_a, packed, probabilities, qkv_a, out_a, active = ctx.saved_tensors
        qkv_weight, out_weight = (ctx.layer.qkv_weight, ctx.layer.out_weight) if ctx.exact else (qkv_a, out_a)
        g = gradient.to(x.dtype).flatten(0, 1)  # (B T, D)
        d_context = (g @ out_weight.flatten(0, 1).to(x.dtype).T).view(*x.shape[:2], -1, context_a.shape[3])
        d_qkv = attend_backward(d_context, packed, probabilities, ctx.table).flatten(2).flatten(0, 1)  # (B T, h 3 K)
        d_x = (d_qkv @ qkv_weight.flatten(0, 1).to(x.dtype)).view_as(x)
        if ctx.exact:
            d_qkv = d_qkv.view(len(d_qkv), ctx.layer.n_units, -1).index_select(1, active).flatten(1)
        d_weight = d_qkv.T @ x.flatten(0, 1)
        d_out = context_a.flatten(2).flatten(0, 1).T @ g
        d_bias = d_qkv.sum(0).view(qkv_a.shape[:2])
        return d_x, d_weight.view_as(qkv_a), d_bias, d_out.view_as(out_a), None


class _GatedFeedForward(torch.autograd.Function):
    """All groups forward; backward through the active groups (``cut``), or through all for the active groups' weights.

    In ``cut`` nothing of the frozen groups is kept. Inputs: x (B, T, D), the active groups' rows of input weight,
    input bias and output weight, the layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_a: Tensor, bias_a: Tensor, out_a: Tensor, layer: FeedForward) -> Tensor:
        z = F.linear(x, layer.in_weight.flatten(0, 1), layer.in_bias.flatten())
        ctx.layer, ctx.exact = layer, layer.mode == "exact"
        active = layer.active_index(x.device)
        kept = z if ctx.exact else _groups(z.flatten(0, 1), layer, active)
        ctx.save_for_backward(x.to(z.dtype), kept, in_a, out_a, active)
        return F.linear(F.gelu(z), layer.out_weight.flatten(0, 1).T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, z, in_a, out_a, active = ctx.saved_tensors
        in_weight, out_weight = (ctx.layer.in_weight, ctx.layer.out_weight) if ctx.exact else (in_a, out_a)
        g, z = gradient.to(x.dtype).flatten(0, 1), z.view(-1, z.shape[-1])
        d_z = torch.ops.aten.gelu_backward(g @ out_weight.flatten(0, 1).to(x.dtype).T, z)  # (B T, g F / G)
        d_x = (d_z @ in_weight.flatten(0, 1).to(x.dtype)).view_as(x)
        if ctx.exact:
            d_z, z = _groups(d_z, ctx.layer, active), _groups(z, ctx.layer, active)
        d_weight = d_z.T @ x.flatten(0, 1)
        d_out = F.gelu(z).T @ g
        return d_x, d_weight.view_as(in_a), d_z.sum(0).view(in_a.shape[:2]), d_out.view_as(out_a), None


def _groups(z: Tensor, layer: FeedForward, active: Tensor) -> Tensor:
    """(B T, F) to the columns of the active groups, (B T, g F / G)."""
    return z.view(-1, layer.n_units, layer.group_width).index_select(1, active).flatten(1)


class Block(nn.Module):
    """Attention and feed-forward sublayers with residual connections, normalised before or after.

    Args:
        config: The model's configuration.
        rotary: Table for rotary positions or None.
        feed_forward: Makes the second sublayer.
    """

    def __init__(self, config: BertConfig, rotary: Tensor | None, feed_forward: Callable[[], UnitLayer]) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = Attention(config.width, config.heads, rotary)
        self.attention_bias = nn.Parameter(torch.zeros(config.width))
        self.attention_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.ffn = feed_forward()
        own_bias = "out_bias" in self.ffn.unit_parameters()
        self.ffn_bias = None if own_bias else nn.Parameter(torch.zeros(config.width))
        self.ffn_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x)) + self.attention_bias)
            return cast(Tensor, x + self.dropout(self._second(self.ffn_norm(x))))
        x = self.attention_norm(x + self.dropout(self.attention(x) + self.attention_bias))
        return cast(Tensor, self.ffn_norm(x + self.dropout(self._second(x))))

    def _second(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.ffn(x))
        return y if self.ffn_bias is None else y + self.ffn_bias


class MaskedEncoder(UnitModel):
    """A Transformer encoder for masked language modelling; logits are computed at masked positions only.

    Args:
        config: The model's configuration.
        vocabulary: V.
        length: Longest sequence T.
    """

    def __init__(self, config: BertConfig, vocabulary: int, length: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        rotary = rotary_table(length, width // config.heads) if config.positions == "rotary" else None
        self.tokens = nn.Parameter(_embedding(vocabulary, width))
        self.positions = nn.Parameter(_embedding(length, width)) if config.positions == "learned" else None
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, rotary, partial(self.feed_forward, layer)) for layer in range(config.layers)
        )
        self.final_norm = nn.LayerNorm(width, eps=1e-12) if config.norm == "pre" else nn.Identity()
        self.transform_weight = nn.Parameter(initial_weight(width, width, width=width))
        self.transform_bias = nn.Parameter(torch.zeros(width))
        self.transform_norm = nn.LayerNorm(width, eps=1e-12)
        self.vocabulary_bias = nn.Parameter(torch.zeros(vocabulary))
        if config.norm == "pre":  # GPT-2's rule: residual branches start small so that depth does not add variance
            for name, parameter in self.named_parameters():
                if name.endswith("out_weight"):
                    parameter.data.div_(math.sqrt(2 * config.layers))

    def feed_forward(self, layer: int) -> UnitLayer:
        """The second sublayer of block number ``layer``."""
        return FeedForward(self.config.width, self.config.ffn_hidden, self.config.ffn_groups)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) to the last layer's output (B, T, D)."""
        x = F.embedding(tokens, self.tokens)
        if self.positions is not None:
            x = x + self.positions[: tokens.shape[1]]
        x = self.dropout(self.embedding_norm(x))
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.final_norm(x))

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Logits (P, V) at the masked positions."""
        x = self.hidden(batch.inputs).flatten(0, 1).index_select(0, batch.positions)  # (P, D)
        x = self.transform_norm(F.gelu(F.linear(x, self.transform_weight, self.transform_bias)))
        return F.linear(x, self.tokens, self.vocabulary_bias)

    def rest_flops(self, batch: MaskedBatch) -> Flops:
        """The masked-LM head; the vocabulary projection in its own column."""
        rows, width = batch.positions.numel(), self.config.width
        head, vocabulary = 2 * rows * width * width, 2 * rows * width * self.tokens.shape[0]
        return Flops(forward=head, input_grad=head, weight_grad=head, vocabulary=3 * vocabulary)

    def outputs_per_sample(self, batch: MaskedBatch) -> int:
        """M * V."""
        return batch.positions.numel() // batch.samples * self.tokens.shape[0]


class Bert(MaskedEncoder):
    """BERT, and its ``transformers`` form; made as :class:`MaskedEncoder` is."""

    def to_transformers(self) -> dict[str, Tensor]:
        """The weights under the names and shapes of ``transformers.BertForMaskedLM`` (token type 0 is all zeros).

        Returns:
            A state dict with tied decoder weights given once under each of their names.

        Raises:
            ValueError: If the model has rotary positions or pre-norm, which that class does not have.
        """
        if self.positions is None or self.config.norm != "post":
            raise ValueError("only positions=learned with norm=post has the form of transformers.BertForMaskedLM")
        state = {TOKEN_TYPES: torch.zeros(2, self.config.width)}
        for name, (ours, transposed) in self._by_their_names().items():
            plain = ours.flatten() if name.endswith("bias") else ours.flatten(0, max(0, ours.dim() - 2))
            state[name] = (plain.T if transposed else plain).clone()
        return state

    @torch.no_grad()
    def load_transformers(self, state: dict[str, Tensor]) -> None:
        """Take the weights of a ``transformers.BertForMaskedLM``; token type 0 is folded into the positions.

        Args:
            state: Its state dict.

        Raises:
            ValueError: If a key is missing or left over, or a shape differs.
        """
        expected = self.to_transformers()
        state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
        differing = sorted(expected.keys() ^ state.keys())
        if differing:
            raise ValueError(f"the state dict does not fit this model: {differing[0]} is missing or left over")
        for name, tensor in expected.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(tensor.shape)}")
        for name, (ours, transposed) in self._by_their_names().items():
            ours.copy_((state[name].T if transposed else state[name]).reshape(ours.shape))
        cast(Tensor, self.positions).add_(state[TOKEN_TYPES][0])

    def _by_their_names(self) -> dict[str, tuple[Tensor, bool]]:
        """Views of the weights by their names there, and whether a weight is stored transposed there."""
        named: dict[str, tuple[Tensor, bool]] = {}

        def add(theirs: str, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> None:
            named[f"{theirs}.weight"] = weight.detach(), transposed
            if bias is not None:
                named[f"{theirs}.bias"] = bias.detach(), False

        head = "cls.predictions"
        add(f"{head}.decoder", self.tokens, self.vocabulary_bias)
        add("bert.embeddings.word_embeddings", self.tokens)
        add("bert.embeddings.position_embeddings", cast(Tensor, self.positions))
        add("bert.embeddings.LayerNorm", self.embedding_norm.weight, self.embedding_norm.bias)
        add(f"{head}.transform.dense", self.transform_weight, self.transform_bias)
        add(f"{head}.transform.LayerNorm", self.transform_norm.weight, self.transform_norm.bias)
        named[f"{head}.bias"] = self.vocabulary_bias.detach(), False
        for i, block in enumerate(cast(list[Block], self.blocks)):
            theirs = f"bert.encoder.layer.{i}"
            attention, ffn = block.attention, cast(FeedForward, block.ffn)
            weights, biases = (p.chunk(3, dim=1) for p in (attention.qkv_weight, attention.qkv_bias))  # of (H, K, D)
            for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
                add(f"{theirs}.attention.self.{part}", weight, bias)
            add(f"{theirs}.attention.output.dense", attention.out_weight, block.attention_bias, transposed=True)
            add(f"{theirs}.attention.output.LayerNorm", block.attention_norm.weight, block.attention_norm.bias)
            add(f"{theirs}.intermediate.dense", ffn.in_weight, ffn.in_bias)
            add(f"{theirs}.output.dense", ffn.out_weight, block.ffn_bias, transposed=True)
            add(f"{theirs}.output.LayerNorm", block.ffn_norm.weight, block.ffn_norm.bias)
        return named
