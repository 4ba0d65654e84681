"""Modules of torch that compute their products themselves, as :class:`mat.taps.Tape` sees them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mat.layers.multihead import merged
from mat.products import BY_SAMPLE
from mat.taps import Tape, recorder


@recorder
def batch_norm(module: nn.Module) -> Callable[..., Any] | None:
    """Batch norm with the statistics of the probe, held fixed (paper section 5)."""
    return partial(_normalise, module) if isinstance(module, _BatchNorm) else None


def _normalise(module: _BatchNorm, tape: Tape, x: Tensor) -> Tensor:
    """(n, C, ...) normalised; running statistics neither count nor move."""
    key = id(module), tape.call_number(module)
    if key not in tape.constants:
        exact = torch.promote_types(x.dtype, torch.float32)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        tape.constants[key] = torch.var_mean(x.detach().to(exact), axes, correction=0)
    variance, mean = tape.constants[key]
    normal = F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps)
    if module.weight is None:
        return normal
    pair = []
    for parameter in (module.weight, module.bias):
        # Every row of the batch has a copy, whose gradient is its own: a product with 1.
        copies = parameter.to(x.dtype).expand(len(x), 1, -1).clone()  # (n, 1, C)
        ones = x.new_ones(len(x), 1, 1)
        copies = tape.product(ones, copies, parameter, None, "batch norm", BY_SAMPLE)
        pair.append(copies.view(len(x), -1, *[1] * (x.dim() - 2)))  # (n, C, 1, 1)
    gain, shift = pair
    return torch.addcmul(shift, normal, gain)


@recorder
def multihead_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Attention of torch, which calls none of its linear layers."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return None
    return partial(_attend, module)


def _attend(
    module: nn.MultiheadAttention,
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """The outputs of the module; it gives no attention weights."""
    width, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
    heads = []
    for i, x in enumerate((query, key, value)):
        rows = slice(i * width, (i + 1) * width)
        x = x if module.batch_first else x.transpose(0, 1)  # (n, T, D)
        y = F.linear(x, weight[rows], None if bias is None else bias[rows])
        y = tape.product(x, y, weight, bias, "in_proj_weight", BY_SAMPLE, rows)
        y = y.view(*y.shape[:2], module.num_heads, -1)
        heads.append(y.transpose(1, 2))  # (n, H, T, K)
    q, k, v = heads
    context = F.scaled_dot_product_attention(q, k, v, merged(attn_mask, key_padding_mask, q))
    context = context.transpose(1, 2).flatten(2)  # (n, T, D)
    out = module.out_proj
    y = F.linear(context, out.weight, out.bias)
    y = tape.product(context, y, out.weight, out.bias, "out_proj", BY_SAMPLE)
    return y if module.batch_first else y.transpose(0, 1), None
