"""Observers against references that are obviously right, and a run that does not notice them."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gradients import attach, gradients, jacobian, unit_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st
from references import rotate
from short_runs import assert_same, one_sentence, result, small
from small_models import tiny_batch, tiny_bert

from mat import ntk
from mat.suite import analysis, engine
from mat.suite.analysis import OBSERVERS, Scene, effective_rank, layers_of, scene
from mat.suite.data import load
from mat.suite.data.tokens import MaskedText
from mat.suite.errors import UserError
from mat.suite.models.bert import Attention
from mat.suite.validation import ANALYSES

OBSERVED = "analysis=[attention,kernels,descent]"


def seen(projections: int = 3, **config: object) -> Scene:
    """A scene of a tiny model with a few frozen heads, which the copy must not have."""
    model = tiny_bert(**config)  # type: ignore[arg-type]
    gates = attach(model)
    gates.set_active(np.arange(len(gates.units)) != 1)
    return scene(model, gates.units, tiny_batch(), projections, 0, 2**20)


def head_of(layer: Attention, sequence: torch.Tensor, u: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (T, K) of one head for a sequence (T, D), rotated if the model does that."""
    own = slice(3 * layer.head_width * u, 3 * layer.head_width * (u + 1))
    q, k, _ = (sequence @ layer.qkv.weight[own].T + layer.qkv.bias[own]).chunk(3, -1)
    return (q, k) if layer.rotary is None else (rotate(q), rotate(k))


# --- effective rank


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 9), rank=st.integers(1, 9), seed=st.integers(0, 99))
def test_effective_rank_of_equal_singular_values_is_the_rank(
    size: int, rank: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=random).double())[0] for _ in range(2)
    )
    rank = min(rank, size)
    assert effective_rank(3.7 * left[:, :rank] @ right[:, :rank].T) == pytest.approx(rank)


def test_effective_rank_by_hand() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.0]).double())
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(matrix) == pytest.approx(math.exp(entropy))
    assert 1 < effective_rank(matrix) < 2 < effective_rank(torch.eye(3))
    batch = torch.stack([matrix, torch.eye(3).double()])
    assert effective_rank(batch).tolist() == pytest.approx([math.exp(entropy), 3.0])


@pytest.mark.parametrize("config", [{}, {"positions": "learned", "norm": "post"}])
def test_attention_matrices_are_those_of_the_model(config: dict[str, str]) -> None:
    view = seen(**config)
    table = OBSERVERS["attention"](view)
    assert len(table) == 2 * 3 and set(table["kind"]) == {"heads"}
    layer = next(m for m in view.model.modules() if isinstance(m, Attention))
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    for b, sequence in enumerate(x):
        for u in range(3):
            q, k = head_of(layer, sequence, u)
            torch.testing.assert_close(layer.probabilities(x)[b, u], torch.softmax(q @ k.T / 2, -1))


