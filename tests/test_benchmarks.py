"""What all benchmarks stand on: allocator, peak memory, files that keep what was measured."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import gpu, harness
from benchmarks.fidelity import compare
from benchmarks.subjects import Subject
from mat.suite.config import TrainConfig
from tests.small_models import tiny_batch, tiny_bert

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """In a process of its own, whose C library nothing has set up yet."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


FAULTS = """
import resource, torch
from mat.suite.allocator import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
plain = faults()
keep_freed_memory()
faults()
print(plain, faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
def test_kept_memory_is_not_faulted_in_again() -> None:
    plain, kept = map(int, run(FAULTS).split())
    if not plain:
        pytest.skip("this system counts no page faults")
    assert kept < plain / 10


def test_the_allocator_is_set_when_times_are_taken_and_not_before() -> None:
    """Peak memory of a process that keeps what is freed would be that of everything before."""
    code = "from benchmarks import harness; from mat.suite.allocator import keep_freed_memory as k;"
    told = "print(k.cache_info().currsize);"
    code += f"{told} harness.medians([lambda: 0], 1); {told}"
    assert run(code).split() == ["0", "1"]


PEAK = """
import torch
from benchmarks.harness import peak_bytes
blocks = [torch.ones(2**18) for _ in range(200)]
pin = torch.ones(2**18)  # on top of the heap, so that what is freed below it stays with the process
del blocks
print(peak_bytes(lambda: [torch.ones(2**18) for _ in range(64)]))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell peak memory"
)
def test_peak_memory_is_that_of_the_call() -> None:
    """64 MB, although more had been freed before."""
    assert int(run(PEAK)) == pytest.approx(64 * 2**20, rel=0.15)


def test_a_part_measured_again_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    first = [harness.row(name, 1, 2, None) for name in ("a: x", "a: y", "b: x")]
    harness.write("some", first, merge=True)
    harness.write("some", [harness.row("a: z", 1, 4, None)], merge=True)
    found = json.loads(harness.path_of("some", "json").read_text())
    assert [r["name"] for r in found["rows"]] == ["b: x", "a: z"]
    assert len(found["load_average"]["before"]) == 3 and "commit" in found["environment"]
    harness.write("some", first[:1])
    assert len(json.loads(harness.path_of("some", "json").read_text())["rows"]) == 1
    frames = {"case": ["a", "b"], "x": [1, 2]}, {"case": ["a"], "x": [3]}
    for frame in map(pd.DataFrame, frames):
        whole = harness.write_table("some", frame, "case")
    assert whole.sort_values("case")["x"].tolist() == [3, 2]


@pytest.mark.parametrize("device, name", [("cpu", "some.json"), ("cuda", "some-cuda.json")])
def test_results_of_a_device_have_files_of_their_own(
    device: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "DEVICE", torch.device(device))
    assert harness.path_of("some", "json").name == name


def test_every_benchmark_has_its_place_in_make_and_on_a_gpu() -> None:
    files = (ROOT / "benchmarks").glob("*.py")
    names = {p.stem for p in files if "__main__" in p.read_text()} - {"gpu"}
    there = {step.name.split()[0] for step in gpu.steps()}
    assert names <= there
    assert all(f"-m benchmarks.{name}\n" in (ROOT / "Makefile").read_text() for name in names)


def test_a_subjects_step_trains_the_share_that_it_is_given() -> None:
    model = tiny_bert(dtype=torch.float32)
    recipe = TrainConfig(pflops=1, batch=4, lr=0.1)
    subject = Subject(model.to(harness.DEVICE), tiny_batch().to(harness.DEVICE), recipe)
    weight = model.get_parameter("blocks.0.ffn.up.weight")
    seen: list[str] = []
    launched = subject.launched(1 / 3, lambda: seen.append("before"), lambda: seen.append("after"))
    for action in (subject.step(1 / 3, "cut"), launched):
        before = weight.detach().clone()
        action()
        moved = (weight != before).view(3, -1).any(1)  # (groups,)
        assert moved.tolist() == [True, False, False]
    assert seen == ["before", "after"]


def test_a_ranking_is_compared_within_a_kind() -> None:
    kind = np.array(["ffn"] * 6 + ["heads"] * 3)
    truth = np.array([6.0, 5, 4, 3, 2, 1, 30, 20, 10])
    found = compare(np.array([6.0, 1, 4, 3, 2, 5, 60, 40, 20]), truth, kind)
    assert found["overlap"] == pytest.approx((0.5 + 1) / 2)
    assert found["spearman"] == pytest.approx((1 - 6 * 32 / (6 * 35) + 1) / 2)
    exact = {"factor": 3, "error": 0, "spearman": 1, "overlap": 1}
    assert compare(3 * truth, truth, kind) == pytest.approx(exact)
