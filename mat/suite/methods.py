"""A run's method (paper section 5): a policy of the library, and when in the run it selects."""

from pathlib import Path

import pandas as pd

from mat.policy import Counts, Policy, PolicyConfig, PolicyState, Rule
from mat.suite.config import MethodConfig, SelectionConfig
from mat.suite.errors import UserError
from mat.units import BoolArray, FloatArray, Units


class Method:
    """Chooses the active units of a run.

    Args:
        method: What to do.
        selection: Settings that all methods share.
        units: The units.
        seed: Seed of random choices.

    Attributes:
        policy: Makes the choices.

    Raises:
        UserError: If ``method.matched`` names a run that cannot be used.
    """

    def __init__(
        self, method: MethodConfig, selection: SelectionConfig, units: Units, seed: int
    ) -> None:
        self.config, self.selection = method, selection
        rule: Rule = method.policy  # type: ignore[assignment]
        config = PolicyConfig(
            rule=rule,
            alpha=selection.alpha,
            share=selection.share,
            scope=selection.scope,  # type: ignore[arg-type]
            beta=selection.beta if method.temporal else None,
            slow_share=method.slow_share,
            seed=seed,
        )
        counts = _matched_counts(method.matched, units) if method.matched else None
        self.policy = Policy(config, units, counts)

    @property
    def state(self) -> PolicyState:
        """What the policy remembers."""
        return self.policy.state

    @property
    def selects(self) -> bool:
        """Whether the method makes selections at all."""
        return self.config.policy != "all"

    @property
    def needs_score(self) -> bool:
        """Whether its selections need scores."""
        return self.config.score != "none"

    def is_due(self, progress: float) -> bool:
        """Whether a selection is due when a share ``progress`` of the run's FLOPs is spent."""
        return not self.policy.done and progress >= (self.state.t + 1) * self.selection.interval

    def select(self, score: FloatArray | None) -> PolicyState:
        """Make the next selection, see :meth:`mat.policy.Policy.select`."""
        return self.policy.select(score)

    @property
    def drifts(self) -> bool:
        """Whether frozen units go on along their last update (multirate)."""
        return self.config.policy == "multirate"

    def active_at(self, step: int) -> BoolArray:
        """Units whose gradient is computed at a training step."""
        if self.drifts and step % self.config.slow_steps == 0:
            return self.state.active | True
        return self.state.active


def _matched_counts(run: str, units: Units) -> Counts:
    """Active units by selection, kind and layer of a finished run."""
    path = Path(run) / "units.parquet"
    if not (Path(run) / "summary.json").is_file() or not path.is_file():
        raise UserError(
            f"method.matched={run} is not a finished run: run it first, or name another run folder."
        )
    table = pd.read_parquet(path, columns=["t", "kind", "layer", "unit", "active"])
    theirs = set(zip(*(table[c].tolist() for c in ("kind", "layer", "unit")), strict=True))
    ours = zip(units.kind.tolist(), units.layer.tolist(), units.unit.tolist(), strict=True)
    if theirs != set(ours):
        raise UserError(
            f"method.matched={run} has other units: name a run of the same model and "
            "selection.units."
        )
    counted = table.groupby(["t", "kind", "layer"], as_index=False)["active"].sum()
    rows = zip(*(counted[c].tolist() for c in ("t", "kind", "layer", "active")), strict=True)
    return {(t, kind, layer): int(n) for t, kind, layer, n in rows}
