"""The FLOPs ledger against torch's counter on what really runs, and against figures worked by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from mat.suite.bert import Attention, Bert, FeedForward
from mat.suite.flops import Flops
from mat.suite.units import UnitIndex, unit_layers
from tiny import shapes, tiny_batch, tiny_bert, tiny_config

from mat import gram
from mat.suite import flops, ntk
from mat.suite.data.masking import MaskedBatch

# Active units per layer (heads, groups, heads, groups; three each). Counts differ so that no two layers cost the same.
ACTIVE = {
    "all": (3, 3, 3, 3),
    "none": (0, 0, 0, 0),
    "one": (0, 0, 1, 0),
    "mixed": (1, 2, 3, 1),
    "empty layer at the bottom": (0, 2, 1, 3),
    "empty layers at the top": (2, 1, 0, 0),
    "heads gated only": (1, 3, 2, 3),
}


def with_gates(counts: tuple[int, ...], mode: Any = "cut", **options: Any) -> Bert:
    """A BERT none of whose sizes agree, with so many active units per layer."""
    sizes = {"width": 12, "heads": 3, "ffn_hidden": 21, "ffn_groups": 3, "vocabulary": 17, "length": 7}
    model = tiny_bert(**(sizes | options))
    for layer, count in zip(unit_layers(model), counts, strict=True):
        layer.set_active(np.arange(layer.n_units) < count, mode)
    return model


@pytest.mark.parametrize("form", [("pre", "rotary"), ("post", "learned")], ids=str)
@pytest.mark.parametrize("case", shapes(mode=("cut", "exact"), counts=tuple(ACTIVE)), ids=str)
def test_training_step_equals_the_counter(case: dict[str, Any], form: tuple[str, str]) -> None:
    model = with_gates(ACTIVE[case["counts"]], case["mode"], norm=form[0], positions=form[1])
    for samples in (5, 2):  # the last batch is short
        batch = tiny_batch(samples=samples, length=7, masked=2, vocabulary=17)
        with flops.flop_counter() as forward:
            loss = model.loss(batch)
        with flops.flop_counter() as backward:
            loss.backward()
        expected = flops.training_step(model, batch)
        vocabulary = expected.vocabulary // 3
        assert forward.get_total_flops() == expected.forward + vocabulary
        assert backward.get_total_flops() == expected.input_grad + expected.weight_grad + 2 * vocabulary
        assert expected.overhead == 0


def test_input_gradients_and_weight_gradients_are_told_apart() -> None:
    """When no weight wants a gradient the input gradients are left, down to the biases of the lowest layer norm."""
    model, batch = with_gates((3, 3, 3, 3)), tiny_batch(length=7, vocabulary=17)
    expected = flops.training_step(model, batch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("weight" not in name and name != "tokens")
    loss = model.loss(batch)
    with flops.flop_counter() as backward:
        loss.backward()
    assert backward.get_total_flops() == expected.input_grad + expected.vocabulary // 3


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_costs_what_the_full_batch_costs(parts: int, mode: str) -> None:
    model, batch = with_gates(ACTIVE["mixed"], mode), tiny_batch(samples=5, length=7, vocabulary=17)
    with flops.flop_counter() as counter:
        for part in batch.split(parts):
            model.loss(part).backward()
    assert counter.get_total_flops() == flops.training_step(model, batch).everything


@pytest.mark.parametrize("kinds", [("heads", "ffn"), ("heads",), ("ffn",)], ids=str)
@pytest.mark.parametrize("memory_bytes", [2**29, 1], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize(
    "reduction, projections", [("random", 1), ("random", 3), ("sum", 1), ("loss", 1), ("full", 1)], ids=str
)
def test_estimate_equals_the_counter(
    reduction: ntk.Reduction, projections: int, memory_bytes: int, kinds: tuple[str, ...]
) -> None:
    """The gates are partly closed, which the estimator does not care about."""
    model, batch = with_gates(ACTIVE["mixed"]), tiny_batch(length=7, vocabulary=17)
    index = UnitIndex(unit_layers(model), kinds)
    with flops.flop_counter() as counter:
        ntk.estimate(model, batch, index, reduction=reduction, projections=projections, memory_bytes=memory_bytes)
    expected = flops.estimate(model, batch, index.layers, reduction, projections, memory_bytes)
    assert counter.get_total_flops() == expected.everything
    assert (expected.forward, expected.input_grad, expected.weight_grad) == (0, 0, 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("memory_bytes", [2**29, 20_000, 1])
@pytest.mark.parametrize(
    "sizes, contraction", [((3, 40, 4, 6, 7), "gradients"), ((3, 2, 4, 30, 30), "pairs")], ids=["gradients", "pairs"]
)
def test_gram_products_equal_the_counter(
    sizes: tuple[int, ...], contraction: str, memory_bytes: int, bias: bool
) -> None:
    n, t, u, p, q = sizes
    chosen = gram.plan(*sizes, memory_bytes)
    assert chosen.contraction == contraction
    with flops.flop_counter() as counter:
        gram.unit_gram([(torch.ones(n, t, u, p), torch.ones(n, t, q))], bias, memory_bytes)
    assert counter.get_total_flops() == gram.unit_flops(n, t, u, p, q, bias, memory_bytes)
    assert counter.get_total_flops() == chosen.flops + (2 * n * n * u * p if bias else 0)


# --- by hand


def test_attention_layer_by_hand() -> None:
    """3 heads of width 4 in width 12, 2 sequences of 5 tokens, 1 active head."""
    layer, tokens = Attention(12, 3, None), 2 * 5
    qkv, scores, output = 2 * tokens * 12 * 12, 2 * 2 * tokens * 5 * 4, 2 * tokens * 4 * 12  # one head's, forward
    expected = {
        "cut": Flops(3 * (qkv + scores + output), qkv + 2 * scores + output, qkv + output),
        "exact": Flops(3 * (qkv + scores + output), 3 * (qkv + 2 * scores + output), qkv + output),
    }
    for mode, wanted in expected.items():
        assert layer.step_flops(2, 5, 1, mode) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("mode, share", [("cut", 1 / 3 + 2 / 3 / 3), ("exact", 2 / 3 + 1 / 3 / 3)])
def test_a_third_active_costs_the_share_that_the_accounting_says(mode: Any, share: float) -> None:
    """``cut``: 1/3 + 2/3 r of a dense step; ``exact``: 2/3 + 1/3 r (products without weights aside)."""
    layer = FeedForward(12, 21, 3)
    dense, gated = (layer.step_flops(2, 5, n, mode) for n in (3, 1))
    assert gated.figure == pytest.approx(share * dense.figure, rel=1e-12)
    assert dense.input_grad == dense.weight_grad == dense.forward


def test_bert_base_by_hand() -> None:
    """85 M weights: six FLOPs per weight and token, and twelve per layer, width and position for attention."""
    with torch.device("meta"):
        model = Bert(
            tiny_config(layers=12, width=768, heads=12, ffn_hidden=3072, ffn_groups=12, norm="post",
                        positions="learned"), 30522, 128,
        )  # fmt: skip
        batch = tiny_batch_on_meta(samples=16, length=128, masked=19)
    tokens, masked = 16 * 128, 16 * 19
    weights = sum(
        p.numel() for layer in unit_layers(model) for n, p in layer.unit_parameters().items() if "weight" in n
    )
    assert weights == 12 * 12 * 768**2 == 84_934_656
    step = flops.training_step(model, batch)
    head = 6 * masked * 768**2
    assert step.figure == 6 * weights * tokens + 12 * 12 * 768 * 128 * tokens + head
    assert step.vocabulary == 6 * masked * 768 * 30522
    assert step.figure == 3 * step.forward
    per_token = step.figure / tokens
    assert per_token == pytest.approx(524e6, rel=0.001)


def tiny_batch_on_meta(samples: int, length: int, masked: int) -> Any:
    rows = samples * masked
    return MaskedBatch(
        *(torch.empty(s, dtype=torch.long, device="meta") for s in ((samples, length), (rows,), (rows,)))
    )


def test_columns_add_up() -> None:
    a, b = Flops(1, 2, 4, 8, 16), Flops(32, 64, 128, 256, 512)
    assert (a.figure, a.everything) == (15, 31)
    assert a + b == Flops(33, 66, 132, 264, 528)


def test_counter_knows_pytorchs_own_attention() -> None:
    """Stock, it counts 0 for the CPU kernel; forward is two products, backward twice as much."""
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    with flops.flop_counter() as forward:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with flops.flop_counter() as backward:
        y.sum().backward()
    products = 2 * 2 * (2 * 3) * 7 * 7 * 4
    assert (forward.get_total_flops(), backward.get_total_flops()) == (products, 2 * products)
