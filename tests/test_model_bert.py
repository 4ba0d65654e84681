"""BERT of the suite against transformers, PyTorch's attention and a loop over units."""

from typing import Any

import pytest
import references
import torch
import torch.nn.functional as F
from small_models import shapes, tiny_batch, tiny_bert, tiny_config
from torch import Tensor

from mat.suite.models.attention import attention, attention_matrices, rotary_table
from mat.suite.models.bert import Attention, Bert

FORMS = [("pre", "rotary"), ("pre", "learned"), ("post", "rotary"), ("post", "learned")]


# --- transformers


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A ``transformers`` BERT in which every parameter is random, the token types' included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=9, hidden_act="gelu",
        attn_implementation="eager",
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
    sizes = {"layers": 3, "width": 24, "heads": 4, "ffn_hidden": 40, "ffn_groups": 5}
    data = {"vocabulary": 23, "length": 9, "dtype": torch.float32}
    return tiny_bert(**(sizes | data | {"norm": "post", "positions": "learned"} | changes))


def test_logits_equal_transformers(theirs: Any) -> None:
    model = ours()
    model.load_transformers(theirs.state_dict())
    assert theirs.bert.embeddings.token_type_embeddings.weight[0].abs().min() > 0
    for length in (9, 4):  # position embeddings are cut to the sequence
        batch = tiny_batch(samples=3, length=length, masked=3, vocabulary=23)
        expected = theirs(batch.inputs).logits.flatten(0, 1)[batch.positions]
        assert expected.std() > 0.5
        torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


