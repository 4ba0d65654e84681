"""A dense switch layer, forward and backward, against the sparse MLP of ``transformers`` at equal sizes.

    python -m benchmarks.switch

bf16 autocast, 16 x 128 tokens, 8 experts, the same router weights. Ours computes capacity factor x tokens slots; theirs
has no limit, so that at factor 1 both compute equally many rows. Gates of a Switch block: ``python -m benchmarks.gates
switch_block``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Row, autocast, medians, row, write
from mat.config import SwitchConfig
from mat.switch import Experts

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
        write("switch", rows)


if __name__ == "__main__":
    main()
