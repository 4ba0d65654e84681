"""Every model and method goes the way it went before, in float64: see ``trajectories.py``.

By default a selection runs in which every pair of model and method, of model and mode, and of
method and mode occurs; with ``MAT_ALL_TRAJECTORIES=1`` all of them do.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.trajectories import FILE, METHODS, MODELS, cases, trajectories

TOLERANCE = 1e-10  # relative
NOISE = 1e-13  # gradients that are zero but for rounding, such as a bias's before batch norm


def differences(a: Any, b: Any, where: str) -> list[str]:
    """Places where two trajectories differ, in the order in which a run computes things.

    Numbers of one list are held against its largest: a tensor's sum may be zero but for rounding.
    """
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{where} has other entries: {sorted(a.keys() ^ b.keys())}"]
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if not isinstance(a, list):
        return differences([a], [b], where)
    if len(a) != len(b):
        return [f"{where} has {len(b)} entries, recorded are {len(a)}"]
    scale = max((abs(x) for x in a if isinstance(x, float)), default=0.0)
    found = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if isinstance(x, list):
            found += differences(x, y, f"{where}[{i}]")
        elif abs(x - y) > TOLERANCE * scale + NOISE if isinstance(x, float) else x != y:
            found.append(f"{where}[{i}] is {y}, recorded is {x}")
    return found


def selected() -> list[str]:
    """Of the two modes of a model and method one, in turn; all cases where asked for."""
    every = cases()
    if os.environ.get("MAT_ALL_TRAJECTORIES"):
        return every
    models, methods = list(MODELS), list(METHODS)
    return [
        case
        for case in every
        for model, method, mode in [case.split()]
        if f"{model} {method} exact" not in every
        or (models.index(model) + methods.index(method)) % 2 == (mode == "exact")
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return trajectories(selected(), Path(tmp_path_factory.mktemp("trajectories")))


@pytest.mark.parametrize("case", selected())
def test_trajectory_is_the_recorded_one(case: str, made: dict[str, dict[str, Any]]) -> None:
    recorded = json.loads(FILE.read_text())
    assert differences(recorded[case], made[case], case)[:5] == []
