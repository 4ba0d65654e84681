"""Every example runs at toy size, on random weights and synthetic rows."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch import nn

import mat
from examples.report import interval, mean_in_words

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from examples import finetune_text, llama, resnet, text_methods  # noqa: E402
from examples.meter import Meter  # noqa: E402

WORDS = [f"w{i}" for i in range(30)]
LENGTH, BATCH = 8, 6


def tiny_config() -> Any:
    return transformers.BertConfig(
        vocab_size=35, hidden_size=12, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=24, max_position_embeddings=LENGTH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokeniser."""
    folder = tmp_path_factory.mktemp("model")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(names))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of three classes, each with words of its own."""
    folder, draw = tmp_path_factory.mktemp("toy"), random.Random(0)
    for split, count in (("train", 20), ("test", 9)):
        labels = [i % 3 for i in range(count)]
        texts = [
            " ".join(draw.choices(WORDS[10 * label : 10 * label + 10], k=5)) for label in labels
        ]
        table = pa.table({"text": texts, "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return folder


def finetune(pretrained: Path, documents: Path, out: Path, *more: str) -> None:
    finetune_text.main(
        ["--model", str(pretrained), "--data", str(documents), "--out", str(out), "--device", "cpu",
         "--precision", "float32", "--length", str(LENGTH), "--batch", str(BATCH), *more]
    )  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_every_method_spends_its_flops(
    pretrained: Path, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    methods = {name: short(method) for name, method in text_methods.METHODS.items()}
    monkeypatch.setattr("examples.text_runs.METHODS", methods)
    finetune(pretrained, documents, tmp_path, "--epochs", "3", "--rate", "0.001", "--seeds", "1")
    runs = {result["method"]: result for result in results(tmp_path / "runs").values()}
    assert set(runs) == set(text_methods.METHODS)
    step = runs["full"]["flops"] / runs["full"]["steps"]
    for method, result in runs.items():
        over = result["flops"] - result["flops_of_full"] * (1 if method == "full" else 0.65)
        assert 0 <= over < 2 * step, method  # the last step, and a selection before it
    assert all(runs[m]["active"] < 1 for m in runs if m.startswith(("mat", "random", "static")))
    assert runs["mat-share"]["selections"] == 3 and runs["static"]["selections"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[-len(runs) :]] == list(text_methods.METHODS)
    assert (tmp_path / "accuracy.png").stat().st_size > 0


def short(method: text_methods.Method) -> text_methods.Method:
    """The method with selections at every second step."""
    if method.config is None or method.every == 1:
        return method
    config = mat.MATConfig(**vars(method.config) | {"every": 2})
    return text_methods.Method(**vars(method) | {"config": config, "every": 2})


def test_finished_runs_are_kept_and_the_best_rate_taken(
    pretrained: Path, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--epochs", "1.5", "--methods", "fitted", "--seeds", "3"
    finetune(pretrained, documents, tmp_path, *options)
    runs = results(tmp_path / "runs")
    tuning = [r for r in runs.values() if r["seed"] == finetune_text.TUNING_SEED]
    best = max(tuning, key=lambda r: (r["validation_accuracy"], -r["validation_loss"]))
    assert {r["rate"] for r in tuning} == set(text_methods.RATES) and len(runs) == 5
    assert next(r for r in runs.values() if r["seed"] == 3)["rate"] == best["rate"]
    capsys.readouterr()
    finetune(pretrained, documents, tmp_path, *options, "--table-only")
    table = capsys.readouterr().out
    finetune(pretrained, documents, tmp_path, *options)
    assert capsys.readouterr().out == table and results(tmp_path / "runs") == runs
    with pytest.raises(SystemExit, match=r"made with epochs=1\.5, not 1\.0: choose another --out"):
        finetune(pretrained, documents, tmp_path, "--epochs", "1", *options[2:])


def test_lora_and_top_layers_cost_what_they_run() -> None:
    """Six projections and products of every layer by hand, with their gradients."""
    model = transformers.BertForSequenceClassification(tiny_config())
    batch = {
        "input_ids": torch.ones(BATCH, LENGTH, dtype=torch.long),
        "labels": torch.zeros(BATCH, dtype=torch.long),
    }
    width, tokens = 12, BATCH * LENGTH
    weights = 2 * tokens * (4 * width**2 + 2 * width * 24)  # of a layer: matrices on tokens
    attention = 2 * 2 * BATCH * LENGTH**2 * width
    head = 2 * BATCH * (width**2 + width * 2)
    forward = 3 * (weights + attention) + head
    layer, inputs = 2 * (weights + attention), 2 * tokens * 3 * width**2
    text_methods.train_top_layers(model)
    assert Meter(model, lambda: model(**batch).loss).step() == forward + 2 * head + layer - inputs
    pytest.importorskip("peft")
    model = transformers.BertForSequenceClassification(tiny_config())
    lora = text_methods.with_lora(model)
    low_rank = 2 * (2 * 2 * tokens * width * 8)  # of a layer: two pairs of matrices
    wanted = forward + 3 * low_rank + 2 * head + 3 * (weights + 2 * attention + 2 * low_rank)
    # Below the lowest pairs nothing is wanted: of the first layer no gradient of the projections'
    # inputs and of the keys (with dropout, attention is two products here).
    wanted -= inputs + 2 * (2 * tokens * width * 8) + 2 * BATCH * LENGTH**2 * width
    assert Meter(lora, lambda: lora(**batch).loss).step() == wanted


def test_plain_loop_trains_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        table = pa.table({"text": ["the quick brown fox jumps over the lazy dog \n"] * 30})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    llama.main(
        ["--data", str(tmp_path), "--out", str(tmp_path), "--steps", "20", "--layers", "2",
         "--width", "16", "--batch", "2", "--length", "8", "--every", "3", "--device", "cpu"]
    )  # fmt: skip
    assert ended(capsys, llama.METHODS).keys() == llama.METHODS.keys()
    assert (tmp_path / "llama.png").stat().st_size > 0


def test_plain_loop_trains_a_resnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    rows = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    for split in ("train", "test"):
        table = pa.table({"img": rows, "label": [0, 1] * 4})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    monkeypatch.setattr(resnet, "PROBE", 2)
    resnet.main(
        ["--data", str(tmp_path), "--out", str(tmp_path), "--images", "8", "--batch", "2",
         "--epochs", "1", "--every", "1", "--device", "cpu"]
    )  # fmt: skip
    assert ended(capsys, resnet.METHODS).keys() == resnet.METHODS.keys()
    assert (tmp_path / "resnet.png").stat().st_size > 0


def ended(capsys: pytest.CaptureFixture[str], methods: Any) -> dict[str, float]:
    """The values of a printed table, all finite."""
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    values = {line[1].strip(): float(line[2]) for line in lines if line[1].strip() in methods}
    assert np.isfinite(list(values.values())).all()
    return values


def test_resnet_keeps_the_resolution_of_small_images() -> None:
    model = resnet.resnet18(10)
    sizes = []
    assert isinstance(model.layer1, nn.Module)
    model.layer1.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape))
    model(torch.zeros(1, 3, 32, 32))
    assert sizes == [(1, 64, 32, 32)]


def test_interval_is_students() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    assert interval(values) == pytest.approx(3.1824 * np.std(values, ddof=1) / 2, rel=1e-3)
    assert mean_in_words([1.0], 1) == "1.0"
