"""``python -m results.units_picture``: the picture of what a unit is, for the README."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

PATH = Path(__file__).parent / "figures" / "units.png"
UNIT, REST, EDGE = "#d9480f", "#dee2e6", "#495057"


def matrix(
    axes: Axes, x: float, y: float, size: tuple[float, float], name: str, rows: Sequence[int] = (),
    columns: Sequence[int] = (), blocks: int = 4,
) -> None:  # fmt: skip
    """Draw a weight with some of its blocks of rows or columns in colour."""
    width, height = size
    axes.add_patch(Rectangle((x, y), width, height, facecolor=REST, edgecolor=EDGE, lw=0.8))
    for row in rows:
        step = height / blocks
        axes.add_patch(Rectangle((x, y + height - (row + 1) * step), width, step, facecolor=UNIT))
    for column in columns:
        step = width / blocks
        axes.add_patch(Rectangle((x + column * step, y), step, height, facecolor=UNIT))
    axes.text(x + width / 2, y - 0.12, name, ha="center", va="top", fontsize=9)


def draw() -> None:
    """Draw the four kinds of units and write the file."""
    figure, (heads, ffn, experts, filters) = plt.subplots(1, 4, figsize=(12, 2.5))
    for i, name in enumerate("QKV"):
        matrix(heads, 1.15 * i, 0, (1, 1), name, rows=[1])
    matrix(heads, 3.45, 0, (1, 1), "output", columns=[1])
    matrix(ffn, 0, 0, (1, 2), "first", rows=[2], blocks=6)
    matrix(ffn, 1.3, 0.5, (2, 1), "last", columns=[2], blocks=6)
    for i in range(4):
        chosen = range(4) if i == 2 else ()
        matrix(experts, 1.1 * i, 0.9, (0.45, 0.9), "", rows=chosen)
        matrix(experts, 1.1 * i, 0.25, (0.9, 0.45), f"expert {i}", rows=chosen)
    matrix(filters, 0, 0, (1.6, 2), "kernels", rows=[3], blocks=8)
    for i, name in enumerate(("bias", "gain", "shift")):
        matrix(filters, 1.95 + 0.6 * i, 0, (0.22, 2), name, rows=[3], blocks=8)
    titles = "an attention head", "a feed-forward group", "an expert", "a filter and its batch norm"
    for axes, title in zip((heads, ffn, experts, filters), titles, strict=True):
        axes.set_title(title, fontsize=11)
        axes.set_aspect("equal")
        axes.autoscale_view()
        axes.margins(0.05)
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(PATH, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    draw()