def test_transformers_takes_our_weights_and_gives_them_back(theirs: Any) -> None:
    model, other, batch = ours(), ours(seed=1), tiny_batch(length=9, vocabulary=23)
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    state = model.to_transformers()
    try:
        theirs.load_state_dict(state, strict=True)
        logits = theirs(batch.inputs).logits.flatten(0, 1)[batch.positions]
        other.load_transformers(theirs.state_dict())
    finally:
        theirs.load_state_dict(before)
    torch.testing.assert_close(logits, model(batch), rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


QUERY = "bert.encoder.layer.2.attention.self.query.weight"
POSITIONS = "bert.embeddings.position_embeddings.weight"


@pytest.mark.parametrize(
    "key, value, message",
    [
        (QUERY, None, "is missing or left over"),
        ("cls.predictions.bias", None, "is missing or left over"),
        ("bert.pooler.bias", torch.zeros(1), "is missing or left over"),
        (QUERY, torch.zeros(24, 23), r"has shape \(24, 23\), wanted \(24, 24\)"),
        (POSITIONS, torch.zeros(10, 24), r"has shape \(10, 24\), wanted \(9, 24\)"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    key: str, value: Tensor | None, message: str
) -> None:
    model = ours()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v for k, v in (model.to_transformers() | {key: value}).items() if v is not None}
    with pytest.raises(ValueError, match=f"{key} {message}"):
        model.load_transformers(state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm, positions", FORMS[:3])
def test_other_forms_are_not_those_of_transformers(norm: str, positions: str) -> None:
    with pytest.raises(ValueError, match="only positions=learned with norm=post"):
        tiny_bert(norm=norm, positions=positions).to_transformers()


# --- the model


@pytest.mark.parametrize("norm, positions", FORMS)
def test_logits_equal_a_loop_over_units(norm: str, positions: str) -> None:
    model, batch = tiny_bert(norm=norm, positions=positions), tiny_batch()
    expected = references.logits(dict(model.named_parameters()), model.config, batch)
    torch.testing.assert_close(model(batch), expected, rtol=1e-11, atol=1e-11)


def test_logits_are_those_of_the_masked_positions() -> None:
    """Row P of the logits is row P of the logits at all positions; no more rows are computed."""
    model, batch = tiny_bert(), tiny_batch()
    everywhere = tiny_batch(masked=6)
    everywhere.inputs = batch.inputs
    assert everywhere.positions.tolist() == list(range(24))
    expected = model(everywhere)[batch.positions]
    torch.testing.assert_close(model(batch), expected, rtol=1e-12, atol=1e-12)
    assert model(batch).shape == (8, 11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_mean_cross_entropy_in_float32_at_least(dtype: torch.dtype) -> None:
    model, batch = tiny_bert(), tiny_batch()
    logits = model(batch).detach().to(dtype)
    loss = model.loss_of_outputs(logits, batch)
    rows = torch.log_softmax(logits.double(), -1)
    expected = -torch.stack([rows[i, t] for i, t in enumerate(batch.targets.tolist())]).mean()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("norm, positions", FORMS)
def test_number_of_parameters_of_bert_base(norm: str, positions: str) -> None:
    d, f, layers, v, length = 768, 3072, 12, 30522, 512
    sizes = {"layers": layers, "width": d, "heads": 12, "ffn_hidden": f, "ffn_groups": 12}
    with torch.device("meta"):
        model = Bert(tiny_config(**sizes, norm=norm, positions=positions), v, length)
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    embeddings = v * d + (length * d if positions == "learned" else 0) + 2 * d
    head = (d * d + d) + 2 * d + v
    expected = layers * layer + embeddings + head + (2 * d if norm == "pre" else 0)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_order_of_tokens_is_told_by_positions_alone() -> None:
    model, batch = tiny_bert(positions="learned"), tiny_batch()
    order = torch.tensor([3, 1, 5, 0, 2, 4])

    def pair() -> tuple[Tensor, Tensor]:
        return model.hidden(batch.inputs[:, order]), model.hidden(batch.inputs)[:, order]

    assert not torch.allclose(*pair())
    assert model.positions is not None
    torch.nn.init.zeros_(model.positions.weight)
    torch.testing.assert_close(*pair(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm, residual", [("pre", 4.0), ("post", 1.0)])
def test_initial_weights(norm: str, residual: float) -> None:
    """0.02 at width 768; pre-norm's output weights smaller by sqrt(2 layers), here 4."""
    sizes = {"layers": 8, "width": 192, "ffn_hidden": 192}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Bert(tiny_config(**sizes, norm=norm, positions="learned"), 256, 64)
    for name, parameter in model.named_parameters():
        if name in ("tokens.weight", "positions.weight"):
            std = 0.02
        elif name.endswith("weight") and "norm" not in name:
            std = 0.04 / (residual if "attention.out" in name or "down" in name else 1.0)
        else:
            one = float("norm.weight" in name)
            assert torch.equal(parameter, torch.full_like(parameter, one)), name
            continue
        found = float(parameter.detach().std())
        assert abs(found / std - 1) < 0.05, f"{name}: {found:.4f}, not {std}"


def test_decoder_and_embedding_stay_one_tensor() -> None:
    model, batch = tiny_bert(), tiny_batch()
    before = model.tokens.weight.detach().clone()
    torch.optim.SGD(model.parameters(), 0.1).zero_grad()
    model.loss(batch).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    assert model.decoder.weight is model.tokens.weight
    assert not torch.equal(before, model.decoder.weight)


def test_dropout_acts_in_training_only() -> None:
    model, batch = tiny_bert(dropout=0.5, positions="learned"), tiny_batch()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model(batch), model(batch))
    model.eval()
    expected = references.logits(dict(model.named_parameters()), model.config, batch)
    torch.testing.assert_close(model(batch), expected, rtol=1e-11, atol=1e-11)


# --- attention


def inputs(batch: int, length: int, heads: int, width: int, rotary: bool) -> tuple[Tensor, Any]:
    """Random qkv (B, T, H, 3, K), and a table that is longer than the sequence, or None."""
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, heads, 3, width, generator=random, dtype=torch.float64)
    return qkv, rotary_table(length + 3, width).double() if rotary else None


def torch_attention(qkv: Tensor, rotary: bool) -> Tensor:
    """PyTorch's own, of queries and keys rotated as complex numbers."""
    q, k, v = qkv.permute(3, 0, 2, 1, 4)  # (B, H, T, K)
    if rotary:
        q, k = (torch.stack([torch.stack([*map(references.rotate, b)]) for b in x]) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "sizes", shapes(batch=(1, 3), length=(1, 7), heads=(1, 3), width=(2, 6)), ids=str
)
def test_attention_equals_torch(sizes: dict[str, int], rotary: bool, device: str) -> None:
    qkv, table = inputs(**sizes, rotary=rotary)
    qkv.requires_grad_()
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(qkv.shape[:3] + qkv.shape[4:], generator=random, dtype=torch.float64)
    expected = torch_attention(qkv, rotary)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), qkv)
    context = attention(qkv.to(device), None if table is None else table.to(device))
    (gradient,) = torch.autograd.grad((context.cpu() * weight).sum(), qkv)
    assert context.is_contiguous()
    torch.testing.assert_close(context.cpu(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_passes_gradcheck(rotary: bool) -> None:
    qkv, table = inputs(2, 3, 2, 4, rotary)
    assert torch.autograd.gradcheck(lambda x: attention(x, table), qkv.requires_grad_())


def test_a_second_derivative_of_attention_is_refused() -> None:
    qkv, _ = inputs(1, 3, 1, 2, False)
    qkv.requires_grad_()
    loss = attention(qkv, None).square().sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, qkv, create_graph=True)


@pytest.mark.parametrize("rotary", [False, True])
def test_bfloat16_attention_is_close(rotary: bool) -> None:
    """bf16 keeps 8 bits: 2^-8 for a value, a few times that after two products and a softmax."""
    qkv, table = inputs(2, 32, 3, 8, rotary)
    half = qkv.bfloat16().requires_grad_()
    exact = half.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        context = attention(half, None if table is None else table.float())
    expected = attention(exact, table)
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((context * weight).sum(), half)
    (wanted_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
    assert context.dtype == gradient.dtype == torch.bfloat16
    for found, wanted in ((context, expected), (gradient, wanted_gradient)):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 4 * 2**-8, f"relative error {float(error):.2e}"


def test_rotary_table_holds_the_angles() -> None:
    cos, sin = rotary_table(50, 8).double()
    for t in (0, 1, 49):
        for i in range(4):
            angle = torch.tensor(t * 10000 ** (-2 * i / 8), dtype=torch.float64)
            # the table is float32, so an angle t carries t * 2^-24 of rounding
            torch.testing.assert_close(cos[t, i], angle.cos(), rtol=0, atol=1e-5)
            torch.testing.assert_close(sin[t, i], angle.sin(), rtol=0, atol=1e-5)


def test_rotary_attention_depends_on_distances_only() -> None:
    """A token's context over a window stays when the window moves along the sequence."""
    qkv, _ = inputs(1, 5, 2, 4, False)
    table = rotary_table(40, 4).double()  # float32, so angles up to 21 are off by 1e-6
    first = attention(qkv, table)
    for start in (1, 17):
        moved = attention(qkv, table[:, start:])
        torch.testing.assert_close(moved, first, rtol=1e-5, atol=1e-5)
    turned = attention(qkv.flip(1), table).flip(1)
    assert not torch.allclose(turned, first, rtol=1e-2), "positions have no effect"


@pytest.mark.parametrize("rotary", [False, True])
def test_core_of_some_heads_is_theirs_among_all(rotary: bool) -> None:
    layer = Attention(12, 3, rotary_table(6, 4) if rotary else None).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    qkv = layer.qkv(x)
    some = qkv.view(2, 5, 3, 12)[:, :, [2, 0]].flatten(2)
    expected = layer.core(qkv).view(2, 5, 3, 4)[:, :, [2, 0]].flatten(2)
    torch.testing.assert_close(layer.core(some), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_matrices_make_the_context_of_the_values(rotary: bool) -> None:
    layer = Attention(12, 3, rotary_table(6, 4) if rotary else None).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    qkv = layer.qkv(x).view(2, 5, 3, 3, 4)
    matrices = layer.probabilities(x)
    assert torch.equal(matrices, attention_matrices(qkv, layer.rotary))
    torch.testing.assert_close(matrices.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    context = torch.einsum("bhts,bshk->bthk", matrices, qkv[:, :, :, 2])
    torch.testing.assert_close(context.flatten(2), layer.core(layer.qkv(x)), rtol=1e-12, atol=1e-12)
