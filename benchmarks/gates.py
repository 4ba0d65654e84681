"""Gated training steps over active shares, both backward modes: seconds, FLOPs executed, memory kept for the backward.

    python -m benchmarks.gates [subject ...]

Beside the gates the ways that PyTorch offers: masking gradients after the backward, gradient hooks, and
``requires_grad_(False)`` on whole parameters. All ratios are against the dense step, measured in turn with it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor

from benchmarks import vgg as images
from benchmarks.harness import RESULTS, Row, medians, row, set_share, write
from benchmarks.step import SIZES, batch_of
from mat import flops
from mat.bert import Bert
from mat.config import SwitchConfig, TrainConfig
from mat.interface import Batch, UnitModel
from mat.optim import UnitOptimiser, build_optimiser
from mat.switch import Switch
from mat.units import BackwardMode, unit_layers

SHARES = (1.0, 2 / 3, 1 / 2, 1 / 3, 1 / 8, 0.0)


@dataclass
class Subject:
    """A model to gate, with the batch of its step and how often to measure it.

    Attributes:
        wanted: Largest ratio of time to FLOPs, each over the dense step's, at a third active in ``cut``.
    """

    model: UnitModel
    batch: Batch
    recipe: TrainConfig
    repeats: int
    wanted: float | None


def bert(size: str, repeats: int, wanted: float | None) -> Subject:
    """A BERT with random tokens."""
    config, vocabulary, samples, length = SIZES[size]
    recipe = TrainConfig(pflops=1, batch=samples, lr=1e-4)
    return Subject(Bert(config, vocabulary, length), batch_of(vocabulary, samples, length), recipe, repeats, wanted)


def vgg(size: str, repeats: int, wanted: float | None) -> Subject:
    """A VGG with random images of CIFAR-10's size."""
    return Subject(images.vgg(size), images.pictures(), images.RECIPE, repeats, wanted)


def switch_block(repeats: int, wanted: float | None) -> Subject:
    """One block of the paper's Switch; a small vocabulary, so that the block is what is measured."""
    config = SwitchConfig(
        name="switch_block", layers=1, width=768, heads=12, ffn_hidden=3072, ffn_groups=1, experts=8,
        positions="learned", norm="post",
    )  # fmt: skip
    recipe = TrainConfig(pflops=1, batch=16, lr=1e-4)
    return Subject(Switch(config, 256, 128), batch_of(256, 16, 128), recipe, repeats, wanted)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "bert_base": lambda: bert("base", 5, 1.05),
    "bert_mini": lambda: bert("mini", 21, None),
    "vgg16": lambda: vgg("vgg16", 5, 1.20),
    "vgg16_mini": lambda: vgg("vgg16_mini", 9, None),
    "switch_block": lambda: switch_block(7, 1.05),
}


def backward_of(subject: Subject) -> None:
    """Forward and backward of one step, gates as they stand."""
    with torch.autocast(subject.batch.inputs.device.type, torch.bfloat16):
        outputs = subject.model(subject.batch)
        loss = subject.model.loss_of_outputs(outputs, subject.batch)
        extra = subject.model.auxiliary_loss()
    torch.autograd.backward(loss if extra is None else loss + extra)


def gated_step(subject: Subject, optimiser: UnitOptimiser, share: float, mode: BackwardMode) -> Callable[[], None]:
    """A whole training step with a share of the units active."""

    def step() -> None:
        set_share(subject.model, share, mode)
        subject.model.train()
        optimiser.clear()
        backward_of(subject)
        optimiser.clip(1.0)
        optimiser.step(1e-4)

    return step


