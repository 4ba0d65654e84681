"""Heads: attention modules with linear queries, keys, values and output projection (transformers).

With grouped queries a unit is a key-value head and the queries that share it. The attention core is
reached through transformers' own registry: an attached module sees its configuration with another
attention implementation, which runs the model's own kernel on active and frozen heads apart.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mat.adapters.find import Place, finder, linear_site
from mat.layers.attention import attend_apart, core_shares, of_heads
from mat.layers.gate import Gate, Index
from mat.layers.site import Operation, Shares, Site
from mat.units import UnitLayer

# Queries, keys, values, output projection.
NAMES = (
    ("query", "key", "value", "../output.dense"),  # BERT, RoBERTa
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # ViT, Llama, Qwen2, Mixtral
    ("q", "k", "v", "o"),  # Switch Transformers
)
HEADS = ("num_attention_heads", "n_heads", "num_heads")
IMPLEMENTATION = "gated_heads"


@finder
def heads(place: Place) -> Iterator[UnitLayer]:
    """The heads of an attention module of transformers."""
    if not hasattr(place.module, "config") or not type(place.module).__module__.startswith(
        "transformers."
    ):
        return
    for names in NAMES:
        linears = [place.linear(name) for name in names]
        if any(linear is None for linear in linears):
            continue
        q, k, _, out = linears
        assert q is not None and k is not None and out is not None
        sources = (place.module, place.module.config)
        counts = [getattr(s, name) for s in sources for name in HEADS if hasattr(s, name)]
        reason = misfit(place.module, linears, counts[0] if counts else 0)
        if reason is not None:
            place.refuse(names, reason)
            return
        units = counts[0] * k.out_features // q.out_features  # key-value heads
        owner_q = np.repeat(np.arange(units), q.out_features // units)
        owner_kv = np.repeat(np.arange(units), k.out_features // units)
        parts = place.parts(names[0], owner_q, 0)
        parts += place.parts(names[1], owner_kv, 0) + place.parts(names[2], owner_kv, 0)
        owner_out = np.repeat(np.arange(units), out.in_features // units)
        if place.head_output:
            parts += place.parts(names[3], owner_out, 1)
        sites = [linear_site(place.path, place.under(name)) for name in names[:3]]
        below = None if place.head_output else (place.path, owner_out)
        sites.append(linear_site(place.path, place.under(names[3]), below))

        def core(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> CoreSite:
            gate = gate_of(place.path)
            assert gate is not None
            return CoreSite(module, gate)

        yield UnitLayer("heads", place.path, units, parts, [*sites, (place.path, core)])
        return


def misfit(module: nn.Module, linears: Sequence[Any], count: int) -> str | None:
    """Why an attention module with known names has no heads that can be told apart, if so.

    Args:
        module: The module.
        linears: Its queries, keys, values and output projection.
        count: Number of query heads; 0 if it is not known.
    """
    kind = type(module).__name__
    q, k, v, out = linears
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        return f"{kind} has parameters of its own: {', '.join(own)}"
    if q.out_features != out.in_features or k.out_features != v.out_features:
        return f"{kind} makes more of its projections than queries, keys and values"
    if not count or q.out_features % count or count * k.out_features % q.out_features:
        return f"{kind} does not say how many heads it has"
    return None


class ConfigProxy:
    """A model's configuration with another attention implementation."""

    def __init__(self, config: Any) -> None:
        self.__dict__["config"] = config

    def __getattr__(self, name: str) -> Any:
        if name == "_attn_implementation":
            return IMPLEMENTATION
        if name.startswith("__"):  # copy and pickle ask before there is a configuration
            raise AttributeError(name)
        return getattr(self.__dict__["config"], name)


class CoreSite(Site):
    """The attention core of a module of transformers."""

    def __init__(self, module: nn.Module, gate: Gate) -> None:
        super().__init__(module, gate)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self.gate, self.config = gate, module.config
        ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, run_core)

    def attach(self) -> None:
        """Show the module another attention implementation."""
        self.module.config = ConfigProxy(self.config)  # type: ignore[assignment]
        self.module._core_gate = self.gate  # type: ignore[assignment]

    def detach(self) -> None:
        """Show it the model's own."""
        self.module.config = self.config
        del self.module._core_gate

    def shares(self, operation: Operation, executed: bool = True) -> Shares:
        """See :meth:`Site.shares`."""
        return core_shares(self.gate)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_core(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of an attached module, with the signature of transformers' attention functions.

    Args:
        module: The attention module.
        query: (B, H, T, K).
        key: (B, G, S, K).
        value: (B, G, S, K).
        attention_mask: Broadcasts to (B, H, T, S), or None.
        **named: What else the model passes to its kernel.

    Returns:
        Context (B, T, H, K) and attention weights (B, H, T, S) or None.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    proxy = module.config
    chosen = proxy.config._attn_implementation
    kernel: Any = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager)
    heads = query.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor, index: Index) -> tuple[Tensor, Tensor | None]:
        options = dict(named)
        if "position_bias" in options:
            options["position_bias"] = of_heads(options["position_bias"], index, heads)
        result: tuple[Tensor, Tensor | None] = kernel(
            module, q, k, v, of_heads(attention_mask, index, heads), **options
        )
        return result

    module.config = proxy.config  # flash attention looks its own name up there
    try:
        return attend_apart(module._core_gate, attend, query, key, value)
    finally:
        module.config = proxy
