"""A dense switch layer, forward and backward, against the sparse MLP of ``transformers``.

    python -m benchmarks.switch

Equal sizes and router weights, bf16 autocast, 16 x 128 tokens, 8 experts. Ours computes capacity
factor x tokens slots; theirs has no limit, so that at factor 1 both compute equally many rows.
Beside it the other ways to compute experts: one by one, all in one padded batch product,
``grouped_mm`` over the tokens in order of their experts (no padding, no drops). Gates of a Switch
block: ``python -m benchmarks.gates switch_block``.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE, TOY, Row, autocast, medians, row, write
from benchmarks.subjects import BLOCK, stock_experts
from mat.suite.models import switch
from mat.suite.models.switch import Experts

SAMPLES, LENGTH = (2, 16) if TOY else (16, 128)
WANTED = {32: None} if TOY else {256: 1 / 1.5, 768: 1.0}  # by width
REPEATS = {32: 1, 256: 21, 768: 7}


def layer_of(width: int, factor: float) -> Experts:
    """Our layer."""
    config = replace(BLOCK, width=width, ffn_hidden=4 * width, capacity_factor=factor)
    return Experts(config).to(DEVICE)


class Grouped(nn.Module):
    """The experts and the router of a layer of ours, by ``grouped_mm``."""

    def __init__(self, ours: Experts) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        tokens = x.flatten(0, 1)  # (N, D)
        probability, expert, load = self.ours.route(tokens)
        order, ends = expert.argsort(stable=True), load.cumsum(0, dtype=torch.int32)
        rows, of = tokens[order], expert[order]
        w_in, b_in, w_out, b_out = (each.bfloat16() for each in self.ours.stacked())
        hidden = F.gelu(F.grouped_mm(rows.bfloat16(), w_in.mT, offs=ends) + b_in[of])
        rows = F.grouped_mm(hidden, w_out.mT, offs=ends) + b_out[of]
        return (rows * probability[order, None])[order.argsort()].view_as(x)


def chunked(action: Callable[[], None], at_once: int) -> Callable[[], None]:
    """With so many bytes of a weight of the experts computed at once."""

    def run() -> None:
        with mock.patch.object(switch, "CACHE_BYTES", at_once):
            action()

    return run


def ways(ours: Experts, x: Tensor, gradient: Tensor) -> list[Row]:
    """The layer as shipped against the other ways to compute its experts."""
    width, shipped = ours.config.width, forward_and_backward(ours, x, gradient)
    others = {
        "one expert at a time": chunked(shipped, 1),
        "all experts at once": chunked(shipped, 2**40),
    }
    grouped = forward_and_backward(Grouped(ours), x, gradient)
    try:
        grouped()
        others["grouped_mm"] = grouped
    except (AttributeError, RuntimeError) as error:
        print(f"no grouped_mm here: {str(error).splitlines()[0]}")
    one, *rest = medians([shipped, *others.values()], REPEATS[width])
    return [
        row(f"width {width}: as shipped against {name}", one, time, 1.05)
        for name, time in zip(others, rest, strict=True)
    ]


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
    """Both widths, at factors 1 and 1.25, and beside a feed-forward layer of the same width."""
    rows: list[Row] = []
    for width, wanted in WANTED.items():
        torch.manual_seed(0)
        ours, roomy = layer_of(width, 1.0), layer_of(width, 1.25)
        roomy.load_state_dict(ours.state_dict())
        x = torch.randn(SAMPLES, LENGTH, width, device=DEVICE, requires_grad=True)
        gradient = torch.randn(SAMPLES, LENGTH, width, device=DEVICE)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        layers = [ours, roomy, stock_experts(ours), nn.Sequential(up, nn.GELU(), down).to(DEVICE)]
        actions = [forward_and_backward(layer, x, gradient) for layer in layers]
        one, more, theirs, dense = medians(list(actions), REPEATS[width])
        dropped = ", ".join(f"{float(m.monitors()['drop_rate']):.3f}" for m in (ours, roomy))
        print(f"width {width}: dropped shares of the tokens {dropped}")
        rows.append(row(f"width {width}: factor 1 against transformers", one, theirs, wanted))
        rows.append(row(f"width {width}: factor 1.25 against transformers", more, theirs, None))
        label = f"width {width}: factor 1 against a feed-forward layer"
        rows.append(row(label, one, dense, None))
        rows += ways(ours, x, gradient)
        write("switch", rows)


if __name__ == "__main__":
    main()
