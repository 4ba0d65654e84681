"""The ledger against torch's counter on what really runs, and against figures worked by hand."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import mat
from mat.flops import Flops, Ledger, estimate, flop_counter
from mat.layers import convolution
from mat.units import BoolArray

Loss = Callable[[], Tensor]
TOKENS = {"vocab_size": 19, "max_position_embeddings": 16}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {"hidden_size": 16, "intermediate_size": 24} | LAYERS


def tokens(**more: Any) -> dict[str, Tensor]:
    return {
        "input_ids": torch.randint(0, 19, (3, 7)),
        "labels": torch.randint(0, 19, (3, 7)),
    } | more


def bert(kernel: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(**TOKENS, **SIZES, attn_implementation=kernel)
    return transformers.BertForMaskedLM(config), tokens()


def distilbert(kernel: str) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
    config = transformers.DistilBertConfig(**TOKENS, **sizes, attn_implementation=kernel)
    return transformers.DistilBertForMaskedLM(config), tokens()


def vit(kernel: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, attn_implementation=kernel)
    batch = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 1])}
    return transformers.ViTForImageClassification(config), batch


def llama(kernel: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        **TOKENS, **SIZES, num_key_value_heads=2, attn_implementation=kernel
    )
    return transformers.LlamaForCausalLM(config), tokens()


def mixtral(kernel: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.MixtralConfig(
        **TOKENS, **SIZES, num_key_value_heads=2, num_local_experts=4
    )
    config._experts_implementation = kernel
    return transformers.MixtralForCausalLM(config), tokens()


def switch(_: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.SwitchTransformersConfig(
        vocab_size=19, d_model=16, d_kv=4, d_ff=24, num_heads=4, num_experts=4,
        num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, dropout_rate=0.0, router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config), tokens()


def vgg(_: str) -> tuple[nn.Module, Tensor]:
    features = torchvision.models.vgg.make_layers([8, "M", 12, 12, "M", 16], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(64, 5)), torch.randn(2, 3, 8, 8)


def resnet(block: str) -> tuple[nn.Module, Tensor]:
    kind = {"basic": BasicBlock, "bottleneck": Bottleneck}[block]
    return ResNet(kind, [1, 1, 1, 1], num_classes=5), torch.randn(2, 3, 32, 32)


def perceptron(_: str) -> tuple[nn.Module, Tensor]:
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)
    return nn.Sequential(*layers), torch.randn(5, 6)


def encoder(_: str) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2)), torch.randn(3, 7, 5)


MODELS: list[tuple[Callable[[str], tuple[nn.Module, Any]], str]] = [
    *((make, kernel) for make in (bert, distilbert, vit, llama) for kernel in ("eager", "sdpa")),
    (mixtral, "eager"), (mixtral, "grouped_mm"), (mixtral, "batched_mm"), (switch, ""),
    (vgg, ""), (resnet, "basic"), (resnet, "bottleneck"), (perceptron, ""), (encoder, ""),
]  # fmt: skip


def made(make: Callable[[str], tuple[nn.Module, Any]], kind: str) -> tuple[nn.Module, Loss]:
    """A model in training mode, and its loss."""
    torch.manual_seed(0)
    model, batch = make(kind)
    model.train()
    if isinstance(batch, dict):
        return model, lambda: model(**batch).loss
    return model, lambda: model(batch).square().sum()


def states(units: Any) -> dict[str, BoolArray]:
    """Sets of active units that stop a backward pass in different places."""
    rows = [where for _, where in units.slices()]
    random = np.random.default_rng(0)
    found = {"none": np.zeros(len(units), bool)}
    for share in (0.3, 0.7):
        found[f"random {share}"] = random.random(len(units)) < share
    for name, frozen in (("bottom", rows[:2]), ("top", rows[-2:]), ("every other", rows[::2])):
        found[f"{name} frozen"] = np.ones(len(units), bool)
        for where in frozen:
            found[f"{name} frozen"][where] = False
    return found


def counted(loss: Loss) -> tuple[int, int]:
    """FLOPs of a forward and a backward pass, as torch's counter sees them."""
    with flop_counter() as forward:
        value = loss()
    with flop_counter() as backward:
        if value.requires_grad:  # else nothing wants a gradient
            value.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions are filled up as large ones are."""
    monkeypatch.setattr(convolution, "BLOCK", 4)


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("make, kind", MODELS)
def test_ledger_equals_torchs_counter_for_any_gates(make: Any, kind: str, mode: Any) -> None:
    model, loss = made(make, kind)
    gates = mat.attach_(model, mat.MATConfig(mode=mode))
    ledger = Ledger(model, loss)
    for name, active in states(gates.units).items():
        model.zero_grad()
        gates.set_active(active)
        step = ledger.step()
        assert (step.forward, step.backward) == counted(loss), name
        assert ledger.step(executed=False).everything <= step.everything


@pytest.mark.parametrize("mode", ["cut", "exact"])
@pytest.mark.parametrize("make", [vgg, perceptron, encoder])
def test_with_compact_gradients_a_frozen_bottom_costs_nothing(make: Any, mode: Any) -> None:
    model, loss = made(make, "")
    gates = mat.attach_(model, mat.MATConfig(mode=mode))
    ledger = Ledger(model, loss)
    for part in gates.parts():
        part.compact = True
    for name, active in states(gates.units).items():
        gates.set_active(active)
        step = ledger.step()
        assert (step.forward, step.backward) == counted(loss), name
        for part in gates.parts():
            part.clear()
        model.zero_grad()


@pytest.mark.parametrize("mode", ["cut", "exact"])
def test_logged_share_on_a_probe_is_the_counters(mode: Any) -> None:
    torch.manual_seed(0)
    model, images = vgg("")
    gates = mat.attach_(model, mat.MATConfig(mode=mode, reduction="sum", log=False))
    dense = counted(lambda: model(images).sum())[1]
    model.zero_grad()
    assert "mat/skipped_backward" not in gates.log_numbers()  # weights say nothing of positions
    gates.maybe_select(0, images)
    assert gates.log_numbers()["mat/skipped_backward"] == 0
    gates.set_active(np.arange(len(gates.units)) % 3 == 0)
    now = counted(lambda: model(images).sum())[1]
    assert gates.log_numbers()["mat/skipped_backward"] == pytest.approx(1 - now / dense)
    assert "skipped FLOPs" in repr(gates)


def test_heads_without_output_columns_and_units_by_hand() -> None:
    model, loss = made(bert, "sdpa")
    gates = mat.attach_(model, mat.MATConfig(head_output=False))
    other, its_loss = made(perceptron, "")
    rows, cols = mat.rows("0.weight", 0, 3), mat.cols("2.weight", 0, 3)
    units = [mat.Unit("a", rows, cols), mat.Unit("b", mat.cols("2.weight", 3, 7))]
    by_hand = mat.attach_(other, mat.MATConfig(), units=units)
    for each, of, value in ((gates, model, loss), (by_hand, other, its_loss)):
        ledger = Ledger(of, value)
        for active in states(each.units).values():
            of.zero_grad()
            each.set_active(active)
            step = ledger.step()
            assert (step.forward, step.backward) == counted(value)


def test_input_and_weight_gradients_are_told_apart() -> None:
    model, loss = made(bert, "sdpa")
    ledger = Ledger(model, loss)
    dense = ledger.step()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.dim() == 1 or "embeddings" in name)
    model.cls.predictions.decoder.weight = nn.Parameter(torch.randn(19, 16), requires_grad=False)
    assert counted(loss)[1] == dense.input_grad == Ledger(model, loss).step().backward


def test_products_with_the_vocabulary_have_their_own_column() -> None:
    model, loss = made(bert, "sdpa")
    whole = Ledger(model, loss).step()
    apart = Ledger(model, loss, vocabulary=["cls.predictions.decoder"]).step()
    assert apart.vocabulary == 3 * 2 * (3 * 7) * 16 * 19
    assert apart.everything == whole.everything == whole.figure


def test_a_parameter_that_does_not_train_has_no_weight_gradient() -> None:
    model, loss = made(perceptron, "")
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    step = Ledger(model, loss).step()
    assert step.weight_grad == 2 * 5 * (8 * 12 + 12 * 4)
    assert step.input_grad == 2 * 5 * 12 * 4  # nothing below the second layer wants one


def test_what_is_needed_has_no_padding() -> None:
    model, loss = made(vgg, "")
    gates = mat.attach_(model, mat.MATConfig(mode="cut"))
    gates.set_active(gates.units.unit < 5)
    position, head = 2 * 2 * 9, 2 * 2 * 64 * 5
    counts = [(64, 3, 8), (16, 8, 12), (16, 12, 12), (4, 12, 16)]  # positions, inputs, filters
    needed = Ledger(model, loss).step(executed=False)
    assert needed.weight_grad == position * sum(n * i * 5 for n, i, _ in counts) + head
    assert needed.input_grad == position * sum(n * 25 for n, _, _ in counts[1:]) + head
    assert needed.forward == position * sum(n * i * o for n, i, o in counts) + head


@pytest.mark.parametrize("make, kind", [(vgg, ""), (bert, "eager")])
@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_the_model_as_it_was(make: Any, kind: str, training: bool) -> None:
    model, loss = made(make, kind)
    model.train(training)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    Ledger(model, loss)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("make, kind", [(bert, "sdpa"), (llama, "eager"), (vgg, ""), (encoder, "")])
def test_an_estimate_costs_what_the_counter_sees(make: Any, kind: str, projections: int) -> None:
    model, batch = made(make, kind)[0], make(kind)[1]
    gates = mat.attach_(model, mat.MATConfig())
    gates.set_active(gates.units.unit == 0)  # it does not care about gates
    for units in (None, gates.units.of_kinds([gates.units.layers[-1].kind])):
        with flop_counter() as counter:
            mat.ntk.estimate(model, batch, units, projections=projections)
        cost = estimate(model, batch, units, passes=projections)
        assert cost == Flops(overhead=counter.get_total_flops())


def test_recording_takes_less_than_a_training_step() -> None:
    config = transformers.BertConfig(**TOKENS, **LAYERS, hidden_size=256, intermediate_size=1024)
    model = transformers.BertForMaskedLM(config).train()
    batch = {name: value.repeat(16, 2) for name, value in tokens().items()}

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def step() -> None:
        model(**batch).loss.backward()

    step()
    took = [(seconds(lambda: Ledger(model, lambda: model(**batch).loss)), seconds(step))]
    took += [(seconds(lambda: Ledger(model, lambda: model(**batch).loss)), seconds(step))]
    assert min(recording for recording, _ in took) < max(stepping for _, stepping in took)


def test_bert_base_costs_what_the_formula_says() -> None:
    """Six FLOPs per weight and token, and twelve per layer, width and position for attention."""
    with torch.device("meta"):
        config = transformers.BertConfig(attn_implementation="sdpa", attention_probs_dropout_prob=0)
        model = transformers.BertForMaskedLM(config)
        ids = torch.zeros(16, 128, dtype=torch.long)
        ledger = Ledger(
            model,
            lambda: model(input_ids=ids).logits,
            vocabulary=["cls.predictions.decoder"],
        )
    step, positions = ledger.step(), 16 * 128
    weights = 12 * 12 * 768**2 + 768**2  # and the head's
    assert step.figure == 6 * weights * positions + 12 * 12 * 768 * 128 * positions
    assert step.vocabulary == 6 * positions * 768 * 30522


def test_columns_add_up() -> None:
    a, b = Flops(1, 2, 4, 8, 16), Flops(32, 64, 128, 256, 512)
    assert (a.backward, a.figure, a.everything) == (6, 15, 31)
    assert a + b == Flops(33, 66, 132, 264, 528)


def test_the_counter_knows_pytorchs_own_attention() -> None:
    """Stock, it counts 0 for the CPU kernel; forward is two products, backward twice as much."""
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    products = 2 * 2 * (2 * 3) * 7 * 7 * 4
    attention = nn.functional.scaled_dot_product_attention
    assert counted(lambda: attention(q, k, v).sum()) == (products, 2 * products)
