"""An interrupted run gives what a whole one does; a failed one keeps its last good checkpoint."""

import json
import math
import os
import shutil
import signal
from typing import Any

import pandas as pd
import pytest
import torch
from short_runs import (
    ONLINE,
    SWITCH,
    VGG,
    assert_same,
    one_sentence,
    result,
    run_interrupted,
    small,
)  # fmt: skip

from mat.suite import engine
from mat.suite.engine import Training
from mat.suite.errors import RunFailed, UserError
from mat.suite.validation import validate

# --- interruption


DROPOUT = ("model.dropout=0.2", "hardware.precision=bfloat16")
INTERRUPTIONS = [  # overrides, verb, call, how
    (("method=mat",), "_train_step", 4, "after"),  # before the first checkpoint
    (("method=mat",), "_train_step", 11, "before"),  # between steps
    (("method=mat",), "_train_step", 10, "sigterm"),
    (("method=mat",), "_select", 1, "after"),
    (("method=mat",), "_select", 9, "before"),
    (("method=mat",), "_select", 9, "after"),
    (("method=mat",), "_select", 9, "sigterm"),
    (("method=mat",), "_evaluate", 17, "after"),  # best-<step>.pt is newer than latest.pt
    (("method=mat",), "_save", 2, "before"),
    (("method=mat",), "_finish", 1, "before"),
    (("method=multirate",), "_train_step", 3, "after"),  # in the first cycle of five
    (("method=multirate",), "_train_step", 13, "sigterm"),  # in the middle of a cycle
    (("method=multirate",), "_train_step", 18, "before"),
    (("method=baseline",), "_train_step", 2, "sigterm"),
    (("method=baseline",), "_train_step", 12, "after"),
    (("method=baseline", *DROPOUT), "_train_step", 12, "sigterm"),
    (("method=mat", *DROPOUT), "_train_step", 12, "before"),
    (("method=rand",), "_train_step", 12, "before"),
    (("method=gradnorm",), "_select", 6, "after"),
    (("method=shuffled",), "_select", 6, "after"),
    (ONLINE, "_select", 6, "before"),
    (ONLINE, "_select", 6, "sigterm"),
    (ONLINE, "_train_step", 8, "after"),
]


OTHER_MODELS = [  # modality, overrides, verb, call, how
    (
        "image",
        (*VGG, "method=mat", "selection.mode=cut"),
        "_train_step",
        12,
        "before",
    ),  # past the first full epoch
    ("image", (*VGG, "method=mat"), "_train_step", 4, "sigterm"),
    ("image", (*VGG, "method=mat"), "_train_step", 12, "after"),
    ("image", (*VGG, "method=mat"), "_evaluate", 17, "after"),
    ("text", (*SWITCH, "method=mat", "model.dropout=0.2"), "_train_step", 9, "before"),
    ("text", (*SWITCH, "method=mat", "model.dropout=0.2"), "_train_step", 10, "sigterm"),
    ("text", (*SWITCH, "method=mat", "model.dropout=0.2"), "_select", 5, "before"),
]


@pytest.mark.parametrize(
    ("modality", "overrides", "verb", "call", "how"),
    [*(("text", *row) for row in INTERRUPTIONS), *OTHER_MODELS],
)
def test_interrupted_run_gives_the_same_numbers(
    modality, overrides, verb, call, how, finished, tmp_path
):
    config, reference = finished(*overrides, modality=modality)
    run_interrupted(config, tmp_path / "run", verb, call, how)
    assert engine.run(config, tmp_path / "run") is not None
    assert_same(result(tmp_path / "run"), result(reference))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [e["device"] for e in environment.get("resumed", [])] in (
        ["cpu"],
        [],
    )  # nothing to go on from


def test_checkpoint_right_at_a_selection(finished, tmp_path):
    config, reference = finished(
        "method=mat", "selection.samples=1", steps=60
    )  # selections two steps apart
    units = pd.read_parquet(reference / "units.parquet")
    step = int(units[units["t"] == 7]["step"].iloc[0])
    assert step >= 7 and step - int(units[units["t"] == 6]["step"].iloc[0]) > 1
    run_interrupted(config, tmp_path / "run", "_train_step", step, "sigterm")
    assert (
        pd.read_parquet(tmp_path / "run" / "units.parquet")["t"].max() == 6
    )  # the eighth is made after resuming
    shutil.move(
        tmp_path / "run", tmp_path / "moved"
    )  # nothing in a folder depends on where it lies
    engine.run(config, tmp_path / "moved")
    assert_same(result(tmp_path / "moved"), result(reference))


