"""What the suite's models cannot do is refused in one sentence, and what routers do is logged."""

from pathlib import Path

import numpy as np
import pytest
from short_runs import SWITCH, VGG, composed, events, one_sentence, small

from mat.suite import engine
from mat.suite.compose import resolve
from mat.suite.errors import UserError


@pytest.mark.parametrize(
    "override, part",
    [
        ("model.experts=0", "model.experts=0"),
        ("model.capacity_factor=0", "(0, 8]"),
        ("model.capacity_factor=9", "(0, 8]"),
        ("model.switch_every=5", "[1, 4]"),
        ("model.balance_loss=-1", "model.balance_loss=-1"),
        ("model.z_loss=-1", "model.z_loss=-1"),
        ("model.heads=3", "does not divide"),
        ("selection.reduction=online", "which its forward pass couples: choose random"),
        ("selection.units=[ffn]", "is none of model=switch_mini"),
        ("selection.units=[expert]", "did you mean experts?"),
    ],
)
def test_senseless_experts_are_refused_in_one_sentence(override: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(composed("model=switch_mini", "selection=experts_mini", override))
    assert part in str(caught.value) and one_sentence(str(caught.value)), caught.value


@pytest.mark.parametrize(
    "model, modality, part",
    [(SWITCH, "text", "capacity of experts"), (VGG, "image", "batch norm")],
    ids=["switch", "vgg"],
)
def test_accumulation_is_refused_where_samples_are_coupled(
    model: tuple[str, ...], modality: str, part: str, cache: Path
) -> None:
    with pytest.raises(UserError) as caught:
        small(cache, *model, "train.accumulation=2", modality=modality)
    message = str(caught.value)
    assert message.startswith("train.accumulation=2") and part in message and one_sentence(message)
    assert small(cache, "train.accumulation=2").train.accumulation == 2  # not so for BERT


@pytest.mark.parametrize("method", ["baseline", "mat"])
def test_a_run_logs_what_the_router_does(method: str, tmp_path: Path, cache: Path) -> None:
    summary = engine.run(small(cache, *SWITCH, f"method={method}", steps=20), tmp_path / "run")
    assert summary is not None and summary["steps"] > 10
    logged = events(tmp_path / "run", "train")
    assert logged and all(
        1 / 4 <= e["expert_load"] <= 1 and 0 <= e["drop_rate"] < 1 for e in logged
    )
    assert all(0 < e["router_entropy"] <= np.log(4) + 1e-6 for e in logged)
