"""Training steps: ours against a plain loop over ``transformers.BertForMaskedLM``, and the estimator's share of a run.

    python -m benchmarks.step

Equal size, batch, masks and precision (bf16 autocast); both update with torch's fused AdamW and clip gradients. Gated
steps: ``python -m benchmarks.gates``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from benchmarks.harness import DEVICE, Row, Subject, autocast, medians, row, set_share, stock_step, write
from benchmarks.switch import their_layer
from mat.suite import flops, ntk
from mat.suite.bert import Bert, MaskedEncoder
from mat.suite.compose import CONF, register_schemas, resolve
from mat.suite.config import BertConfig, TrainConfig
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.models import build
from mat.suite.switch import Experts
from mat.suite.units import UnitIndex, unit_layers

SIZES = {
    "mini": (BertConfig("bert_mini", "bert", 4, 128, 4, 512, 8, "learned", "post"), 4096, 16, 128),
    "base": (BertConfig("bert", "bert", 12, 768, 12, 3072, 12, "learned", "post"), 30522, 16, 128),
}
REPEATS = {"mini": 15, "base": 5}
RECIPE = TrainConfig(pflops=1, batch=16, lr=1e-4)


def batch_of(vocabulary: int, samples: int, length: int) -> MaskedBatch:
    """A masked batch of random tokens."""
    tokens = np.random.default_rng(0).integers(5, vocabulary, (samples, length)).astype(np.uint16)
    return mask(tokens, 0.15, 4, 5, vocabulary, [0]).to(DEVICE)


def bert(size: str) -> Subject:
    """A BERT with random tokens."""
    config, vocabulary, samples, length = SIZES[size]
    return Subject(Bert(config, vocabulary, length).to(DEVICE), batch_of(vocabulary, samples, length), RECIPE)


def twin(model: MaskedEncoder) -> Any:
    """``transformers.BertForMaskedLM`` of a model's size; a switch layer becomes the sparse MLP of its Switch."""
    import transformers

    config, (vocabulary, width) = model.config, model.tokens.shape
    assert model.positions is not None
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, intermediate_size=config.ffn_hidden,
            max_position_embeddings=len(model.positions), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    for layer, block in zip(theirs.bert.encoder.layer, model.blocks, strict=True):
        if isinstance(block.ffn, Experts):
            layer.intermediate, layer.output.dense = their_layer(block.ffn), nn.Identity()
    return theirs.to(DEVICE)


def by_label(theirs: Any, batch: MaskedBatch) -> Callable[[], Tensor]:
    """The loss as transformers offers it: logits everywhere, label -100 where nothing is masked."""
    labels = torch.full((batch.inputs.numel(),), -100, device=DEVICE)
    labels[batch.positions] = batch.targets
    labels = labels.view_as(batch.inputs)
    return lambda: theirs(input_ids=batch.inputs, labels=labels).loss


def by_position(theirs: Any, batch: MaskedBatch) -> Callable[[], Tensor]:
    """The loss with logits at the masked positions only, as ours: equal products."""

    def loss() -> Tensor:
        hidden = theirs.bert(input_ids=batch.inputs).last_hidden_state.flatten(0, 1)
        return F.cross_entropy(theirs.cls(hidden.index_select(0, batch.positions)).float(), batch.targets)

    return loss


def main() -> None:
    """Measure both sizes."""
    rows: list[Row] = []
    for size, repeats in REPEATS.items():
        torch.manual_seed(0)
        subject = bert(size)
        theirs = twin(subject.model)
        ours, other = medians(
            [subject.step(), stock_step(theirs, by_label(theirs, subject.batch), RECIPE)], repeats
        )  # fmt: skip
        rows.append(row(f"{size}: dense step against transformers", ours, other, 1 / 1.3))
        if size == "mini":
            rows += [estimator(subject.model), share_of_a_run()]
        write("step", rows)


def estimator(model: Bert) -> Row:
    """One call of the estimator (n = 32, m = 1) against a dense step of 64 sequences."""
    _, vocabulary, _, length = SIZES["mini"]
    probe, dense = batch_of(vocabulary, 32, length), Subject(model, batch_of(vocabulary, 64, length), RECIPE).step()

    def call() -> None:
        with autocast():
            ntk.estimate(model, probe)

    ours, other = medians([call, dense], 9)
    return row("mini: estimator call against a dense step of 64 sequences", ours, other, 0.7)


def share_of_a_run() -> Row:
    """All calls of the estimator in a MAT run of Table 1, mini, against the run's seconds; sizes as configured."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve(compose("config", ["+experiment=table1_mini", "method=mat", "dataset.root=null"]))
    data, selection, train = config.dataset, config.selection, config.train
    model = build(config, data.vocabulary).to(DEVICE)
    probe = batch_of(data.vocabulary, selection.samples, data.length)
    index = UnitIndex(unit_layers(model), selection.units)
    training = Subject(model, batch_of(data.vocabulary, train.batch, data.length), train)
    memory, m = config.hardware.estimator_bytes, selection.projections

    def call() -> None:
        with autocast():
            ntk.estimate(model, probe, index, projections=m, memory_bytes=memory)

    call_seconds, step_seconds = medians([call, training.step(selection.share)], 25)
    calls = math.ceil(1 / selection.interval)
    spent = calls * flops.estimate(model, probe, index.layers, selection.reduction, m, memory).figure
    set_share(model, selection.share, "cut")
    steps = (config.method.budget * train.pflops * 1e15 - spent) / flops.training_step(model, training.batch).figure
    ours = calls * call_seconds
    return row("mini: estimator calls of a run against the run", ours, ours + steps * step_seconds, 0.02)


if __name__ == "__main__":
    main()
