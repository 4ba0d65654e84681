"""Gated training steps over active shares, in every backward mode: seconds, FLOPs executed, and peak memory in ``cut``.

    python -m benchmarks.gates [case ...]            # those named are measured again, the others' results stay
    python -m benchmarks.gates --peak CASE SHARE     # what processes of their own run for the peak memory

Beside the gates the ways that PyTorch offers: masking gradients after the backward, gradient hooks, and frozen layers
(``requires_grad_(False)`` on all parameters of two layers of three). All ratios are against the dense step, measured in
turn with it. That of ``cut`` at share 1 is the dense step itself, a measure of the noise. The dense step is compared
with a twin of stock layers with products of the same sizes, too: transformers' BERT, in the Switch block with the
sparse MLP of its Switch, and torchvision's VGG.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor

from benchmarks import vgg as images
from benchmarks.harness import (
    DEVICE,
    MODES,
    Action,
    Row,
    Subject,
    in_process,
    medians,
    peak_bytes,
    row,
    save,
    set_share,
    stock_step,
    write,
    write_table,
)
from benchmarks.step import RECIPE, batch_of, bert, by_position, twin
from mat.suite import flops
from mat.suite.config import SwitchConfig
from mat.suite.switch import Switch
from mat.suite.units import BackwardMode, unit_layers

SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 8, 0.0)
PEAKS = (1.0, 1 / 3, 0.0)  # shares whose peak memory is measured
COLOURS = {"cut": "#0072B2", "exact": "#D55E00"}


@dataclass
class Case:
    """A subject to gate.

    Attributes:
        make: Makes it.
        stock: Makes the step of its twin from stock layers.
        repeats: How often a step is measured.
        wanted: Largest ratio of time to FLOPs, each over the dense step's, at a third active in ``cut``.
    """

    make: Callable[[], Subject]
    stock: Callable[[Subject], Action]
    repeats: int
    wanted: float | None


def stock_encoder(subject: Subject) -> Action:
    theirs = twin(subject.model)
    return stock_step(theirs, by_position(theirs, subject.batch), RECIPE)


def switch_block() -> Subject:
    """One block of the paper's Switch; a small vocabulary, so that the block is what is measured."""
    config = SwitchConfig(
        name="switch_block", layers=1, width=768, heads=12, ffn_hidden=3072, ffn_groups=1, experts=8,
        positions="learned", norm="post",
    )  # fmt: skip
    return Subject(Switch(config, 256, 128).to(DEVICE), batch_of(256, 16, 128), RECIPE)


def vgg(size: str, repeats: int, wanted: float | None) -> Case:
    return Case(lambda: images.vgg(size), lambda subject: images.twin_step(size, subject.batch), repeats, wanted)


CASES = {
    "bert_base": Case(lambda: bert("base"), stock_encoder, 9, 1.05),
    "bert_mini": Case(lambda: bert("mini"), stock_encoder, 21, None),
    "vgg16": vgg("vgg16", 9, 1.20),
    "vgg16_mini": vgg("vgg16_mini", 15, None),
    "switch_block": Case(switch_block, stock_encoder, 15, 1.05),
}


def alternatives(subject: Subject) -> dict[str, Action]:
    """Steps that train a third without gates, by the ways that PyTorch offers."""
    layers = unit_layers(subject.model)
    parameters = [p for layer in layers for p in layer.unit_parameters().values()]
    frozen = [p for i, layer in enumerate(layers) if i % 3 for p in layer.unit_parameters().values()]
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
        "mask after backward": subject.launched(after=mask),
        "gradient hooks": subject.launched(before=hook, after=unhook),
        "frozen layers, two of three": subject.launched(before=lambda: freeze(False), after=lambda: freeze(True)),
    }


def executed(subject: Subject, share: float, mode: BackwardMode) -> int:
    """FLOPs of a step."""
    set_share(subject.model, share, mode)
    return flops.training_step(subject.model, subject.batch).everything


def peak(subject: Subject, share: float) -> int:
    """Peak memory of a step in ``cut`` beyond model and optimiser, behind a dense step."""
    subject.launched()()
    subject.optimiser.clear()
    return peak_bytes(subject.launched(share))


def peak_of(name: str, share: float) -> int:
    """The same by a case's name, on a CPU in a process of its own: there the process's memory is measured."""
    if DEVICE.type == "cuda":
        return peak(CASES[name].make(), share)
    return int(in_process("gates", "--peak", name, share))


def measure(name: str, case: Case) -> tuple[pd.DataFrame, list[Row]]:
    """All shares and modes of a case, and the alternatives, each beside the dense step."""
    subject = case.make()
    dense, stock = subject.step(), case.stock(subject)
    whole = executed(subject, 1.0, "cut")
    peaks = {share: peak_of(name, share) for share in PEAKS}
    found, rows = [], []
    for mode in MODES:
        *times, plain = medians([dense, *(subject.step(share, mode) for share in SHARES), stock], case.repeats)
        if mode == "cut":
            rows.append(row(f"{name}: all active against stock layers", times[0], plain, 1.02))
        for share, spent in zip(SHARES, times[1:], strict=True):
            ratio, work = spent / times[0], executed(subject, share, mode) / whole
            found.append(
                {
                    "case": name, "way": mode, "share": share, "seconds": spent, "seconds_dense": times[0],
                    "flops": work * whole, "time_ratio": ratio, "flops_ratio": work,
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
    ways = alternatives(subject)
    times = medians([subject.launched(), *ways.values()], case.repeats)
    for way, spent in zip(ways, times[1:], strict=True):
        found.append({"case": name, "way": way, "share": 1 / 3, "seconds": spent, "seconds_dense": times[0],
                      "time_ratio": spent / times[0]})  # fmt: skip
        rows.append(row(f"{name}: step with {way}, against dense", spent, times[0], None))
    return pd.DataFrame(found), rows


def draw(frame: pd.DataFrame) -> None:
    """Time and peak memory against the active share, one panel per case, beside the FLOPs and the alternatives."""
    cases = list(dict.fromkeys(frame["case"]))
    figure, axes = plt.subplots(1, len(cases), figsize=(4.6 * len(cases), 4), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], cases, strict=True):
        of_case = frame[frame["case"] == name]
        peaks = of_case.dropna(subset="peak_bytes")
        ratio = peaks["peak_bytes"] / peaks["peak_bytes"].iloc[0]
        axis.plot(peaks["share"], ratio, "k:", marker=".", label="cut: peak memory of a step")
        markers = iter("sx^")
        for way, rows in of_case.groupby("way", sort=False):
            if colour := COLOURS.get(str(way)):
                axis.plot(rows["share"], rows["time_ratio"], color=colour, marker="o", label=f"{way}: seconds")
                axis.plot(rows["share"], rows["flops_ratio"], color=colour, linestyle="--", label=f"{way}: FLOPs")
            else:
                axis.plot(rows["share"], rows["time_ratio"], "k", marker=next(markers), linestyle="", label=way)
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
        print(json.dumps(peak(CASES[arguments.peak[0]].make(), float(arguments.peak[1]))))
        return
    for name in arguments.cases or CASES:
        torch.manual_seed(0)
        frame, rows = measure(name, CASES[name])
        write("gates", rows, merge=True)
        draw(write_table("gates", frame, "case"))


if __name__ == "__main__":
    main()
