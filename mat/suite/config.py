"""Typed configuration: one dataclass per group of ``conf/``, each with the checks of its own
values.

Hydra refuses unknown keys and wrong types through these schemas; ``validate`` refuses values out of
range and senseless combinations, each in one sentence that names the key and the remedy. This file
imports neither torch nor numpy, so that ``python launch.py --help`` answers at once.
"""

import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from mat.suite.checks import between, choice, divides, number, numbers, one_line
from mat.suite.errors import UserError


@dataclass
class Group:
    """What all groups have: a check of their values."""

    def check(self) -> None:
        """Refuse values that cannot work together, in one sentence that names the key and the
        remedy.
        """


@dataclass
class ModelConfig(Group):
    """What every model has: a name, and a family, which names the code that builds it."""

    name: str = MISSING
    family: str = MISSING


@dataclass
class BertConfig(ModelConfig):
    """BERT (``mat/suite/models/bert.py``). Units: attention heads and feed-forward groups."""

    family: str = "bert"
    layers: int = number(1, 1000)
    width: int = number(1, 2**16)
    heads: int = number(1)
    ffn_hidden: int = number(1, 2**18)
    ffn_groups: int = number(1)
    positions: str = choice("learned", "rotary")
    norm: str = choice("post", "pre")
    dropout: float = number(0, 0.9, 0.0)  # on embeddings and sublayer outputs

    def check(self) -> None:
        """Heads divide the width, groups the hidden neurons; rotary heads have an even width."""
        divides("model.heads", self.heads, "model.width", self.width)
        divides("model.ffn_groups", self.ffn_groups, "model.ffn_hidden", self.ffn_hidden)
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise UserError(
                f"model.heads={self.heads} gives heads of odd width, which rotary positions cannot "
                "rotate: choose heads so that model.width / model.heads is even."
            )


@dataclass
class SwitchConfig(BertConfig):
    """Switch Transformer (``mat/suite/models/switch.py``). Units: heads, experts, groups of plain
    layers.
    """

    family: str = "switch"
    experts: int = number(1, 2**12)  # per switch layer, each with ffn_hidden neurons
    # An expert takes at most this many times its even share of a batch's tokens
    capacity_factor: float = 1.0
    # Every so manieth feed-forward layer is a switch layer
    switch_every: int = number(1, default=1)
    # Coefficient of the load-balancing loss, summed over switch layers
    balance_loss: float = number(0, default=0.01)
    z_loss: float = number(0, default=0.001)  # coefficient of the router z-loss, likewise

    def check(self) -> None:
        """Besides BERT's: no expert takes more than all tokens; some layer has experts."""
        super().check()
        between("model.capacity_factor", self.capacity_factor, 0, self.experts, above=True)
        between("model.switch_every", self.switch_every, 1, self.layers)


@dataclass
class VggConfig(ModelConfig):
    """VGG with batch norm (``mat/suite/models/vgg.py``). Units: filters."""

    family: str = "vgg"
    # Filters of the layers of every stage; a max pool ends a stage
    stages: list[list[int]] = MISSING

    def check(self) -> None:
        """Every stage has a layer, every layer a filter."""
        if not self.stages or not all(self.stages):
            raise UserError(
                f"model.stages={self.stages} has an empty stage: give the filters of at least one "
                "layer each."
            )
        for filters in itertools.chain(*self.stages):
            between("model.stages", filters, 1, 2**14)


@dataclass
class DatasetConfig(Group):
    """Where a dataset comes from: the hub, local files, or, with neither, a package."""

    name: str = MISSING
    modality: str = MISSING
    hub_path: str | None = None  # datasets.load_dataset(hub_path, hub_name)
    hub_name: str | None = None
    # Folder that holds local_folder; its Parquet files are used instead of the hub
    root: str | None = None
    local_folder: str | None = None
    cache: str = ".cache/mat"  # what is made of the data once: tokenizer and tokens, decoded images

    def check(self) -> None:
        """The folders can be meant, and that of the data is there."""
        one_line("dataset.cache", self.cache)
        if not re.fullmatch(r"[\w-][\w.-]{0,63}", self.name):  # it begins the name of a folder
            raise UserError(
                f"dataset.name={self.name!r} is no name: give up to 64 letters, digits, - and _."
            )
        if self.root is None:
            return
        if self.hub_path is not None and self.local_folder is None:
            raise UserError(
                "dataset.local_folder=null names no folder below dataset.root: set one of the two."
            )
        if not Path(self.root).expanduser().is_dir():
            hub = f" to load {self.name} from the hub" if self.hub_path else ""
            raise UserError(
                f"dataset.root={self.root} is not a folder: point it (or MAT_DATA) at the folder "
                f"that holds {self.local_folder}/, or set it to null{hub}."
            )


