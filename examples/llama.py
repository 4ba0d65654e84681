"""Train a small Llama on WikiText-2 in a plain loop: a share of its units, mode ``cut``.

    python -m examples.llama --data FOLDER --out FOLDER

The model of transformers begins with random weights and predicts bytes, so that no tokeniser is
needed. Scores are read off training steps; the optimiser is the library's AdamW. All units set the
length; the other methods stop at a share of its FLOPs, their learning rate fitted to that.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mat
from examples.meter import Meter, now, schedule
from examples.report import Curve, curves_plot, curves_table

RATE = 2e-3
METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "fitted": None,
    "mat": {"rule": "threshold"},
    "random units": {"rule": "random"},
}


def read(folder: Path | None, split: str, most: int) -> Tensor:
    """The bytes of a split of WikiText-2, from a parquet file or the hub.

    Args:
        folder: With ``train.parquet`` and ``test.parquet``, column ``text``.
        split: ``train`` or ``test``.
        most: Bytes at most.
    """
    if folder is None:
        import datasets

        lines = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-v1", split=split)["text"]
    else:
        path = folder / f"{split}.parquet"
        if not path.is_file():
            raise SystemExit(f"{path}: no such file: name its folder with --data")
        lines = pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return torch.frombuffer(bytearray("".join(lines).encode()[:most]), dtype=torch.uint8)


def batches(text: Tensor, size: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random pieces (size, length) without end."""
    random = torch.Generator().manual_seed(seed)
    while True:
        first = torch.randint(len(text) - length + 1, (size, 1), generator=random)
        yield text[first + torch.arange(length)].long()


@torch.no_grad()
def bits_per_byte(model: Any, text: Tensor, length: int, device: str) -> float:
    """Mean loss of the text in bits; each piece is read without what stands before it."""
    model.eval()
    pieces = text[: len(text) // length * length].view(-1, length).long()
    total = torch.zeros((), device=device)
    for piece in pieces.split(32):
        ids = piece.to(device)
        total += model(input_ids=ids, labels=ids).loss * len(ids)
    model.train()
    return float(total) / len(pieces) / math.log(2)


def train(method: str, text: Tensor, test: Tensor, given: argparse.Namespace) -> Curve:
    """One run: bits per byte over its FLOPs."""
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=given.width, num_hidden_layers=given.layers,
        num_attention_heads=8, num_key_value_heads=4, intermediate_size=3 * given.width,
        max_position_embeddings=given.length, use_cache=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(given.device)
    first = next(batches(text, given.batch, given.length, given.seed)).to(given.device)
    batch = {"input_ids": first, "labels": first}

    def loss() -> Tensor:
        return model(**batch).loss

    whole = Meter(model, loss).step() * given.steps
    budget = whole * (1.0 if method == "full" else given.flops)
    gates = None
    if (chosen := METHODS[method]) is not None:
        choices = mat.MATConfig(
            share=given.share, mode="cut", every=given.every, reduction="online", log=False,
            seed=given.seed, **chosen,
        )  # fmt: skip
        gates = mat.attach_(model, choices)
    optimiser = mat.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, compact=True)
    meter = Meter(model, loss, gates, batch)
    curve = Curve(method, whole)
    spent, seconds = 0, 0.0
    for step, piece in enumerate(batches(text, given.batch, given.length, given.seed)):
        if curve.due(spent / budget):
            curve.add(spent, step, seconds, bits_per_byte(model, test, given.length, given.device))
        if spent >= budget:
            return curve
        start = now()
        if gates is not None and gates.maybe_select(step):
            spent += meter.selection
        for group in optimiser.param_groups:
            group["lr"] = RATE * schedule(spent / budget)
        ids = piece.to(given.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.clip_grad_norm_(1.0)
        optimiser.step()
        optimiser.zero_grad()
        seconds += now() - start
        spent += meter.step()
    raise AssertionError("batches never end")


def main(argv: Sequence[str] | None = None) -> None:
    """Train by every method, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--data", type=Path, help="folder with parquet files; the hub if not given")
    parser.add_argument("--out", type=Path, default=Path("examples-out/llama"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=300, help="of training all units")
    parser.add_argument("--flops", type=float, default=0.65, help="share that the others spend")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the units that train")
    parser.add_argument("--every", type=int, default=20, help="steps between selections")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="bytes of a piece")
    parser.add_argument("--bytes", type=int, default=10**7, help="of the training text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    given = parser.parse_args(argv)
    text = read(given.data, "train", given.bytes)
    test = read(given.data, "test", max(given.length, min(given.bytes // 100, 2**15)))
    curves = [train(method, text, test, given) for method in given.methods]
    curves_plot(given.out / "llama.png", curves, "test loss, bits per byte")
    print(curves_table(curves, "test loss, bits per byte"))


if __name__ == "__main__":
    main()
