"""Tables and plots of the examples."""

from collections.abc import Sequence

import numpy as np

# Quantile 0.975 of Student's t distribution by degrees of freedom, from 1.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    quantile = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    return quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5


def mean_in_words(values: Sequence[float], digits: int) -> str:
    """Mean and interval."""
    half = interval(values)
    return f"{np.mean(values):.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown with columns of equal width."""
    lines = [list(header), ["-"] * len(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