@dataclass
class TextConfig(DatasetConfig):
    """A text corpus for masked language modelling."""

    modality: str = "text"
    vocabulary: int = number(64, 2**16)  # word pieces; tokens are stored in 16 bits
    length: int = number(2, 2**16)  # tokens per sequence
    # Only so many, drawn by the seed; all when null
    train_sequences: int | None = number(1, default=None)
    mask_share: float = number(0, 0.9, 0.15, above=True)  # share of the tokens that are predicted


@dataclass
class ImageConfig(DatasetConfig):
    """Labelled square images for classification."""

    modality: str = "image"
    source_size: int = number(1, 2**14)  # pixels a side in the data
    # Pixels a side that the model reads: resized (bilinear) when the cache is made
    size: int = number(1, 2**12)
    channels: int = 3  # 3, or 1 for grey; what is stored otherwise is converted
    classes: int = number(2, 2**16)
    validation: int = number(1)  # images held out of the training split, the same for all seeds
    # Training images move up to so many pixels each way, black coming in
    padding: int = number(0, default=4)
    flip: bool = True  # every other training image is mirrored

    def check(self) -> None:
        """Besides the folders: an image may move out of the picture, not beyond; it is grey or
        coloured.
        """
        super().check()
        between("dataset.padding", self.padding, 0, self.size)
        if self.channels not in (1, 3):
            raise UserError(
                f"dataset.channels={self.channels} is no kind of image: set 3, or 1 for grey."
            )


@dataclass
class MethodConfig(Group):
    """Which units train, and what is done with the others (paper section 5)."""

    name: str = MISSING
    # What the policy ranks by
    score: str = choice("lambda_max", "gradnorm", "none", default="lambda_max")
    policy: str = choice(
        "all", "random", "multirate", "threshold", "lowest", "shuffled", "static", default="all"
    )  # fmt: skip
    temporal: bool = False  # eqs. (6)-(7): units whose eigenvalue has settled stop for good
    budget: float = number(0, 1, 1.0, above=True)  # share of train.pflops that the run spends
    slow_share: float = number(0, 1, 0.5)  # multirate: share of slow units
    # Multirate: a slow unit's gradient is computed every so many steps
    slow_steps: int = number(1, default=5)
    matched: str | None = None  # rand: run folder whose active counts per kind and layer are taken

    def check(self) -> None:
        """The policy has what it reads: a run to match, or scores."""
        if self.matched is not None and self.policy != "random":
            raise UserError(
                f"method.matched={self.matched} is for method=rand only: remove it or choose "
                "method=rand."
            )
        if self.matched is None and self.name == "rand_matched":
            raise UserError(
                "method.matched=null leaves method=rand_matched no run to match: name its folder."
            )
        if self.policy in ("threshold", "lowest", "shuffled", "static") and self.score == "none":
            raise UserError(
                f"method.score=none gives method.policy={self.policy} nothing to rank by: choose "
                "lambda_max or gradnorm."
            )
        if self.temporal and self.score != "lambda_max":
            raise UserError(
                "method.temporal=true needs eigenvalues: set method.score=lambda_max, not "
                f"{self.score}."
            )


@dataclass
class SelectionConfig(Group):
    """What all methods share when units are selected."""

    units: list[str] = MISSING  # kinds that are gated; the others belong to the rest
    interval: float = number(1e-4, 0.05)  # share of the run's FLOPs between selections
    mode: str = choice("cut", "exact")  # backward mode
    share: float | None = number(0, 1, None)  # wanted share of active units; alpha follows from it
    alpha: float | None = number(0, 1, None)  # eq. (4), instead of share
    # Units compared with each other in eq. (4)
    scope: str = choice("kind", "layer", "all", default="kind")
    beta: float = number(0, 1, 1e-3)  # eq. (7)
    samples: int = number(1, default=32)  # probe sequences n
    # random, sum, full: of the probe's outputs. online: loss gradients off a training step on its
    # own batch, without the probe, samples or projections; its samples change with t, so Delta of
    # eqs. (6)-(7) has their noise in it.
    reduction: str = choice("random", "sum", "full", "online", default="random")
    projections: int = number(1, 2**10, 1)  # random: number m of stacked +-1 projections

    def check(self) -> None:
        """Every kind once; a share or an alpha."""
        if not self.units:
            raise UserError(
                "selection.units=[] leaves nothing to gate: name at least one kind, or use "
                "method=baseline."
            )
        if len(set(self.units)) < len(self.units):
            raise UserError(
                f"selection.units=[{','.join(self.units)}] names a kind twice: name each once."
            )
        if (self.share is None) == (self.alpha is None):
            raise UserError(
                f"selection.share={self.share} and selection.alpha={self.alpha} contradict each "
                "other: set exactly one of them and the other to null."
            )