def test_run_interrupted_again_and_again(finished, tmp_path):
    config, reference = finished("method=mat")
    summary, times = None, 0
    with pytest.MonkeyPatch.context() as patched:
        original = Training._train_step

        def every_fifth(self: Training, *arguments: Any) -> None:
            original(self, *arguments)
            if self.step % 5 == 0:
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(Training, "_train_step", every_fifth)
        while summary is None and times < 20:
            summary, times = engine.run(config, tmp_path / "run"), times + 1
    assert times >= 4
    assert_same(result(tmp_path / "run"), result(reference))


def test_signal_handlers_are_put_back(cache, tmp_path):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    config = small(cache, "method=baseline")
    run_interrupted(config, tmp_path / "run", "_train_step", 1, "sigterm")
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_checkpoint_is_old_or_new_never_half(cache, tmp_path, monkeypatch):
    config = small(cache, "method=baseline")
    run_interrupted(config, tmp_path / "run", "_train_step", 9, "sigterm")
    path = tmp_path / "run" / "checkpoint" / "latest.pt"
    before = path.read_bytes()

    def torn(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        engine.run(config, tmp_path / "run")
    assert path.read_bytes() == before


# --- failure


def poison(self: Training) -> None:
    with torch.no_grad():
        self.model.get_parameter("transform.weight").fill_(math.nan)


FAILURES = [  # before which call of what numbers go bad, a part of the sentence
    ("_train_step", 11, "training diverged at step 10 (loss nan"),
    ("_evaluate", 17, "the validation loss is nan"),
    ("_select", 9, "has diverged"),
]


@pytest.mark.parametrize(("verb", "call", "part"), FAILURES)
def test_divergence_fails_the_run_and_keeps_the_last_good_checkpoint(
    verb, call, part, finished, tmp_path, monkeypatch
):
    config, reference = finished("method=mat")
    folder = tmp_path / "run"
    original, count = getattr(Training, verb), 0

    def broken(self: Training, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            poison(self)
        return original(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(RunFailed) as caught:
        patched.setattr(Training, verb, broken)
        engine.run(config, folder)
    message = str(caught.value)
    assert part in message and str(folder) in message and one_sentence(message), message
    assert json.loads((folder / "failure.json").read_text()) == {"reason": message}
    assert not (folder / "summary.json").exists()
    kept = torch.load(folder / "checkpoint" / "latest.pt", weights_only=True)
    assert kept["step"] == 7 and all(torch.isfinite(t).all() for t in kept["model"].values())
    assert engine.run(config, folder) is not None
    assert not (folder / "failure.json").exists()
    assert_same(result(folder), result(reference))


def test_too_high_a_learning_rate_fails_by_itself(cache, tmp_path):
    config = small(cache, "method=baseline", "train.lr=1e30")
    with pytest.raises(RunFailed, match=r"loss .*nan.* at step \d+.*: lower train.lr"):
        engine.run(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "failure.json").read_text())["reason"].startswith(
        str(tmp_path)
    )


def test_missing_cuda_device_is_one_sentence(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = small(cache, "hardware=cuda")
    validate(config)
    with pytest.raises(UserError, match=r"hardware.device=cuda.*hardware=cpu") as caught:
        engine.run(config, tmp_path / "run")
    assert one_sentence(str(caught.value))


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["baseline", "mat", "multirate"])
def test_interrupted_run_on_a_gpu_gives_the_same_numbers(method, cache, tmp_path):
    config = small(cache, f"method={method}", *DROPOUT, "hardware=cuda")
    assert engine.run(config, tmp_path / "reference") is not None
    run_interrupted(config, tmp_path / "run", "_train_step", 12, "before")
    assert engine.run(config, tmp_path / "run") is not None
    assert_same(result(tmp_path / "run"), result(tmp_path / "reference"))


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the refusal needs a machine without a CUDA device"
)
def test_run_that_was_refused_leaves_its_folder_to_another(cache, tmp_path):
    with pytest.raises(UserError, match="choose hardware=cpu"):
        engine.run(
            small(cache, "method=baseline", "hardware.device=cuda", steps=3), tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()
    summary = engine.run(small(cache, "method=baseline", steps=3), tmp_path / "run")
    assert summary is not None and not (tmp_path / "run" / "failure.json").exists()
    assert "device: cpu" in (tmp_path / "run" / "config.yaml").read_text()
