"""Gated training steps over active shares, in every backward mode.

    python -m benchmarks.gates [case ...]          # measured again; the others' results stay
    python -m benchmarks.gates --peak CASE SHARE   # what processes of their own run

Seconds, FLOPs executed, and peak memory in ``cut``. Beside the gates the ways that PyTorch offers:
masking gradients after the backward, gradient hooks, and frozen layers (``requires_grad_(False)``
on all parameters of two layers of three). All ratios are against the dense step, measured in turn
with it. That of ``cut`` at share 1 is the dense step itself, a measure of the noise. The dense step
is compared with a twin of stock layers, too.
"""

import argparse
import json
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor

from benchmarks.harness import (
    DEVICE,
    TOY,
    Action,
    Row,
    in_process,
    medians,
    peak_bytes,
    row,
    save,
    write,
    write_table,
)
from benchmarks.subjects import MODES, Subject, stock_twin, subject

SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 8, 0.0)
PEAKS = (1.0, 1 / 3, 0.0)  # shares whose peak memory is measured
COLOURS = {"cut": "#0072B2", "exact": "#D55E00"}


@dataclass
class Case:
    """A subject to gate.

    Attributes:
        repeats: How often a step is measured.
        wanted: Largest ratio of time to FLOPs, each over the dense step's, at a third active in
            ``cut``.
    """

    repeats: int
    wanted: float | None


CASES = {
    "bert_base": Case(9, 1.05),
    "bert_mini": Case(21, None),
    "vgg16": Case(9, 1.20),
    "vgg16_mini": Case(15, None),
    "switch_block": Case(15, 1.05),
}


def alternatives(dense: Subject) -> dict[str, Action]:
    """Steps that train a third without gates, by the ways that PyTorch offers."""
    layers = [[part.parameter for part in gate.parts.values()] for gate in dense.gates.layers]
    parameters = [parameter for layer in layers for parameter in layer]
    frozen = [p for i, layer in enumerate(layers) if i % 3 for p in layer]
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def mask() -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad[len(parameter) // 3 :] = 0

    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[len(gradient) // 3 :] = 0
        return gradient

    def hook() -> None:
        handles.extend(parameter.register_hook(zero) for parameter in parameters)

    def unhook() -> None:
        while handles:
            handles.pop().remove()

    def freeze(wanted: bool) -> None:
        for parameter in frozen:
            parameter.requires_grad_(wanted)

    return {
        "mask after backward": dense.launched(after=mask),
        "gradient hooks": dense.launched(before=hook, after=unhook),
        "frozen layers, two of three": dense.launched(
            before=lambda: freeze(False), after=lambda: freeze(True)
        ),
    }


def peak(name: str, share: float) -> int:
    """Peak memory of a step in ``cut`` beyond model and optimiser, behind a dense step."""
    measured = subject(name)
    measured.launched()()
    return peak_bytes(measured.launched(share))


def peak_of(name: str, share: float) -> int:
    """The same, on a CPU in a process of its own: there the process's memory is measured."""
    if DEVICE.type == "cuda" or TOY:
        return max(1, peak(name, share))
    return int(in_process("gates", "--peak", name, share))


def measure(name: str, case: Case) -> tuple[pd.DataFrame, list[Row]]:
    """All shares and modes of a case, and the alternatives, each beside the dense step."""
    measured = subject(name)
    dense, stock = measured.step(), stock_twin(measured)
    whole = measured.flops(1.0, "cut").everything
    peaks = {share: peak_of(name, share) for share in PEAKS}
    found, rows = [], []
    for mode in MODES:
        steps = [measured.step(share, mode) for share in SHARES]
        *times, plain = medians([dense, *steps, stock], case.repeats)
        if mode == "cut":
            rows.append(row(f"{name}: all active against stock layers", times[0], plain, 1.02))
        for share, spent in zip(SHARES, times[1:], strict=True):
            ratio, work = spent / times[0], measured.flops(share, mode).everything / whole
            found.append(
                {
                    "case": name, "way": mode, "share": share, "seconds": spent,
                    "seconds_dense": times[0], "flops": work * whole, "time_ratio": ratio,
                    "flops_ratio": work,
                    "time_saved_over_flops_saved": (1 - ratio) / (1 - work) if work < 1 else None,
                    "peak_bytes": peaks.get(share) if mode == "cut" else None,
                }
            )  # fmt: skip
            if share == 1 / 3:
                wanted = case.wanted if mode == "cut" else None
                label = f"{name}: time ratio over FLOPs ratio, a third active, {mode}"
                rows.append(row(label, ratio, work, wanted, "of dense"))
    for share, more in zip(PEAKS[1:], PEAKS, strict=False):
        label = f"{name}: peak memory of a step, {share:.2f} active against {more:.2f}, cut"
        rows.append(row(label, peaks[share], peaks[more], 1.0, "byte"))
    ways = alternatives(measured)
    times = medians([measured.launched(), *ways.values()], case.repeats)
    for way, spent in zip(ways, times[1:], strict=True):
        about = {"case": name, "way": way, "share": 1 / 3, "seconds": spent}
        found.append({**about, "seconds_dense": times[0], "time_ratio": spent / times[0]})
        rows.append(row(f"{name}: step with {way}, against dense", spent, times[0], None))
    return pd.DataFrame(found), rows


def draw(frame: pd.DataFrame) -> None:
    """Time and peak memory against the active share, one panel per case."""
    cases = list(dict.fromkeys(frame["case"]))
    figure, axes = plt.subplots(
        1, len(cases), figsize=(4.6 * len(cases), 4), squeeze=False, sharey=True
    )
    for axis, name in zip(axes[0], cases, strict=True):
        of_case = frame[frame["case"] == name]
        peaks = of_case.dropna(subset="peak_bytes")
        ratio = peaks["peak_bytes"] / peaks["peak_bytes"].iloc[0]
        axis.plot(peaks["share"], ratio, "k:", marker=".", label="cut: peak memory of a step")
        markers = iter("sx^")
        for way, rows in of_case.groupby("way", sort=False):
            if colour := COLOURS.get(str(way)):
                for column, style in (("time_ratio", "o-"), ("flops_ratio", "--")):
                    label = f"{way}: {'seconds' if column == 'time_ratio' else 'FLOPs'}"
                    axis.plot(rows["share"], rows[column], style, color=colour, label=label)
            else:
                marker = next(markers)
                axis.plot(rows["share"], rows["time_ratio"], f"k{marker}", label=way)
        axis.set(title=name, xlabel="active share of units", ylim=(0, 1.2))
    axes[0][0].legend(fontsize=7)
    axes[0][0].set_ylabel("ratio to the dense step")
    figure.tight_layout()
    save(figure, "gates")
    plt.close(figure)


def main() -> None:
    """Measure the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SHARE"))
    arguments = parser.parse_args()
    if arguments.peak:
        print(json.dumps(peak(arguments.peak[0], float(arguments.peak[1]))))
        return
    for name in arguments.cases or CASES:
        torch.manual_seed(0)
        frame, rows = measure(name, CASES[name])
        write("gates", rows, merge=True)
        draw(write_table("gates", frame, "case"))


if __name__ == "__main__":
    main()
