"""The model against an independent implementation."""

from typing import Any

import naive
import pytest
import torch
from tiny import tiny_batch, tiny_bert, tiny_config
from torch import Tensor

from mat.suite.bert import Attention, Bert

FORMS = [("pre", "rotary"), ("pre", "learned"), ("post", "rotary"), ("post", "learned")]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A ``transformers`` BERT in which every parameter is random, the token types' included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=9, hidden_act="gelu", attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def ours(**changes: Any) -> Bert:
    """Of the same form as ``theirs``, with other weights."""
    form = {"layers": 3, "width": 24, "heads": 4, "ffn_hidden": 40, "ffn_groups": 5, "vocabulary": 23, "length": 9}
    return tiny_bert(**(form | {"norm": "post", "positions": "learned", "dtype": torch.float32} | changes))


def test_logits_equal_transformers(theirs: Any) -> None:
    model = ours()
    model.load_transformers(theirs.state_dict())
    assert theirs.bert.embeddings.token_type_embeddings.weight[0].abs().min() > 0
    for length in (9, 4):  # position embeddings are cut to the sequence
        batch = tiny_batch(samples=3, length=length, masked=3, vocabulary=23)
        expected = theirs(batch.inputs).logits.flatten(0, 1)[batch.positions]
        assert expected.std() > 0.5
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


def test_transformers_takes_our_weights_and_we_take_them_back(theirs: Any) -> None:
    model, other, batch = ours(), ours(seed=1), tiny_batch(length=9, vocabulary=23)
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    state = model.to_transformers()
    try:
        theirs.load_state_dict(state, strict=True)
        logits = theirs(batch.inputs).logits.flatten(0, 1)[batch.positions]
    finally:
        theirs.load_state_dict(before)
    torch.testing.assert_close(logits, model(batch), rtol=1e-5, atol=1e-5)
    other.load_transformers(state)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != key}


