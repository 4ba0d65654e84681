"""Tiny ordinary models of every family, with a loss on a fixed batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]
TRANSFORMERS = ("bert", "roberta", "distilbert", "vit", "llama", "qwen2")
SIZES = {
    "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 32,
    "vocab_size": 40, "max_position_embeddings": 32,
}  # fmt: skip


def build(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Case:
    """A model in training mode without dropout, and its loss.

    Args:
        name: One of ``TRANSFORMERS``, ``encoder`` (post-norm), ``encoder_pre`` (pre-norm, sequence
            first, causal), ``decoder`` or ``sequential``.
        attention: Implementation, for transformers.
        dtype: Of the parameters.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss = _transformers(name, attention) if name in TRANSFORMERS else _torch(name)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype).train(), loss


def _transformers(name: str, attention: str) -> Case:
    import transformers as t

    ids = torch.randint(2, 40, (2, 6))
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[0, 4:] = 0
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = SIZES | {"attn_implementation": attention}
    if name == "bert":
        model = t.BertForMaskedLM(t.BertConfig(**sizes, **off))
    elif name == "roberta":
        model = t.RobertaForSequenceClassification(t.RobertaConfig(**sizes, **off))
    elif name == "distilbert":
        config = t.DistilBertConfig(
            dim=24, n_heads=4, n_layers=3, hidden_dim=32, vocab_size=40, dropout=0.0,
            attention_dropout=0.0, seq_classif_dropout=0.0, max_position_embeddings=32,
            attn_implementation=attention,
        )  # fmt: skip
        model = t.DistilBertForSequenceClassification(config)
    elif name == "vit":
        small = {
            key: value for key, value in sizes.items() if "vocab" not in key and "max" not in key
        }
        model = t.ViTForImageClassification(t.ViTConfig(image_size=8, patch_size=4, **small, **off))
        images = torch.randn(2, 3, 8, 8)
        dtype_of = lambda m: next(m.parameters()).dtype  # noqa: E731
        return model, lambda m: m(pixel_values=images.to(dtype_of(m))).logits.square().mean()
    else:
        config_of = t.LlamaConfig if name == "llama" else t.Qwen2Config
        model_of = t.LlamaForCausalLM if name == "llama" else t.Qwen2ForCausalLM
        model = model_of(config_of(**sizes, num_key_value_heads=2, use_cache=False))
    return model, lambda m: m(input_ids=ids, attention_mask=padding).logits.square().mean()


def _torch(name: str) -> Case:
    x = torch.randn(3, 5, 24)
    if name == "sequential":
        model = nn.Sequential(
            nn.Linear(24, 32), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(32, 16),
            nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3),
        )  # fmt: skip
        return model, lambda m: m(cast(x, m)).square().mean()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    if name == "decoder":
        layer = nn.TransformerDecoderLayer(24, 4, 32, 0.0, batch_first=True)
        decoder = nn.TransformerDecoder(layer, 2)
        memory = torch.randn(3, 7, 24)
        return decoder, lambda m: m(cast(x, m), cast(memory, m)).square().mean()
    pre = name == "encoder_pre"
    layer = nn.TransformerEncoderLayer(24, 4, 32, 0.0, batch_first=not pre, norm_first=pre)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    if not pre:
        return encoder, lambda m: m(cast(x, m), src_key_padding_mask=padding).square().mean()
    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    return encoder, lambda m: m(cast(x, m), mask=cast(causal, m), is_causal=True).square().mean()


def cast(x: Tensor, model: nn.Module) -> Tensor:
    """A batch in the precision of a model."""
    return x.to(next(model.parameters()).dtype)
