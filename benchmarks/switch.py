"""A dense switch layer, forward and backward, against the sparse MLP of ``transformers`` at equal sizes.

    python -m benchmarks.switch

bf16 autocast, 16 x 128 tokens, 8 experts, the same router weights. Ours computes capacity factor x tokens slots; theirs
has no limit, so that at factor 1 both compute equally many rows. Beside it the other ways to compute experts: one by
one, all in one padded batch product, ``grouped_mm`` over the tokens in order of their experts (no padding, no drops).
Gates of a Switch block: ``python -m benchmarks.gates switch_block``.
"""

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Row, autocast, medians, row, write
from mat.suite import switch
from mat.suite.config import SwitchConfig
from mat.suite.switch import Experts

SAMPLES, LENGTH, EXPERTS = 16, 128, 8
WANTED = {256: 1 / 1.5, 768: 1.0}
REPEATS = {256: 21, 768: 7}


def layer_of(width: int, factor: float) -> Experts:
    """Our layer."""
    return Experts(
        SwitchConfig(
            name="layer", layers=1, width=width, heads=4, ffn_hidden=4 * width, ffn_groups=1, experts=EXPERTS,
            capacity_factor=factor, positions="rotary", norm="pre",
        )
    ).to(DEVICE)  # fmt: skip


def their_layer(ours: Experts) -> nn.Module:
    """Theirs with our router."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    theirs: nn.Module = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(
            d_model=ours.config.width, d_ff=ours.config.ffn_hidden, num_experts=EXPERTS, expert_capacity=10**9,
            dense_act_fn="gelu", dropout_rate=0.0, router_jitter_noise=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(ours.router)  # type: ignore[union-attr,operator]
    return theirs.to(DEVICE).train()


class Grouped(nn.Module):
    """The experts and the router of a layer of ours, by ``grouped_mm``."""

    def __init__(self, ours: Experts) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        tokens = x.flatten(0, 1)
        gate, expert, load = self.ours._route(tokens)
        order, ends = expert.argsort(stable=True), load.cumsum(0, dtype=torch.int32)
        rows, of = tokens[order], expert[order]
        for name, bias in self.ours.products.items():
            weight, biases = self.ours.get_parameter(name), self.ours.get_parameter(str(bias))
            rows = F.gelu(rows) if name == "out_weight" else rows
            rows = F.grouped_mm(rows.bfloat16(), weight.bfloat16().mT, offs=ends) + biases.bfloat16()[of]
        return (rows * gate[order, None])[order.argsort()].view_as(x)


def chunked(action: Callable[[], None], at_once: int) -> Callable[[], None]:
    """With so many bytes of a weight of the experts computed at once."""

    def run() -> None:
        with mock.patch.object(switch, "CACHE_BYTES", at_once):
            action()

    return run


def ways(ours: Experts, x: Tensor, gradient: Tensor) -> list[Row]:
    """The layer as shipped against the other ways to compute its experts."""
    width, shipped = ours.config.width, forward_and_backward(ours, x, gradient)
    others = {"one expert at a time": chunked(shipped, 1), "all experts at once": chunked(shipped, 2**40)}
    grouped = forward_and_backward(Grouped(ours), x, gradient)
    try:
        grouped()
        others["grouped_mm"] = grouped
    except (AttributeError, RuntimeError) as error:
        print(f"no grouped_mm here: {str(error).splitlines()[0]}")
    one, *rest = medians([shipped, *others.values()], REPEATS[width])
    return [row(f"width {width}: as shipped against {n}", one, t, 1.05) for n, t in zip(others, rest, strict=True)]


def forward_and_backward(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Both, to the input and all parameters."""

    def action() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with autocast():
            y = layer(x)
        y.backward(gradient.to(y.dtype))

    return action


def main() -> None:
    """Both widths, at capacity factors 1 and 1.25, and beside a plain feed-forward layer of the same width."""
    rows: list[Row] = []
    for width, wanted in WANTED.items():
        torch.manual_seed(0)
        ours, roomy = layer_of(width, 1.0), layer_of(width, 1.25)
        roomy.load_state_dict(ours.state_dict())
        x = torch.randn(SAMPLES, LENGTH, width, device=DEVICE, requires_grad=True)
        gradient = torch.randn(SAMPLES, LENGTH, width, device=DEVICE)
        plain = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(DEVICE)
        layers = [ours, roomy, their_layer(ours), plain]
        one, more, theirs, dense = medians([forward_and_backward(m, x, gradient) for m in layers], REPEATS[width])
        dropped = ", ".join(f"{float(m.monitors()['drop_rate']):.3f}" for m in (ours, roomy))
        print(f"width {width}: dropped shares of the tokens {dropped}")
        rows.append(row(f"width {width}: factor 1 against transformers", one, theirs, wanted))
        rows.append(row(f"width {width}: factor 1.25 against transformers", more, theirs, None))
        rows.append(row(f"width {width}: factor 1 against a feed-forward layer", one, dense, None))
        rows += ways(ours, x, gradient)
        write("switch", rows)


if __name__ == "__main__":
    main()
