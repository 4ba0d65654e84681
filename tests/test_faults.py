"""What machines and people do to run folders: no fault costs data, and each is told in one
sentence.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import (
    assert_same,
    composed,
    events,
    one_sentence,
    result,
    run_interrupted,
    small,
    small_overrides,
)

from mat.suite import engine
from mat.suite.compose import resolve
from mat.suite.config import Config
from mat.suite.engine import Training
from mat.suite.errors import UserError
from mat.suite.glance import look, state_of
from mat.suite.memory import check_memory
from mat.suite.precision import machine_precision
from mat.suite.runs import RunFolder

Run = tuple[Config, Path]
STEPS = 26


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A complete run."""
    config, folder = (
        small(cache, "method=mat", steps=STEPS),
        tmp_path_factory.mktemp("whole") / "run",
    )
    assert engine.run(config, folder) is not None
    return config, folder


@pytest.fixture(scope="module")
def half(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, stopped at step 10, with the checkpoint of step 7 beside its latest one."""
    config, folder = (
        small(cache, "method=mat", steps=STEPS),
        tmp_path_factory.mktemp("half") / "run",
    )
    run_interrupted(config, folder, "_train_step", 10, "sigterm")
    assert {path.stem for path in (folder / "checkpoint").iterdir()} > {"latest", "before"}
    return config, folder


def goes_on_or_says(config: Config, folder: Path, reference: Path) -> str:
    """Run it: empty if the numbers are those of the reference; else the one sentence that it was
    refused with.
    """
    try:
        assert engine.run(config, folder) is not None
    except UserError as error:
        assert one_sentence(str(error)) and str(folder) in str(error), error
        return str(error)
    assert_same(result(folder), result(reference))
    assert look(folder).status == "complete"
    return ""


def flip(path: Path, place: float) -> None:
    """Change one bit, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": lambda path: flip(path, 0.5),
}
HALF = [  # file, what happens to it, whether the run goes on
    *(("checkpoint/latest.pt", how, True) for how in DAMAGES),
    *(("config.yaml", how, True) for how in DAMAGES),
    *(("environment.json", how, True) for how in DAMAGES),
    *(("metrics.jsonl", how, False) for how in DAMAGES),
    *(("units.parquet", how, False) for how in ("empty", "gone", "cut")),
]


@pytest.mark.parametrize(("name", "how", "goes_on"), HALF)
def test_damaged_begun_run_goes_on_or_is_refused(name, how, goes_on, half, whole, tmp_path, capsys):
    config, folder = half
    shutil.copytree(folder, tmp_path / "run")
    DAMAGES[how](tmp_path / "run" / name)
    sentence = goes_on_or_says(config, tmp_path / "run", whole[1])
    assert goes_on == (sentence == ""), sentence
    assert goes_on or name in sentence
    if name.endswith("latest.pt") and how != "gone":
        assert "latest.pt is damaged" in capsys.readouterr().err


WHOLE = [  # file, whether the run can be completed again
    ("summary.json", True),
    ("environment.json", True),
    ("config.yaml", True),
    ("metrics.jsonl", False),
    ("units.parquet", False),
]


@pytest.mark.parametrize("how", ["empty", "one bit"])
@pytest.mark.parametrize(("name", "mends"), WHOLE)
def test_damaged_complete_run_is_never_taken_for_whole(name, mends, how, whole, tmp_path, capsys):
    config, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    DAMAGES[how](tmp_path / "run" / name)
    assert state_of(tmp_path / "run")[0] == "damaged"
    sentence = goes_on_or_says(config, tmp_path / "run", whole[1])
    if (name, how) != ("units.parquet", "one bit"):  # that bit may be one that no number depends on
        assert mends == (sentence == ""), sentence
    assert f"{name}" in (sentence or capsys.readouterr().err)