QUERY = "bert.encoder.layer.2.attention.self.query.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: without(s, QUERY), f"{QUERY} is missing or left over"),
        (lambda s: without(s, "cls.predictions.bias"), "cls.predictions.bias is missing or left over"),
        (lambda s: s | {"bert.pooler.bias": torch.zeros(1)}, "bert.pooler.bias is missing or left over"),
        (lambda s: s | {QUERY: torch.zeros(24, 23)}, rf"{QUERY} has shape \(24, 23\), wanted \(24, 24\)"),
        (
            lambda s: s | {"bert.embeddings.position_embeddings.weight": torch.zeros(10, 24)},
            r"position_embeddings.weight has shape \(10, 24\), wanted \(9, 24\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    model = ours()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_transformers(change(model.to_transformers()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model changed"


@pytest.mark.parametrize("norm, positions", [form for form in FORMS if form != ("post", "learned")])
def test_only_the_original_form_is_that_of_transformers(norm: str, positions: str) -> None:
    with pytest.raises(ValueError, match="only positions=learned with norm=post"):
        tiny_bert(norm=norm, positions=positions).to_transformers()


@pytest.mark.parametrize("norm, positions", FORMS)
def test_logits_equal_a_loop_over_units(norm: str, positions: str) -> None:
    model, batch = tiny_bert(norm=norm, positions=positions), tiny_batch()
    expected = naive.logits(dict(model.named_parameters()), model.config, batch)
    torch.testing.assert_close(model(batch), expected, rtol=1e-11, atol=1e-11)


def test_logits_are_those_of_the_masked_positions() -> None:
    """Row P of the logits is row P of the logits at all positions, and no more rows are computed."""
    model, batch = tiny_bert(), tiny_batch()
    everywhere = tiny_batch(masked=6)
    everywhere.inputs = batch.inputs
    assert everywhere.positions.tolist() == list(range(24))
    torch.testing.assert_close(model(batch), model(everywhere)[batch.positions], rtol=1e-12, atol=1e-12)
    assert model(batch).shape == (8, 11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_mean_cross_entropy_and_keeps_at_least_float32(dtype: torch.dtype) -> None:
    model, batch = tiny_bert(), tiny_batch()
    logits = model(batch).detach().to(dtype)
    loss = model.loss_of_outputs(logits, batch)
    log_probabilities = torch.log_softmax(logits.double(), -1)
    expected = -sum(log_probabilities[i, t] for i, t in enumerate(batch.targets.tolist())) / len(batch.targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), torch.as_tensor(expected), rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "sizes",
    [
        {"layers": 2, "width": 12, "heads": 3, "ffn_hidden": 12, "ffn_groups": 3, "vocabulary": 11, "length": 6},
        {"layers": 3, "width": 20, "heads": 2, "ffn_hidden": 35, "ffn_groups": 7, "vocabulary": 64, "length": 9},
        {"layers": 12, "width": 768, "heads": 12, "ffn_hidden": 3072, "ffn_groups": 12, "vocabulary": 30522,
         "length": 512},
    ],
    ids=["tiny", "odd", "base"],
)  # fmt: skip
@pytest.mark.parametrize("norm, positions", FORMS)
def test_number_of_parameters(norm: str, positions: str, sizes: dict[str, int]) -> None:
    form = {k: v for k, v in sizes.items() if k not in ("vocabulary", "length")}
    with torch.device("meta"):
        model = Bert(tiny_config(**form, norm=norm, positions=positions), sizes["vocabulary"], sizes["length"])
    d, f, v = sizes["width"], sizes["ffn_hidden"], sizes["vocabulary"]
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    head = (d * d + d) + 2 * d + v
    embeddings = v * d + (sizes["length"] * d if positions == "learned" else 0) + 2 * d
    final = 2 * d if norm == "pre" else 0
    expected = sizes["layers"] * layer + head + embeddings + final
    assert sum(p.numel() for p in model.parameters()) == expected


def test_rotary_attention_depends_on_distances_only() -> None:
    """A token's context over a window does not change when the window is moved along the sequence."""
    random = torch.Generator().manual_seed(0)
    layer = Attention(8, 2, tiny_bert(length=40, width=8, heads=2).blocks[0].attention.rotary).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    assert layer.rotary is not None
    x = torch.randn(1, 5, 8, generator=random, dtype=torch.float64)
    table = layer.rotary
    contexts = []
    for start in (0, 1, 17):
        layer.rotary = table[:, start:]
        contexts.append(layer(x))
    # the table is float32, so angles up to 21 are off by 1e-6
    torch.testing.assert_close(contexts[1], contexts[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(contexts[2], contexts[0], rtol=1e-5, atol=1e-5)
    reversed_context = layer(x.flip(1)).flip(1)
    assert not torch.allclose(reversed_context, contexts[0], rtol=1e-2), "positions have no effect"


def test_without_positions_the_order_would_not_matter() -> None:
    """Position embeddings are what tells the order: without them a permuted sequence has permuted hidden states."""
    model, batch = tiny_bert(positions="learned"), tiny_batch()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert not torch.allclose(model.hidden(batch.inputs[:, order]), model.hidden(batch.inputs)[:, order])
    assert model.positions is not None
    with torch.no_grad():
        model.positions.zero_()
    torch.testing.assert_close(
        model.hidden(batch.inputs[:, order]), model.hidden(batch.inputs)[:, order], rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("norm, residual", [("pre", 4.0), ("post", 1.0)])
def test_initial_weights(norm: str, residual: float) -> None:
    """Embeddings 0.02; weights 0.02 at width 768; pre-norm's output weights smaller by sqrt(2 layers), here 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Bert(tiny_config(layers=8, width=192, ffn_hidden=192, norm=norm, positions="learned"), 256, 64)
    for name, parameter in model.named_parameters():
        if name in ("tokens", "positions"):
            std = 0.02
        elif name.endswith("weight") and "norm" not in name:
            std = 0.04 / (residual if "out_weight" in name else 1.0)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
            continue
        found = float(parameter.detach().std())
        assert abs(found / std - 1) < 0.05, f"{name}: {found:.4f}, not {std}"


def test_dropout_acts_in_training_only() -> None:
    model, batch = tiny_bert(dropout=0.5), tiny_batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model(batch), model(batch))
    model.eval()
    expected = naive.logits(dict(model.named_parameters()), model.config, batch)
    torch.testing.assert_close(model(batch), expected, rtol=1e-11, atol=1e-11)
