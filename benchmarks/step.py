"""Dense training steps against transformers', and the estimator's share of a run.

    python -m benchmarks.step

Ours against a plain loop over ``transformers.BertForMaskedLM``: equal size, batch, masks and
precision (bf16 autocast); both update with torch's fused AdamW and clip gradients. Gated steps:
``python -m benchmarks.gates``.
"""

import math
from typing import cast

import torch
from hydra import compose, initialize_config_dir

from benchmarks.harness import DEVICE, TOY, Row, autocast, medians, row, write
from benchmarks.subjects import (
    TEXT,
    TEXTS,
    Subject,
    by_label,
    stock_encoder,
    stock_step,
    subject,
    tokens,
)
from mat import flops, ntk
from mat.suite.compose import CONF, register_schemas, resolve
from mat.suite.config import BertConfig, Config, TextConfig
from mat.suite.data.masking import MaskedBatch
from mat.suite.models import build
from mat.suite.models.bert import MaskedEncoder

REPEATS = {"mini": 15, "base": 5}


def main() -> None:
    """Measure both sizes."""
    rows: list[Row] = []
    for size, repeats in REPEATS.items():
        torch.manual_seed(0)
        ours = subject(f"bert_{size}")
        theirs = stock_encoder(cast(MaskedEncoder, ours.model))
        loss = by_label(theirs, cast(MaskedBatch, ours.batch))
        times = medians([ours.step(), stock_step(theirs, loss, TEXT)], repeats)
        rows.append(row(f"{size}: dense step against transformers", *times, 1 / 1.3))
        if size == "mini":
            rows += [estimator(ours), share_of_a_run()]
        write("step", rows)


def estimator(ours: Subject) -> Row:
    """One call of the estimator (n = 32, m = 1) against a dense step of 64 sequences."""
    _, vocabulary, _, length = TEXTS["bert_mini"]
    probe = tokens(vocabulary, 32, length)
    dense = Subject(ours.model, tokens(vocabulary, 64, length), TEXT).step()

    def call() -> None:
        with autocast():
            ntk.estimate(ours.model, probe)

    times = medians([call, dense], 9)
    return row("mini: estimator call against a dense step of 64 sequences", *times, 0.7)


def run_of_table1() -> Config:
    """A MAT run of Table 1, mini, as configured."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["+experiment=table1_mini", "method=mat", "dataset.root=null"]
        config = resolve(compose("config", overrides))
    if TOY:
        config.model, config.dataset.vocabulary, config.dataset.length, *_ = TEXTS["bert_mini"]
    return config


def share_of_a_run() -> Row:
    """All calls of the estimator in a MAT run of Table 1, mini, against the run's seconds."""
    config = run_of_table1()
    data, selection, train = config.dataset, config.selection, config.train
    assert isinstance(data, TextConfig) and isinstance(config.model, BertConfig)
    model = build(config, data.vocabulary).to(DEVICE)
    training = Subject(model, tokens(data.vocabulary, train.batch, data.length), train)
    probe = tokens(data.vocabulary, selection.samples, data.length)
    memory, m = config.hardware.estimator_bytes, selection.projections

    def call() -> None:
        with autocast():
            ntk.estimate(model, probe, projections=m, memory_bytes=memory)

    call_seconds, step_seconds = medians([call, training.step(selection.share)], 25)
    calls = math.ceil(1 / selection.interval)
    with autocast():
        once = flops.estimate(
            model, probe, passes=m, memory_bytes=memory, vocabulary=("decoder",)
        )  # fmt: skip
    budget = config.method.budget * train.pflops * 1e15
    steps = (budget - calls * once.figure) / training.flops(selection.share, "cut").figure
    ours = calls * call_seconds
    whole = ours + steps * step_seconds
    return row("mini: estimator calls of a run against the run", ours, whole, 0.02)


if __name__ == "__main__":
    main()