def test_complete_run_without_checkpoints_is_not_trained_over(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    (tmp_path / "run" / "summary.json").write_text("")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "summary.json" in goes_on_or_says(whole[0], tmp_path / "run", whole[1])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("seed", range(12))
def test_random_bit_of_a_begun_run_changes_no_number(seed, half, whole, tmp_path):
    config, folder = half
    shutil.copytree(folder, tmp_path / "run")
    chosen = random.Random(seed)
    files = sorted(
        path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.stat().st_size
    )
    flip(chosen.choice(files), chosen.random())
    goes_on_or_says(config, tmp_path / "run", whole[1])


def test_best_weights_of_another_run_are_refused(half, whole, tmp_path, cache):
    config, folder = half
    other = small(cache, "method=mat", "train.lr=2e-2", steps=STEPS)
    run_interrupted(other, tmp_path / "other", "_train_step", 10, "sigterm")
    shutil.copytree(folder, tmp_path / "run")
    foreign = max((tmp_path / "other" / "checkpoint").glob("best-*.pt"))
    for mine in (tmp_path / "run" / "checkpoint").glob("best-*.pt"):
        shutil.copy(foreign, mine)
    assert "of another run" in goes_on_or_says(config, tmp_path / "run", whole[1])
    shutil.rmtree(tmp_path / "run" / "checkpoint")  # the remedy
    assert goes_on_or_says(config, tmp_path / "run", whole[1]) == ""


def test_checkpoint_of_another_layout_is_refused(half, tmp_path, whole):
    shutil.copytree(half[1], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoint").glob("*.pt"):
        torch.save(torch.load(path, weights_only=True), path)
    assert "version of this program" in goes_on_or_says(half[0], tmp_path / "run", whole[1])


# --- other processes, machines and data


def test_two_processes_do_not_share_a_folder(half, tmp_path):
    shutil.copytree(half[1], tmp_path / "run")
    with RunFolder(tmp_path / "run", half[0]) as other:
        other.lock()
        with pytest.raises(UserError, match="another process") as caught:
            engine.run(half[0], tmp_path / "run")
    assert one_sentence(str(caught.value)) and not (tmp_path / "run" / "failure.json").exists()


def on(config: Config, **hardware: Any) -> Config:
    return dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, **hardware))


def test_a_begun_run_keeps_its_threads_and_precision(half, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(half[1], tmp_path / "run")
    monkeypatch.setattr(engine, "THREADS", 2)
    monkeypatch.setattr(engine, "machine_precision", lambda device: "bfloat16")
    try:
        assert (
            goes_on_or_says(on(half[0], precision="auto", threads=2), tmp_path / "run", whole[1])
            == ""
        )
        assert "hardware.threads=2" in capsys.readouterr().err and torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    # A complete one stands
    assert engine.run(on(half[0], precision="auto"), tmp_path / "run") is not None


def test_automatic_precision_is_recorded_as_what_it_is(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "machine_precision", lambda device: "float32")
    config = on(small(cache, "method=baseline", steps=3), precision="auto")
    assert engine.run(config, tmp_path / "run") is not None
    run = look(tmp_path / "run")
    assert run.config["hardware"]["precision"] == run.environment["precision"] == "float32"


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("fma avx2 avx512f", "float32"),
        ("avx512f avx512_bf16", "bfloat16"),
        ("amx_bf16 amx_tile", "bfloat16"),
    ],
)
def test_automatic_precision_follows_the_processor(flags, precision, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"model name\t: a CPU\nflags\t\t: {flags}\n")
    monkeypatch.setattr("mat.suite.precision.CPUINFO", str(tmp_path / "cpuinfo"))
    assert machine_precision("cpu") == precision


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_automatic_precision_follows_the_device(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert machine_precision("cuda") == precision


def test_double_precision_is_of_model_and_images(cache, tmp_path):
    config = small(
        cache,
        "method=mat",
        "model=vgg16_mini",
        "selection=filters_mini",
        "train=images_mini",
        "hardware.precision=float64",
        modality="image",
        steps=3,
    )
    training = Training(config, RunFolder(tmp_path / "run", config))
    assert {p.dtype for p in training.model.parameters()} == {torch.float64}
    assert training._train_batch().inputs.dtype == training.probe.inputs.dtype == torch.float64
    assert training.train()["steps"] >= 1


@pytest.mark.parametrize("method", ["baseline", "mat"])
def test_resuming_on_other_data_is_refused(method, cache, tmp_path, monkeypatch):
    """The configuration does not tell other text below the same dataset.root."""
    config = small(cache, f"method={method}", steps=12)
    run_interrupted(config, tmp_path / "run", "_train_step", 3, "sigterm")
    load = engine.datasets.load

    def other(dataset: Any, seed: int) -> Any:
        text = load(dataset, seed)
        text.fingerprint = "of another text, in whatever split"
        return text

    monkeypatch.setattr(engine.datasets, "load", other)
    with pytest.raises(UserError, match=r"was begun on other data: .*dataset.root") as caught:
        engine.run(config, tmp_path / "run")
    assert one_sentence(str(caught.value)) and str(tmp_path) in str(caught.value)


MATCHED = [  # overrides of the run to match, a part of the sentence
    (("method=baseline",), "selects no units"),
    (("method=mat", "selection.interval=0.04"), "another selection.interval"),
    (("method=mat", "selection.share=0.5"), "another selection.share"),
]


@pytest.mark.parametrize(("overrides", "part"), MATCHED)
def test_a_matched_run_differs_in_its_method_alone(overrides, part, cache, tmp_path):
    engine.run(small(cache, *overrides, steps=8), tmp_path / "other")
    config = small(cache, "method=rand_matched", f"method.matched={tmp_path / 'other'}", steps=8)
    with pytest.raises(UserError, match=part) as caught:
        engine.run(config, tmp_path / "run")
    assert one_sentence(str(caught.value)) and not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_run_it_was_matched_to(cache, tmp_path):
    configs = []
    for seed in (0, 1):
        engine.run(
            small(cache, "method=mat", "selection.scope=all", f"seed={seed}", steps=12),
            tmp_path / str(seed),
        )
        configs.append(small(cache, "method=rand_matched", "selection.scope=all",
                             f"method.matched={tmp_path / str(seed)}", steps=12))  # fmt: skip
    run_interrupted(configs[0], tmp_path / "run", "_train_step", 3, "sigterm")
    with pytest.raises(UserError, match=r"another method.matched") as caught:
        engine.run(configs[1], tmp_path / "run")
    assert one_sentence(str(caught.value))
    shutil.move(tmp_path / "0", tmp_path / "moved")
    moved = dataclasses.replace(configs[0].method, matched=str(tmp_path / "moved"))
    assert engine.run(dataclasses.replace(configs[0], method=moved), tmp_path / "run") is not None


# --- signals, disks, memory


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_can_be_stopped_while_it_is_tested(number, whole, tmp_path, monkeypatch):
    config, reference = whole
    scores_on = Training._scores_on

    def asked(self: Training, split: str, samples: int | None) -> dict[str, float]:
        if split == "test":
            os.kill(os.getpid(), number)
        return scores_on(self, split, samples)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "_scores_on", asked)
        assert engine.run(config, tmp_path / "run") is None
    assert goes_on_or_says(config, tmp_path / "run", reference) == ""


