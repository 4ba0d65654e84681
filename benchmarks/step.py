"""Training steps: ours against a plain loop over ``transformers.BertForMaskedLM``, and gated against dense.

    python -m benchmarks.step

Equal size, batch, masks and precision (bf16 autocast); both update with torch's fused AdamW and clip gradients.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, medians, row, set_share, write
from mat import flops, ntk
from mat.bert import Bert
from mat.config import BertConfig
from mat.data.masking import MaskedBatch, mask
from mat.optim import UnitAdamW
from mat.units import BackwardMode, UnitIndex, unit_layers

SIZES = {
    "mini": (BertConfig("bert_mini", "bert", 4, 128, 4, 512, 8, "learned", "post"), 4096, 16, 128),
    "base": (BertConfig("bert", "bert", 12, 768, 12, 3072, 12, "learned", "post"), 30522, 16, 128),
}
REPEATS = {"mini": 15, "base": 5}


def batch_of(vocabulary: int, samples: int, length: int) -> MaskedBatch:
    """A masked batch of random tokens."""
    tokens = np.random.default_rng(0).integers(5, vocabulary, (samples, length)).astype(np.uint16)
    return mask(tokens, 0.15, 4, 5, vocabulary, [0])


def our_step(model: Bert, batch: MaskedBatch) -> Callable[[], None]:
    """A training step of ours with the gates as they stand."""
    optimiser = UnitAdamW(model, (0.9, 0.98), 1e-6, 0.01)

    def step() -> None:
        model.train()
        optimiser.clear()
        with torch.autocast(batch.tokens.device.type, torch.bfloat16):
            loss = model.loss(batch)
        loss.backward()
        optimiser.clip(1.0)
        optimiser.step(1e-4)

    return step


def their_step(config: BertConfig, vocabulary: int, batch: MaskedBatch, length: int) -> Callable[[], None]:
    """The same step as a plain loop over transformers' model, the loss over masked positions by label -100."""
    import transformers

    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=config.width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, intermediate_size=config.ffn_hidden, max_position_embeddings=length,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    labels = torch.full((batch.tokens.numel(),), -100)
    labels[batch.positions] = batch.targets
    labels = labels.view_as(batch.tokens)
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step() -> None:
        theirs.train()
        optimiser.zero_grad()
        with torch.autocast(batch.tokens.device.type, torch.bfloat16):
            loss: Any = theirs(input_ids=batch.tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()

    return step


def gated(size: str, model: Bert, batch: MaskedBatch, wanted: float | None) -> list[Row]:
    """Steps with a third of the units active against dense steps: seconds, and FLOPs executed for comparison."""
    dense, third = our_step(model, batch), our_step(model, batch)
    rows = []
    for mode in ("cut", "exact"):

        def with_third(mode: BackwardMode = mode) -> None:  # type: ignore[assignment]
            set_share(model, 1 / 3, mode)
            third()

        def with_all() -> None:
            set_share(model, 1.0, "cut")
            dense()

        ours, other = medians([with_third, with_all], REPEATS[size])
        rows.append(row(f"{size}: step with a third active, {mode}", ours, other, wanted if mode == "cut" else None))
        set_share(model, 1 / 3, mode)
        executed = flops.training_step(model, batch).everything
        set_share(model, 1.0, mode)
        everything = flops.training_step(model, batch).everything
        rows.append(row(f"{size}: FLOPs with a third active, {mode}", executed, everything, None, "FLOP"))
    return rows


def main() -> None:
    """Measure both sizes."""
    rows: list[Row] = []
    for size, (config, vocabulary, samples, length) in SIZES.items():
        torch.manual_seed(0)
        batch = batch_of(vocabulary, samples, length)
        model = Bert(config, vocabulary, length)
        ours, other = medians([our_step(model, batch), their_step(config, vocabulary, batch, length)], REPEATS[size])
        rows.append(row(f"{size}: dense step against transformers", ours, other, 1 / 1.3))
        rows += gated(size, model, batch, 0.66 if size == "base" else None)
        if size == "mini":
            dense_64 = our_step(model, batch_of(vocabulary, 64, length))
            rows += estimator(model, batch_of(vocabulary, 32, length), dense_64)
        write("step", rows)


def estimator(model: Bert, probe: MaskedBatch, dense_64: Callable[[], None]) -> list[Row]:
    """One call of the estimator (n = 32, m = 1) against a dense step of 64 sequences."""
    index = UnitIndex(unit_layers(model))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            ntk.estimate(model, probe, index)

    set_share(model, 1.0, "cut")
    ours, other = medians([call, dense_64], 9)
    return [row("mini: estimator call against a dense step of 64 sequences", ours, other, 0.7), share_of_a_run(model)]


def share_of_a_run(model: Bert) -> Row:
    """All calls of the estimator in a mini MAT run (+experiment=table1_mini) against the run's seconds."""
    calls, samples, batch_size, budget = 25, 16, 8, 0.7 * 0.02e15
    probe, batch = batch_of(4096, samples, 128), batch_of(4096, batch_size, 128)
    index = UnitIndex(unit_layers(model))
    step = our_step(model, batch)

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            ntk.estimate(model, probe, index)

    set_share(model, 1 / 3, "cut")
    call_seconds, step_seconds = medians([call, step], 25)
    spent = calls * flops.estimate(model, probe, index.layers, "random", 1, 512 * 2**20).figure
    steps = (budget - spent) / flops.training_step(model, batch).figure
    set_share(model, 1.0, "cut")
    ours = calls * call_seconds
    return row("mini: estimator calls of a run against the run", ours, ours + steps * step_seconds, 0.02)


if __name__ == "__main__":
    main()