@dataclass
class HardwareConfig(Group):
    """Where the run computes, and how precisely. Changes speed, not the science."""

    device: str = choice("cpu", "cuda")
    # bfloat16: autocast. auto: bfloat16 where the machine has it in hardware, else float32.
    # float64: for tests
    precision: str = choice("auto", "float32", "bfloat16", "float64", default="auto")
    threads: int | None = number(1, os.cpu_count() or 1, None)  # CPU threads; all when null
    # CUDA: training steps are captured as graphs and replayed while the gates stand
    graphs: bool = False
    # Bound on the estimator's working memory
    estimator_bytes: int = number(2**20, default=512 * 2**20)
    # False: the machine is shared with other work, so tables leave this run's seconds out
    exclusive: bool = True

    def check(self) -> None:
        """Graphs are CUDA's."""
        if self.graphs and self.device != "cuda":
            raise UserError(
                "hardware.graphs=true captures CUDA graphs: set it to false, or choose "
                "hardware=cuda."
            )


@dataclass
class TrainConfig(Group):
    """The recipe and the length of training."""

    # Planned length: what a dense run spends, without embeddings and vocabulary
    pflops: float = number(0, above=True)
    batch: int = number(1, 2**20)  # sequences or images per step
    accumulation: int = number(1, default=1)  # micro-batches a step is computed in
    lr: float = number(0, above=True)
    optimiser: str = choice("adamw", "sgd", default="adamw")
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # adamw
    eps: float = number(0, default=1e-6, above=True)  # adamw
    momentum: float = number(0, 0.9999, 0.9)  # sgd
    weight_decay: float = number(0, default=0.01)
    schedule: str = choice("linear", "step", "onecycle", default="linear")  # mat/suite/schedule.py
    warmup: float = number(0, 0.9, 0.05)  # share of the run's FLOPs with rising learning rate
    # Step: shares of the run's FLOPs, rising
    drops: list[float] = numbers(0, 1, default=(0.5, 0.75))
    # Largest gradient norm; no clipping when null
    clip: float | None = number(0, default=1.0, above=True)
    eval_interval: float = number(1e-4, 0.025, 0.025)  # share of train.pflops between evaluations
    eval_samples: int | None = number(1, default=None)  # validation samples; all when null
    eval_batch: int = number(1, 2**20, 128)
    marks: list[float] = numbers(0, above=True)  # PFLOPs at which tables read the validation loss
    log_steps: int = number(1, default=25)  # the mean training loss is logged every so many steps
    checkpoint_steps: int = number(1, default=200)
    stop_when_settled: bool = False  # end the run when all units have stopped

    def check(self) -> None:
        """Micro-batches are equal; the betas are two; the learning rate drops later and later."""
        divides("train.accumulation", self.accumulation, "train.batch", self.batch)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                f"train.betas={self.betas} is not usable: give two numbers within [0, 1)."
            )
        if self.schedule == "step":
            for drop in self.drops:
                between("train.drops", drop, self.warmup, 1)
        if any(b <= a for a, b in itertools.pairwise(self.drops)):
            raise UserError(
                f"train.drops={self.drops} does not rise: give every share once, the smallest "
                "first."
            )


@dataclass
class TrackingConfig(Group):
    """wandb mirrors the run folder when ``wandb`` is true; offline without a key or a network."""

    wandb: bool = False
    project: str = "modular-adaptive-training"
    entity: str | None = None
    progress: bool = True


@dataclass
class Config(Group):
    """One run."""

    name: str = "smoke"  # first folder below ``runs``; experiments set it
    seed: int = number(0, 2**31 - 1, 0)
    runs: str = "runs"
    # Observers of a record: attention | kernels | descent
    analysis: list[str] = field(default_factory=list)
    model: Any = MISSING
    dataset: Any = MISSING
    method: MethodConfig = MISSING
    selection: SelectionConfig = MISSING
    hardware: HardwareConfig = MISSING
    train: TrainConfig = MISSING
    tracking: TrackingConfig = MISSING


GROUPS: dict[str, tuple[tuple[str, type], ...]] = {
    "model": (("bert", BertConfig), ("switch", SwitchConfig), ("vgg", VggConfig)),
    "dataset": (("text", TextConfig), ("image", ImageConfig)),
    "method": (("method", MethodConfig),),
    "selection": (("selection", SelectionConfig),),
    "hardware": (("hardware", HardwareConfig),),
    "train": (("train", TrainConfig),),
    "tracking": (("tracking", TrackingConfig),),
}