@pytest.mark.parametrize("config", [{}, {"positions": "learned", "norm": "post"}])
def test_effective_rank_column_against_one_sample_at_a_time(config: dict[str, str]) -> None:
    view = seen(**config)
    inputs: dict[torch.nn.Module, torch.Tensor] = {}
    layers = [module for module in view.model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.register_forward_hook(lambda module, given, _: inputs.update({module: given[0]}))
    view.model(view.probe)
    expected = []
    for layer in layers:
        for u in range(layer.heads):
            ranks = []
            for sample in inputs[layer].detach():
                q, k = (part.detach() for part in head_of(layer, sample, u))
                weights = torch.exp(q @ k.T / math.sqrt(q.shape[1]))
                singular = torch.linalg.svdvals(weights / weights.sum(1, keepdim=True))
                share = singular / singular.sum()
                ranks.append(math.exp(-(share * share.log()).sum()))
            expected.append(sum(ranks) / len(ranks))
    table = OBSERVERS["attention"](view)
    assert table["effective_rank"].tolist() == pytest.approx(expected) and len(set(expected)) == 6
    assert list(zip(table["layer"], table["unit"], strict=True)) == [
        (i, u) for i in range(2) for u in range(3)
    ]


# --- kernels


def reduction(view: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Projections (m n, k) over sqrt(m), projection-major, and the sample of each row."""
    m, n = view.projections, view.probe.samples
    with torch.no_grad():
        outputs = view.model(view.probe)
    reducer = ntk.Reducer("random", m, view.seed, n)
    cotangents = reducer.cotangents(outputs, view.probe, outputs, 0, n)
    return torch.cat([c.view(n, -1) for c, _ in cotangents]) / m**0.5, torch.arange(n).repeat(m)


@pytest.mark.parametrize("config", [{}, {"positions": "learned", "norm": "post", "layers": 1}])
def test_kernel_table_against_explicit_jacobians(config: dict[str, object]) -> None:
    view = seen(**config)
    table, exact = OBSERVERS["kernels"](view), jacobian(view.model, view.probe)  # (n, k, ...)
    reduce, samples = reduction(view)

    def eigenvalues(columns: torch.Tensor) -> list[float]:
        rows = torch.einsum("rk,rkp->rp", reduce, columns[samples])
        return torch.linalg.eigvalsh(rows @ rows.T).flip(0).tolist()

    tops = [
        eigenvalues(unit_jacobian(exact, layer, u))[0]
        for layer in view.units.layers
        for u in range(layer.n_units)
    ]
    scopes = {scope: rows for scope, rows in table.groupby("scope")}
    assert scopes["unit"]["eigenvalue"].tolist() == pytest.approx(tops)
    blocks = [
        torch.cat(
            [j.flatten(2) for name, j in exact.items() if name.startswith(f"blocks.{i}.")], -1
        )
        for i in range(len(view.model.blocks))
    ]  # units, and the block's own norms and biases
    assert len(layers_of(view)) == len(blocks) == scopes["layer"]["layer"].nunique()
    for i, columns in enumerate(blocks):
        mine = scopes["layer"][scopes["layer"]["layer"] == i]
        assert mine["rank"].tolist() == list(range(1, 13))
        assert mine["eigenvalue"].tolist() == pytest.approx(
            eigenvalues(columns), rel=1e-6, abs=1e-9 * mine["trace"].max()
        )
        assert mine["eigenvalue"].sum() == pytest.approx(mine["trace"].iloc[0])
    assert scopes["network"]["eigenvalue"].tolist() == pytest.approx(
        eigenvalues(torch.cat(blocks, -1))
    )


# --- eq. (2)


def test_descent_against_explicit_gradients() -> None:
    view = seen(projections=4)
    table = OBSERVERS["descent"](view)
    exact = jacobian(view.model, view.probe)
    loss_gradient = gradients(view.model, view.probe, set())
    reduce, samples = reduction(view)
    row = 0
    with_axes = {name: gradient[None, None] for name, gradient in loss_gradient.items()}
    for layer in view.units.layers:
        for u in range(layer.n_units):
            a = torch.einsum("rk,rkp->rp", reduce, unit_jacobian(exact, layer, u)[samples])
            g = unit_jacobian(with_axes, layer, u).flatten()
            _, s, v = torch.linalg.svd(a, full_matrices=False)
            line = table.iloc[row]
            assert line["lambda_max"] == pytest.approx(s[0].item() ** 2)
            assert line["first_order"] == pytest.approx(g.square().sum().item())
            # A g is read from a step of finite size
            assert line["predicted"] == pytest.approx(
                (v[0] @ g).square().item(), rel=0.02, abs=1e-4 * line["first_order"]
            )
            assert line["predicted"] <= line["first_order"] * (1 + 1e-2)
            row += 1
    assert row == len(table) == 12
    assert table["measured"].to_numpy() == pytest.approx(table["first_order"].to_numpy(), rel=0.01)


def test_descent_leaves_the_copy_as_it_was() -> None:
    view = seen()
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    OBSERVERS["descent"](view)
    assert_same(dict(view.model.state_dict()), before)


# --- eq. (3)


def test_distances() -> None:
    model = tiny_bert()
    gates = attach(model)
    start = analysis.unit_values(gates)
    with torch.no_grad():  # the third group of four neurons
        model.get_parameter("blocks.0.ffn.up.weight")[8, 0] += 3
        model.get_parameter("blocks.0.ffn.down.weight")[5, 11] -= 4
    expected = np.zeros(len(gates.units))
    expected[3 + 2] = 5
    np.testing.assert_allclose(analysis.distances(gates, start), expected)


def test_frozen_units_keep_their_distance(cache: Path, tmp_path: Path) -> None:
    engine.run(small(cache, "method=mat", "selection.share=0.5"), tmp_path / "run")
    units = pd.read_parquet(tmp_path / "run" / "units.parquet")
    for _, unit in units.groupby(["kind", "layer", "unit"]):
        moved = unit["distance"].diff().iloc[1:].ne(0).to_numpy()
        assert (moved == unit["active"].iloc[:-1].to_numpy()).all()


# --- in a run


@pytest.mark.parametrize("method", ["mat", "baseline", "multirate"])
def test_a_run_does_not_notice_its_observers(method: str, cache: Path, tmp_path: Path) -> None:
    dropout = "model.dropout=0.1"
    engine.run(small(cache, f"method={method}", dropout, steps=9), tmp_path / "without")
    engine.run(small(cache, f"method={method}", dropout, OBSERVED, steps=9), tmp_path / "with")
    observed, alone = result(tmp_path / "with"), result(tmp_path / "without")
    for run in (observed, alone):
        del run["latest"]["config"]["analysis"]
    assert_same(observed, alone)
    units = pd.read_parquet(tmp_path / "with" / "units.parquet")
    for name in OBSERVERS:
        table = pd.read_parquet(tmp_path / "with" / f"{name}.parquet")
        times = table[["t", "step", "pflops"]].drop_duplicates().reset_index(drop=True)
        pd.testing.assert_frame_equal(
            times, units[["t", "step", "pflops"]].drop_duplicates().reset_index(drop=True)
        )
    assert (
        units["t"].nunique() >= 6
    )  # the baseline too is recorded at every interval, without selections


def test_interrupted_analysis_gives_the_same_tables(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(cache, "method=mat", OBSERVED, steps=10)
    engine.run(config, tmp_path / "whole")
    original, calls = engine.Training._record, []

    def killed(self: engine.Training, selected: bool) -> None:
        original(self, selected)
        calls.append(selected)
        if len(calls) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Training, "_record", killed)
    with pytest.raises(KeyboardInterrupt):
        engine.run(config, tmp_path / "run")
    engine.run(config, tmp_path / "run")
    for name in ("units", *OBSERVERS):
        frames = [
            pd.read_parquet(tmp_path / folder / f"{name}.parquet") for folder in ("run", "whole")
        ]
        assert_same(*frames)


def test_names_in_the_configuration_are_the_observers(cache: Path) -> None:
    assert set(ANALYSES) == set(OBSERVERS)
    with pytest.raises(UserError, match="did you mean kernels") as refused:
        small(cache, "analysis=[kernel]")
    assert one_sentence(str(refused.value))


# --- little data (Figure 4)


def test_few_training_sequences(cache: Path) -> None:
    config = small(cache, "dataset.train_sequences=5")
    few, all_of_them = load(config.dataset, 0), load(small(cache).dataset, 0)
    assert (
        isinstance(few, MaskedText)
        and isinstance(all_of_them, MaskedText)
        and few.steps_per_epoch(2) == 3
    )
    kept = {tuple(row) for row in few.sequences["train"].tolist()}
    assert len(kept) == 5 and kept <= {
        tuple(row) for row in all_of_them.sequences["train"].tolist()
    }
    assert kept != {tuple(row) for row in load(config.dataset, 1).sequences["train"].tolist()}  # type: ignore
    assert len(few.sequences["validation"]) == len(all_of_them.sequences["validation"])
    config.dataset.train_sequences = 10**9
    with pytest.raises(UserError) as refused:
        load(config.dataset, 0)
    assert one_sentence(str(refused.value))


def test_command_is_recorded(cache: Path, tmp_path: Path) -> None:
    engine.run(small(cache, "method=baseline", steps=3), tmp_path / "run")
    assert (
        json.loads((tmp_path / "run" / "environment.json").read_text())["command"] is None
    )  # not by the launcher