def kept_bytes(subject: Subject) -> int:
    """Bytes of activations that the forward pass keeps for the backward; parameters are not counted."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in subject.model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    subject.model.train()
    autocast = torch.autocast(subject.batch.inputs.device.type, torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        subject.model.loss(subject.batch)
    return sum(kept.values())


def masked_after(subject: Subject, optimiser: UnitOptimiser) -> Callable[[], None]:
    """Dense backward, then the frozen units' gradients are zeroed."""

    def step() -> None:
        set_share(subject.model, 1.0, "cut")
        optimiser.clear()
        backward_of(subject)
        for layer in unit_layers(subject.model):
            for parameter in layer.unit_parameters().values():
                assert parameter.grad is not None
                parameter.grad[layer.n_units // 3 :] = 0
        optimiser.clip(1.0)
        optimiser.step(1e-4)

    return step


def hooked(subject: Subject, optimiser: UnitOptimiser) -> Callable[[], None]:
    """The same masking by a hook on every parameter."""

    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[len(gradient) // 3 :] = 0
        return gradient

    def step() -> None:
        set_share(subject.model, 1.0, "cut")
        optimiser.clear()
        parameters = [p for layer in unit_layers(subject.model) for p in layer.unit_parameters().values()]
        handles = [p.register_hook(zero) for p in parameters]
        backward_of(subject)
        for handle in handles:
            handle.remove()
        optimiser.clip(1.0)
        optimiser.step(1e-4)

    return step


def whole_parameters(subject: Subject, optimiser: UnitOptimiser) -> Callable[[], None]:
    """``requires_grad_(False)`` knows no units: two of three unit layers are frozen whole."""
    layers = unit_layers(subject.model)

    def step() -> None:
        set_share(subject.model, 1.0, "cut")
        optimiser.clear()
        frozen = [p for i, layer in enumerate(layers) if i % 3 for p in layer.unit_parameters().values()]
        for parameter in frozen:
            parameter.requires_grad_(False)
        backward_of(subject)
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimiser.clip(1.0)
        optimiser.step(1e-4)

    return step


ALTERNATIVES = {
    "mask after backward": masked_after,
    "gradient hooks": hooked,
    "requires_grad_ on two thirds of the layers": whole_parameters,
}


def measure(name: str, subject: Subject) -> tuple[pd.DataFrame, list[Row]]:
    """All shares and modes of one subject, and the alternatives, each beside the dense step."""
    optimiser = build_optimiser(subject.model, subject.recipe)
    dense = gated_step(subject, optimiser, 1.0, "cut")
    dense()
    set_share(subject.model, 1.0, "cut")
    dense_flops, dense_bytes = flops.training_step(subject.model, subject.batch).everything, kept_bytes(subject)
    found, rows = [], []
    for mode in ("cut", "exact"):
        steps = [gated_step(subject, optimiser, share, mode) for share in SHARES]
        times = medians([dense, *steps], subject.repeats)
        for share, spent in zip(SHARES, times[1:], strict=True):
            set_share(subject.model, share, mode)
            executed = flops.training_step(subject.model, subject.batch).everything
            found.append(
                {
                    "subject": name, "way": mode, "share": share, "seconds": spent, "seconds_dense": times[0],
                    "flops": executed, "time_ratio": spent / times[0], "flops_ratio": executed / dense_flops,
                    "bytes_kept": kept_bytes(subject), "bytes_ratio": kept_bytes(subject) / dense_bytes,
                }
            )  # fmt: skip
            if share < 1:
                saved = (1 - spent / times[0]) / (1 - executed / dense_flops)
                found[-1]["time_saved_over_flops_saved"] = saved
            if abs(share - 1 / 3) < 1e-9:
                wanted = subject.wanted if mode == "cut" else None
                label = f"{name}: time ratio over FLOPs ratio, a third active, {mode}"
                rows.append(row(label, spent / times[0], executed / dense_flops, wanted, "of dense"))
    times = medians([dense, *(make(subject, optimiser) for make in ALTERNATIVES.values())], subject.repeats)
    for way, spent in zip(ALTERNATIVES, times[1:], strict=True):
        found.append({"subject": name, "way": way, "share": 1 / 3, "seconds": spent, "seconds_dense": times[0],
                      "time_ratio": spent / times[0]})  # fmt: skip
        rows.append(row(f"{name}: step with {way}, against dense", spent, times[0], None))
    return pd.DataFrame(found), rows


def draw(frame: pd.DataFrame) -> None:
    """Time and memory against the active share, one panel per subject, beside the FLOPs and the alternatives."""
    subjects = list(dict.fromkeys(frame["subject"]))
    figure, axes = plt.subplots(1, len(subjects), figsize=(4.6 * len(subjects), 4), squeeze=False, sharey=True)
    for axis, subject in zip(axes[0], subjects, strict=True):
        of_subject = frame[frame["subject"] == subject]
        for mode, colour in (("cut", "#0072B2"), ("exact", "#D55E00")):
            rows = of_subject[of_subject["way"] == mode].sort_values("share")
            axis.plot(rows["share"], rows["time_ratio"], color=colour, marker="o", label=f"{mode}: seconds")
            axis.plot(rows["share"], rows["flops_ratio"], color=colour, linestyle="--", label=f"{mode}: FLOPs")
            axis.plot(rows["share"], rows["bytes_ratio"], color=colour, linestyle=":", label=f"{mode}: memory kept")
        for way, marker in zip(ALTERNATIVES, "sx^", strict=True):
            rows = of_subject[of_subject["way"] == way]
            axis.plot(rows["share"], rows["time_ratio"], "k", marker=marker, linestyle="", label=way)
        axis.set(title=subject, xlabel="active share of units", ylim=(0, 1.2))
    axes[0][0].set_ylabel("ratio to the dense step")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(RESULTS / f"gates.{suffix}", dpi=150)
    plt.close(figure)


def main(names: list[str]) -> None:
    """Measure the subjects named, or all."""
    frames, rows = [], []
    for name in names or list(SUBJECTS):
        torch.manual_seed(0)
        frame, found = measure(name, SUBJECTS[name]())
        frames.append(frame)
        rows += found
        whole = pd.concat(frames, ignore_index=True)
        whole.to_csv(RESULTS / "gates.csv", index=False)
        write("gates", rows)
        draw(whole)


if __name__ == "__main__":
    main(sys.argv[1:])
