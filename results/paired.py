"""What paired seeds say of a claim: interval, permutation test and verdict.

A value is a difference between two runs of one seed (or a number less its bound). A claim says
which sign the mean has. A run that never reaches a level has no value: NaN.
"""

from typing import Any

import numpy as np
from scipy import stats

from results.measures import Array

LEVEL = 0.95
FEWEST = 5  # all of five seeds agree by chance in 1 of 32 cases, of four in 1 of 16
TESTED = 8  # with five the least p of a two-sided permutation test is 1/16
RESAMPLES = 9999
HELD, NOT_HELD, OPEN = "held", "not held", "open"
RULE = (
    f"A claim is {HELD} if the {LEVEL:.0%} bootstrap interval of the mean over seeds lies wholly "
    f"on its side, and it is {NOT_HELD} if the interval lies wholly on the other side. In both "
    f"cases the seeds must agree: with {FEWEST} to {TESTED - 1} of them in every sign, with "
    f"{TESTED} or more by p < {1 - LEVEL:.2f} in a paired permutation test. Everything else is "
    f"{OPEN}, and so is every claim with fewer than {FEWEST} seeds. Where runs never reach a "
    f"level there is no interval: the claim is {NOT_HELD} if no seed supports it, else {OPEN}."
)


def interval(values: Array) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values (n,), n >= 2; the same each time."""
    result = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def permutation_p(values: Array) -> float:
    """Two-sided p of the mean of values (n,) when each may as well have the other sign.

    All 2^n signs are tried up to 2^13, beyond that as many random ones.
    """

    def mean(sample: Array, axis: int = -1) -> Any:
        return np.mean(sample, axis=axis)

    result = stats.permutation_test(
        (values,),
        mean,
        permutation_type="samples",
        n_resamples=2**13,
        vectorized=True,
        random_state=np.random.default_rng(0),
    )
    return float(result.pvalue)


def verdict(values: Array, side: int) -> str:
    """What the values (n,) make of the claim that their mean has the sign ``side``; see RULE."""
    supporting = side * values > 0  # False for NaN
    if len(values) < FEWEST:
        return OPEN
    if np.isnan(values).any():
        return OPEN if supporting.any() else NOT_HELD
    low, high = sorted(side * end for end in interval(values))
    if len(values) >= TESTED:
        agree = against = permutation_p(values) < 1 - LEVEL
    else:
        agree, against = bool(supporting.all()), bool((side * values < 0).all())
    if low > 0 and agree:
        return HELD
    return NOT_HELD if high < 0 and against else OPEN