def test_a_second_signal_while_it_saves_damages_nothing(whole, tmp_path, monkeypatch):
    config, reference = whole
    save = RunFolder.save

    def pressed(self: RunFolder, state: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(self, state)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "save", pressed)
        assert engine.run(config, tmp_path / "run") is None
    assert goes_on_or_says(config, tmp_path / "run", reference) == ""


def test_nohup_keeps_its_promise(cache, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        config, step = small(cache, "method=baseline", steps=6), Training._train_step

        def hung_up(self: Training, *arguments: Any) -> None:
            os.kill(os.getpid(), signal.SIGHUP)
            step(self, *arguments)

        monkeypatch.setattr(Training, "_train_step", hung_up)
        assert engine.run(config, tmp_path / "run") is not None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_full_disk_the_run_goes_on(half, whole, tmp_path):
    shutil.copytree(half[1], tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Less than a checkpoint takes
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
        with pytest.raises(OSError, match="File too large") as caught:
            engine.run(half[0], tmp_path / "run")
        assert str(tmp_path / "run") in str(caught.value.filename)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert goes_on_or_says(half[0], tmp_path / "run", whole[1]) == ""


def test_a_loss_that_is_finite_stops_no_run(cache, tmp_path, monkeypatch):
    """A loss of three times the first one is gone through by healthy runs."""
    stepper = engine.Stepper.step

    class High:
        def __init__(self, outcome: Any) -> None:
            self.outcome = outcome

        def read(self) -> Any:
            return dataclasses.replace(self.outcome.read(), loss=1e6)

    monkeypatch.setattr(engine.Stepper, "step", lambda self, *a: High(stepper(self, *a)))
    assert engine.run(small(cache, "method=baseline", steps=6), tmp_path / "run") is not None
    assert events(tmp_path / "run", "train")[0]["loss"] > 1e5


LARGE = [
    ("model.width=65536", "model.ffn_hidden=262144", "model.layers=1000"),
    ("train.batch=1048576", "dataset.length=65536"),
]


@pytest.mark.parametrize("overrides", LARGE)
def test_what_cannot_fit_is_refused_before_it_is_allocated(overrides, cache):
    config = resolve(composed(*small_overrides(cache, "hardware=cpu"), *overrides))
    with pytest.raises(UserError, match="GiB of memory") as caught:
        check_memory(config, 256)
    assert one_sentence(str(caught.value))


def test_refused_run_leaves_no_folder(cache, tmp_path):
    for overrides in (("selection.samples=100000",), ("dataset.train_sequences=100000",)):
        with pytest.raises(UserError):
            engine.run(small(cache, "method=mat", *overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_digest_of_records_does_not_depend_on_their_form(half, tmp_path):
    shutil.copytree(half[1], tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint" / "latest.pt", weights_only=True)
    assert set(state["digests"]) == {"metrics", "units"} and np.isfinite(state["seconds"])
    assert json.loads(json.dumps(state["config"]))["seed"] == 0
