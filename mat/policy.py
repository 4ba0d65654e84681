"""Which units train: eqs. (4)-(7) of the paper and the controls, on flat arrays over the units.

No model and no device: a policy gets the scores of a selection (eigenvalues, or gradient norms) and
says which units are active from then on.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from mat.layers.gate import BackwardMode
from mat.units import BoolArray, FloatArray, Units

Rule = Literal["threshold", "lowest", "shuffled", "static", "random", "multirate", "all"]
Scope = Literal["kind", "layer", "all"]
Counts = dict[tuple[int, str, int], int]  # active units by selection, kind and layer


@dataclass(frozen=True)
class PolicyConfig:
    """How units are chosen.

    Attributes:
        rule: ``threshold`` is MAT. Controls: ``lowest`` (the lowest scores train), ``shuffled``
            (scores permuted among the units of a kind), ``static`` (the first selection's set,
            kept), ``random`` (a share of every kind and layer), ``multirate`` (Vlaar and
            Leimkuhler 2022), ``all``.
        alpha: Eq. (4): where the threshold lies between the lowest (0) and the highest (1) score.
        share: Instead of alpha: share of the running units that train.
        scope: Units that are compared with each other: of a kind, of a layer, or all.
        beta: Eq. (7); None: no unit stops for good.
        slow_share: Multirate: share of slow units.
        seed: Of random choices; choice t depends on the seed and t alone.
    """

    rule: Rule = "threshold"
    alpha: float | None = 0.1
    share: float | None = None
    scope: Scope = "kind"
    beta: float | None = 1e-3
    slow_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.share is not None and self.alpha == 0.1:
            object.__setattr__(self, "alpha", None)  # the default gives way
        for name, options in (("rule", Rule), ("scope", Scope)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose {', '.join(get_args(options))}"
                )
        if self.beta is not None and self.beta < 0:
            raise ValueError(f"beta={self.beta} is out of range: set it to 0 or more, or to None")
        for name in ("alpha", "share", "slow_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is out of range: set it within [0, 1]")
        if (self.alpha is None) == (self.share is None):
            raise ValueError(
                f"alpha={self.alpha} and share={self.share}: set exactly one of them, "
                "the other to None"
            )
        if self.rule == "random" and self.share is None:
            raise ValueError("rule='random' draws a share of the units: set share, and alpha=None")


@dataclass(frozen=True)
class MATConfig(PolicyConfig):
    """How MAT is attached to a model (paper section 1, eqs. (4)-(7)).

    Attributes:
        every: Training steps between selections.
        mode: Backward mode: ``cut`` (nothing flows back through a frozen unit) or ``exact``.
        units: Kinds to gate; all that are found when None.
        score: ``lambda_max``, or ``gradnorm`` (control).
        reduction: Of the outputs, see ``mat.ntk``; ``online`` reads the scores off training steps.
        projections: Random projections per sample, for ``random``.
        normalize: ``cosine`` scales every row of a unit's Jacobian to length one (ablation).
        head_output: Whether a head owns its columns of the output projection (ablation).
        groups: Groups per feed-forward layer; as many as heads when None.
        log: Print a line at every selection.
    """

    every: int = 100
    mode: BackwardMode = "cut"
    units: tuple[str, ...] | None = None
    score: Literal["lambda_max", "gradnorm"] = "lambda_max"
    reduction: Literal["random", "sum", "full", "online"] = "random"
    projections: int = 1
    normalize: Literal["cosine"] | None = None
    head_output: bool = True
    groups: int | None = None
    log: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "projections"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: set it to 1 or more"
                )
        for name, options in (
            ("mode", ("cut", "exact")),
            ("score", ("lambda_max", "gradnorm")),
            ("reduction", ("random", "sum", "full", "online")),
            ("normalize", ("cosine", None)),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {options}")


def threshold(score: FloatArray, alpha: float) -> float:
    """The moving threshold lambda_alpha over the running units of one scope (eq. 4).

    Args:
        score: (r,) scores of the running units, r >= 1.
        alpha: Where it lies between the lowest and the highest.
    """
    low, high = float(score.min()), float(score.max())
    return min(low + (high - low) * alpha, high)


def highest(score: FloatArray, share: float) -> BoolArray:
    """The units with the highest scores: a share of them, at least one unless the share is 0.

    Of equal scores the first count as higher, so that a share is a number of units.

    Args:
        score: (r,) scores.
        share: Of the r units.

    Returns:
        (r,) boolean.
    """
    wanted = max(1, round(share * len(score))) if share > 0 else 0
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[:wanted]] = True
    return chosen


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
class PolicyState:
    """What a policy remembers between selections; (N,) arrays.

    Attributes:
        t: Number of the last selection; -1 before the first.
        active: Units that train (multirate: the fast ones).
        stopped: Units that have stopped for good (eq. 7).
        score: Score at this selection.
        first_score: Score at t = 0.
        delta: |score - first score| (eq. 6).
        first_delta: Delta_1.
        threshold: lambda_alpha of the unit's scope; with a share the lowest active score.
    """

    t: int
    active: BoolArray
    stopped: BoolArray
    score: FloatArray
    first_score: FloatArray
    delta: FloatArray
    first_delta: FloatArray
    threshold: FloatArray


class Policy:
    """Chooses the active units at every selection.

    Args:
        config: How.
        units: The units.
        counts: ``random``: the number of active units by selection, kind and layer, instead of a
            share
            (the last selection's from then on).
    """

    def __init__(self, config: PolicyConfig, units: Units, counts: Counts | None = None) -> None:
        self.config, self.kind, self.layer, self.counts = config, units.kind, units.layer, counts
        n = len(units)
        nan = np.full(n, np.nan)
        flags = np.ones(n, bool), np.zeros(n, bool)
        self.state = PolicyState(-1, *flags, *(nan.copy() for _ in range(5)))

    @property
    def needs_score(self) -> bool:
        """Whether selections need scores."""
        return self.config.rule in ("threshold", "lowest", "shuffled", "static")

    @property
    def done(self) -> bool:
        """Whether there is nothing left to select."""
        last = {"all": -1, "multirate": 0, "static": 1}.get(self.config.rule)
        return (last is not None and self.state.t >= last) or bool(self.state.stopped.all())

    def select(self, score: FloatArray | None = None) -> PolicyState:
        """Selection t = 0, 1, 2, ...; the first leaves all units active (Delta_1 must exist).

        Args:
            score: (N,) scores if ``needs_score``.

        Returns:
            The new state.
        """
        state, rule = self.state, self.config.rule
        state.t += 1
        if score is not None:
            self._observe(score)
        if rule == "multirate" and state.t == 0:
            state.active = self._draw(1.0 - self.config.slow_share)
        elif state.t > 0 and rule == "random":
            assert self.config.share is not None
            state.active = self._draw(self.config.share)
        elif state.t > 0 and self.needs_score:
            state.active = self._chosen(self._ranked())
        return state

    def state_dict(self) -> dict[str, Any]:
        """The state as plain lists and numbers."""
        values = asdict(self.state)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        types = {
            f.name: bool if f.name in ("active", "stopped") else float for f in fields(PolicyState)
        }
        arrays = {k: np.array(v, types[k]) for k, v in saved.items() if k != "t"}
        self.state = PolicyState(t=saved["t"], **arrays)

    def _observe(self, score: FloatArray) -> None:
        """Eqs. (6) and (7)."""
        state = self.state
        if state.t == 0:
            state.first_score = score.copy()
        delta = np.abs(score - state.first_score)
        if state.t == 1:
            state.first_delta = delta.copy()
        if state.t >= 2 and self.config.beta is not None:
            now = settled(delta, state.delta, state.first_delta, self.config.beta)
            state.stopped = state.stopped | now
        state.score, state.delta = score.copy(), delta

    def _ranked(self) -> FloatArray:
        """The scores as the rule compares them."""
        score = self.state.score
        if self.config.rule == "lowest":
            return -score
        if self.config.rule == "shuffled":
            random = np.random.default_rng([self.config.seed, 1, self.state.t])
            score = score.copy()
            for kind in np.unique(self.kind):
                rows = np.flatnonzero(self.kind == kind)
                score[rows] = score[random.permutation(rows)]
        return score

    def _chosen(self, score: FloatArray) -> BoolArray:
        """Eqs. (4) and (5), scope by scope."""
        active = np.zeros_like(self.state.active)
        self.state.threshold = np.full(len(score), np.nan)
        for scope in self._scopes():
            running = np.flatnonzero(scope & ~self.state.stopped)
            if not len(running):
                continue
            if self.config.alpha is not None:
                level = threshold(score[running], self.config.alpha)
                chosen = running[score[running] >= level]
            else:
                assert self.config.share is not None
                chosen = running[highest(score[running], self.config.share)]
                level = float(score[chosen].min()) if len(chosen) else np.inf
            active[chosen] = True
            self.state.threshold[scope] = -level if self.config.rule == "lowest" else level
        return active

    def _scopes(self) -> list[BoolArray]:
        if self.config.scope == "all":
            return [np.ones_like(self.state.active)]
        kinds = [self.kind == kind for kind in np.unique(self.kind)]
        if self.config.scope == "kind":
            return kinds
        return [k & (self.layer == layer) for k in kinds for layer in np.unique(self.layer[k])]

    def _draw(self, share: float) -> BoolArray:
        """Uniformly a share of the units of each kind and layer, or the given counts."""
        random = np.random.default_rng([self.config.seed, 2, self.state.t])
        active = np.zeros_like(self.state.active)
        for kind in np.unique(self.kind):
            for layer in np.unique(self.layer[self.kind == kind]):
                rows = np.flatnonzero((self.kind == kind) & (self.layer == layer))
                count = round(share * len(rows))
                if self.counts is not None:
                    t = min(self.state.t, max(t for t, _, _ in self.counts))
                    count = self.counts[t, str(kind), int(layer)]
                active[random.permutation(rows)[:count]] = True
        return active
