"""Methods: which units train from a selection on (paper section 1, eqs. (4)-(7), and section 5).

Everything here works on flat arrays over the units of a ``UnitIndex`` and on nothing else: no model, no device. The
engine hands over the scores of a selection (eigenvalues, or gradient norms) and sets the gates from the answer.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mat.suite.config import MethodConfig, SelectionConfig
from mat.suite.errors import UserError
from mat.suite.units import BoolArray, UnitIndex

FloatArray = NDArray[np.float64]


def threshold(score: FloatArray, alpha: float | None, share: float | None) -> float:
    """The moving threshold lambda_alpha over the running units of one scope (eq. 4).

    Args:
        score: (r,) eigenvalues of the running units, r >= 1.
        alpha: Position between the smallest (0) and the largest (1) eigenvalue.
        share: Instead of alpha: share of the units wanted active. The threshold is then the eigenvalue of the last
            unit that fits (at least one unit, unless the share is 0).

    Returns:
        lambda_alpha; units at or above it are active (eq. 5).
    """
    low, high = float(score.min()), float(score.max())
    if alpha is not None:
        return min(low + (high - low) * alpha, high)
    assert share is not None
    wanted = max(1, round(share * len(score))) if share > 0 else 0
    return float(np.sort(score)[-wanted]) if wanted else float("inf")


def settled(delta: FloatArray, previous: FloatArray, first: FloatArray, beta: float) -> BoolArray:
    """Units whose eigenvalue has settled: |Delta_t - Delta_{t-1}| / Delta_1 < beta (eq. 7).

    Args:
        delta: Delta_t (eq. 6).
        previous: Delta_{t-1}.
        first: Delta_1; a unit where it is 0 never settles.
        beta: Bound on the relative change.

    Returns:
        (N,) boolean.
    """
    change = np.abs(delta - previous)
    ratio = np.divide(change, first, out=np.full_like(change, np.inf), where=first > 0)
    return np.asarray(ratio < beta)


@dataclass
class MethodState:
    """What a method remembers between selections; (N,) arrays, all checkpointed.

    Attributes:
        t: Number of selections made.
        active: Units that train now (multirate: the fast units).
        stopped: Units that have stopped for good (eq. 7).
        score: Score at this selection.
        first_score: Score at initialisation, t = 0.
        delta: |score - first score| (eq. 6).
        first_delta: Delta_1.
        threshold: lambda_alpha of the unit's scope at this selection.
    """

    t: int
    active: BoolArray
    stopped: BoolArray
    score: FloatArray
    first_score: FloatArray
    delta: FloatArray
    first_delta: FloatArray
    threshold: FloatArray


class Method:
    """Chooses the active units at every selection.

    Args:
        method: What to do.
        selection: Settings that all methods share.
        index: The units.
        seed: Seed of random choices; choice t depends on the seed and t alone.

    Raises:
        UserError: If ``method.matched`` names a run that cannot be used.
    """

    def __init__(self, method: MethodConfig, selection: SelectionConfig, index: UnitIndex, seed: int) -> None:
        self.config = method
        self.selection = selection
        self.kind, self.layer = index.kind, index.layer
        self.seed = seed
        n = len(index)
        nan = np.full(n, np.nan)
        self.state = MethodState(
            -1, np.ones(n, bool), np.zeros(n, bool), nan, nan.copy(), nan.copy(), nan.copy(), nan.copy()
        )
        self.counts = _matched_counts(method.matched, index) if method.matched else None

    @property
    def selects(self) -> bool:
        """Whether the method makes selections at all."""
        return self.config.policy != "all"

    def is_due(self, progress: float) -> bool:
        """Whether a selection is due when a share ``progress`` of the run's FLOPs is spent."""
        t = self.state.t
        last = {"all": -1, "multirate": 0, "static": 1}.get(self.config.policy)
        if (last is not None and t >= last) or bool(self.state.stopped.all()):
            return False
        return progress >= (t + 1) * self.selection.interval

    @property
    def needs_score(self) -> bool:
        """Whether the coming selection needs scores."""
        return self.config.score != "none"

    def select(self, score: FloatArray | None) -> MethodState:
        """Make the next selection t = 0, 1, 2, ...; the first one leaves all units active (Delta_1 must exist).

        Args:
            score: (N,) scores if ``needs_score``, else None.

        Returns:
            The new state.
        """
        state = self.state
        state.t += 1
        if score is not None:
            self._observe(score)
        if self.config.policy == "multirate":
            if state.t == 0:
                state.active = self._draw(1.0 - self.config.slow_share)
        elif state.t == 0:
            pass
        elif self.config.policy == "random":
            state.active = self._draw(cast(float, self.selection.share))
        else:
            state.active = self._above_threshold(self._ranked())
        return state

    def active_at(self, step: int) -> BoolArray:
        """Units whose gradient is computed at a training step."""
        if self.config.policy == "multirate" and step % self.config.slow_steps == 0:
            return np.ones_like(self.state.active)
        return self.state.active

    @property
    def drifts(self) -> bool:
        """Whether units without a gradient go on along their last update (multirate) instead of standing still."""
        return self.config.policy == "multirate"

    def state_dict(self) -> dict[str, Any]:
        """The state as plain lists and numbers."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self.state).items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        flags = ("active", "stopped")
        arrays = {k: np.array(v, bool if k in flags else float) for k, v in saved.items() if k != "t"}
        self.state = MethodState(t=saved["t"], **arrays)

    def _observe(self, score: FloatArray) -> None:
        """Eqs. (6) and (7)."""
        state = self.state
        if state.t == 0:
            state.first_score = score.copy()
        delta = np.abs(score - state.first_score)
        if state.t == 1:
            state.first_delta = delta.copy()
        if state.t >= 2 and self.config.temporal:
            state.stopped = state.stopped | settled(delta, state.delta, state.first_delta, self.selection.beta)
        state.score, state.delta = score.copy(), delta

    def _ranked(self) -> FloatArray:
        """The scores as the policy compares them."""
        score = self.state.score
        if self.config.policy == "lowest":
            return -score
        if self.config.policy == "shuffled":
            random = np.random.default_rng([self.seed, 1, self.state.t])
            score = score.copy()
            for kind in np.unique(self.kind):
                rows = np.flatnonzero(self.kind == kind)
                score[rows] = score[random.permutation(rows)]
        return score

    def _above_threshold(self, score: FloatArray) -> BoolArray:
        """Eqs. (4) and (5), scope by scope."""
        active = np.zeros_like(self.state.active)
        self.state.threshold = np.full(len(score), np.nan)
        for scope in self._scopes():
            running = scope & ~self.state.stopped
            if running.any():
                level = threshold(score[running], self.selection.alpha, self.selection.share)
                active |= running & (score >= level)
                self.state.threshold[scope] = -level if self.config.policy == "lowest" else level
        return active

    def _scopes(self) -> list[BoolArray]:
        if self.selection.scope == "all":
            return [np.ones_like(self.state.active)]
        kinds = [self.kind == kind for kind in np.unique(self.kind)]
        if self.selection.scope == "kind":
            return kinds
        return [k & (self.layer == layer) for k in kinds for layer in np.unique(self.layer[k])]

    def _draw(self, share: float) -> BoolArray:
        """Uniformly a share of the units of each kind and layer, or the matched run's counts."""
        random = np.random.default_rng([self.seed, 2, self.state.t])
        active = np.zeros_like(self.state.active)
        for kind in np.unique(self.kind):
            for layer in np.unique(self.layer[self.kind == kind]):
                rows = np.flatnonzero((self.kind == kind) & (self.layer == layer))
                count = round(share * len(rows))
                if self.counts is not None:
                    count = self.counts[min(self.state.t, max(t for t, _, _ in self.counts)), str(kind), int(layer)]
                active[random.permutation(rows)[:count]] = True
        return active


def _matched_counts(run: str, index: UnitIndex) -> dict[tuple[int, str, int], int]:
    """Active units by selection, kind and layer of a finished run."""
    path = Path(run) / "units.parquet"
    if not (Path(run) / "summary.json").is_file() or not path.is_file():
        raise UserError(f"method.matched={run} is not a finished run: run it first, or name another run folder.")
    units = pd.read_parquet(path, columns=["t", "kind", "layer", "unit", "active"])
    theirs = set(zip(*(units[c].tolist() for c in ("kind", "layer", "unit")), strict=True))
    if theirs != set(zip(index.kind.tolist(), index.layer.tolist(), index.unit.tolist(), strict=True)):
        raise UserError(f"method.matched={run} has other units: name a run of the same model and selection.units.")
    counts: dict[tuple[int, str, int], int] = {}
    for t, kind, layer, active in zip(*(units[c].tolist() for c in ("t", "kind", "layer", "active")), strict=True):
        counts[t, kind, layer] = counts.get((t, kind, layer), 0) + int(active)
    return counts
