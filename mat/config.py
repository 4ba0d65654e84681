"""Typed configuration: one dataclass per group of ``conf/``, and the checks that run before any work.

Hydra refuses unknown keys and wrong types through these schemas; ``validate`` refuses wrong ranges and senseless
combinations, each in one sentence that names the key and the remedy. This file imports neither torch nor numpy, so
that ``python launch.py --help`` answers at once.
"""

import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mat.errors import UserError


@dataclass
class ModelConfig:
    """What every model has: a name, and a family, which names the code that builds it."""

    name: str = MISSING
    family: str = MISSING


@dataclass
class BertConfig(ModelConfig):
    """BERT (``mat/bert.py``). Units: attention heads and feed-forward groups."""

    family: str = "bert"
    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    ffn_hidden: int = MISSING
    ffn_groups: int = MISSING
    positions: str = MISSING  # learned | rotary
    norm: str = MISSING  # post | pre
    dropout: float = 0.0  # on embeddings and sublayer outputs


@dataclass
class SwitchConfig(BertConfig):
    """Switch Transformer (``mat/switch.py``). Units: attention heads, experts, groups of plain feed-forward layers."""

    family: str = "switch"
    experts: int = MISSING  # per switch layer, each with ffn_hidden neurons
    capacity_factor: float = 1.0  # an expert takes at most this many times its even share of a training batch's tokens
    switch_every: int = 1  # every so manieth feed-forward layer is a switch layer
    balance_loss: float = 0.01  # coefficient of the load-balancing loss, added up over the switch layers
    z_loss: float = 0.001  # coefficient of the router z-loss, likewise


@dataclass
class VggConfig(ModelConfig):
    """VGG with batch norm (``mat/vgg.py``). Units: filters."""

    family: str = "vgg"
    stages: list[list[int]] = MISSING  # filters of the layers of every stage; a max pool ends a stage


@dataclass
class DatasetConfig:
    """Where a dataset comes from: the hub, local files, or, with neither hub_path nor local_folder, a package."""

    name: str = MISSING
    modality: str = MISSING
    hub_path: str | None = None  # datasets.load_dataset(hub_path, hub_name)
    hub_name: str | None = None
    root: str | None = None  # folder that holds local_folder; its Parquet files are used instead of the hub
    local_folder: str | None = None
    cache: str = ".cache/mat"  # what is made of the data once: tokenizer and tokens, decoded images


@dataclass
class TextConfig(DatasetConfig):
    """A text corpus for masked language modelling."""

    modality: str = "text"
    vocabulary: int = MISSING  # word pieces
    length: int = MISSING  # tokens per sequence
    train_sequences: int | None = None  # only so many training sequences, drawn by the seed; all when null
    mask_share: float = 0.15  # share of the tokens that are predicted


@dataclass
class ImageConfig(DatasetConfig):
    """Labelled square images for classification."""

    modality: str = "image"
    source_size: int = MISSING  # pixels a side in the data
    size: int = MISSING  # pixels a side that the model reads: resized (bilinear) when the cache is made
    channels: int = 3  # 3, or 1 for grey; what is stored otherwise is converted
    classes: int = MISSING
    validation: int = MISSING  # images held out of the training split, the same for all seeds
    padding: int = 4  # training images move up to so many pixels each way, black coming in
    flip: bool = True  # every other training image is mirrored


@dataclass
class MethodConfig:
    """Which units train, and what is done with the others (paper section 5)."""

    name: str = MISSING
    score: str = "lambda_max"  # what the policy ranks by: lambda_max | gradnorm | none
    policy: str = "all"  # all | random | multirate | threshold | lowest | shuffled | static
    temporal: bool = False  # eqs. (6)-(7): units whose eigenvalue has settled stop for good
    budget: float = 1.0  # share of train.pflops that the run spends
    slow_share: float = 0.5  # multirate: share of slow units
    slow_steps: int = 5  # multirate: a slow unit's gradient is computed every so many steps
    matched: str | None = None  # rand: run folder whose active counts per kind and layer are taken


@dataclass
class SelectionConfig:
    """What all methods share when units are selected."""

    units: list[str] = MISSING  # kinds that are gated; the others belong to the rest
    interval: float = MISSING  # share of the run's FLOPs between selections
    mode: str = MISSING  # backward mode: cut | exact | sampled (vgg)
    cut_last: int = 0  # vgg, mode=exact: the last so many layers use cut instead
    share: float | None = None  # wanted share of active units; alpha follows from it
    alpha: float | None = None  # eq. (4), instead of share
    scope: str = "kind"  # units compared with each other in eq. (4): kind | layer | all
    beta: float = 1e-3  # eq. (7)
    samples: int = 32  # probe sequences n
    # random | sum | full, of the probe's outputs; online: loss gradients off a training step on its own batch, without
    # the probe, samples or projections. Its samples change with t, so Delta of eqs. (6)-(7) has their noise in it.
    reduction: str = "random"
    projections: int = 1  # random: number m of stacked +-1 projections


@dataclass
class HardwareConfig:
    """Where the run computes, and how precisely. Changes speed, not the science."""

    device: str = MISSING  # cpu | cuda
    precision: str = MISSING  # float32 | bfloat16 (autocast)
    threads: int | None = None  # CPU threads; all when null
    gather_block: int = 16  # convolutions: the channels that a gated backward gathers are padded to multiples of this
    gather_share: float = 0.75  # and are gathered up to this share of a layer's; beyond it the backward is dense
    estimator_bytes: int = 512 * 2**20  # bound on the estimator's working memory
    exclusive: bool = True  # false: the machine is shared with other work, so tables leave this run's seconds out


@dataclass
class TrainConfig:
    """The recipe and the length of training."""

    pflops: float = MISSING  # planned length: what a dense run spends, without embeddings and vocabulary
    batch: int = MISSING  # sequences or images per step
    accumulation: int = 1  # micro-batches a step is computed in
    lr: float = MISSING
    optimiser: str = "adamw"  # adamw | sgd
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # adamw
    eps: float = 1e-6  # adamw
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.01
    schedule: str = "linear"  # linear | step | onecycle (mat/schedule.py)
    warmup: float = 0.05  # share of the run's FLOPs with rising learning rate
    drops: list[float] = field(default_factory=lambda: [0.5, 0.75])  # step: shares of the run's FLOPs
    clip: float | None = 1.0  # largest gradient norm; no clipping when null
    eval_interval: float = 0.025  # share of train.pflops between evaluations
    eval_samples: int | None = None  # validation samples; all when null
    eval_batch: int = 128
    marks: list[float] = field(default_factory=list)  # PFLOPs at which the tables read the validation loss
    log_steps: int = 25  # the mean training loss is logged every so many steps
    checkpoint_steps: int = 200
    stop_when_settled: bool = False  # end the run when all units have stopped


@dataclass
class TrackingConfig:
    """wandb mirrors the run folder when ``wandb`` is true; offline without a key or a network."""

    wandb: bool = False
    project: str = "modular-adaptive-training"
    entity: str | None = None
    progress: bool = True


@dataclass
class Config:
    """One run."""

    name: str = "smoke"  # first folder below ``runs``; experiments set it
    seed: int = 0
    runs: str = "runs"
    analysis: list[str] = field(default_factory=list)  # observers at selections: attention | kernels | descent
    model: Any = MISSING
    dataset: Any = MISSING
    method: MethodConfig = MISSING
    selection: SelectionConfig = MISSING
    hardware: HardwareConfig = MISSING
    train: TrainConfig = MISSING
    tracking: TrackingConfig = MISSING


# Keys that say where and how a run was made, not what was computed: they name no folder and may differ on resuming.
INCIDENTAL = (
    "seed",
    "runs",
    "name",
    "analysis",
    "tracking",
    "dataset.root",
    "dataset.cache",
    "method.matched",
    "train.checkpoint_steps",
    "hardware.threads",
    "hardware.exclusive",
)

GROUPS: dict[str, tuple[tuple[str, type], ...]] = {
    "model": (("bert", BertConfig), ("switch", SwitchConfig), ("vgg", VggConfig)),
    "dataset": (("text", TextConfig), ("image", ImageConfig)),
    "method": (("method", MethodConfig),),
    "selection": (("selection", SelectionConfig),),
    "hardware": (("hardware", HardwareConfig),),
    "train": (("train", TrainConfig),),
    "tracking": (("tracking", TrackingConfig),),
}


def register_schemas() -> None:
    """Give Hydra the schemas (``schema`` for the whole, ``<group>/schema_<name>`` for a group's files) and resolvers.

    ``${data_root:}`` is the folder in MAT_DATA or null; ``${marks:p,20,5,10}`` scales the marks 5 and 10 of a run of
    20 PFLOPs to a run of p; ``${groups:}`` is what ``--help`` says about the groups.
    """
    OmegaConf.register_new_resolver("data_root", lambda: os.environ.get("MAT_DATA") or None, replace=True)
    OmegaConf.register_new_resolver("groups", lambda: describe_groups(CONF), replace=True)
    OmegaConf.register_new_resolver(
        "marks", lambda pflops, total, *marks: [pflops * mark / total for mark in marks], replace=True
    )
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in GROUPS.items():
        for name, node in schemas:
            store.store(group=group, name=f"schema_{name}", node=node)


def with_defaults(flat: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration (dotted keys), completed: a run made before a key existed ran with its default."""
    defaults = {
        f"{group}.{f.name}": f.default_factory() if callable(f.default_factory) else f.default
        for group, schemas in GROUPS.items()
        if len(schemas) == 1 and group not in ("model", "dataset")  # of these one file names the class
        for f in fields(schemas[0][1])
        if f.default is not MISSING
    }
    return {**defaults, **flat}


CONF = Path(__file__).resolve().parent.parent / "conf"


def describe_groups(conf: Path) -> str:
    """Every group's options, each with the comment that its file begins with."""
    lines = []
    for group in sorted(path for path in conf.iterdir() if path.is_dir() and path.name != "hydra"):
        lines.append(f"{group.name}")
        for file in sorted(group.glob("*.yaml")):
            comments = [line[2:] for line in file.read_text().splitlines() if re.match("# (?!@)", line)]
            lines.append(f"  {file.stem:<21} {comments[0] if comments else ''}".rstrip())
    return "\n".join(lines).replace("$", "$$")  # Hydra takes the text for a template


ANALYSES = ("attention", "kernels", "descent")  # mat/analysis.py
KINDS = {"bert": ("heads", "ffn"), "switch": ("heads", "experts", "ffn"), "vgg": ("filters",)}
MODALITY = {"bert": "text", "switch": "text", "vgg": "image"}
SUITS = {  # what to choose beside a model
    "bert": "selection=mini", "switch": "selection=experts_mini", "vgg": "selection=filters_mini train=images_mini",
}  # fmt: skip
MODES = {"bert": ("cut", "exact"), "switch": ("cut", "exact"), "vgg": ("cut", "exact", "sampled")}


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(allowed)}."
        raise UserError(f"{key}={value} is not known: {hint}")


def _between(key: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not (low < value if open_low else low <= value) or not value <= high or math.isinf(value):
        left, right = "(" if open_low else "[", ")" if math.isinf(high) else "]"
        raise UserError(f"{key}={value} is out of range: set it within {left}{low}, {high}{right}.")


def validate(config: Config) -> None:
    """Refuse what cannot work, before any work.

    Args:
        config: The composed configuration.

    Raises:
        UserError: In one sentence, naming the key and the remedy.
    """
    model, train, selection, method = config.model, config.train, config.selection, config.method
    _one_of("model.family", model.family, list(KINDS))
    if MODALITY[model.family] != config.dataset.modality:
        raise UserError(
            f"model={model.family} cannot read dataset={config.dataset.name}: choose a dataset of "
            f"{MODALITY[model.family]}s."
            if MODALITY[model.family] != "text"
            else f"model={model.family} cannot read dataset={config.dataset.name}: choose a text dataset."
        )
    if isinstance(model, BertConfig):
        _validate_bert(model)
    if isinstance(model, SwitchConfig):
        _validate_switch(model, selection.units)
    if isinstance(model, VggConfig):
        _validate_vgg(model)
    _validate_dataset(config.dataset)

    for name in config.analysis:
        _one_of("analysis", name, ANALYSES)
        if name == "attention" and "heads" not in KINDS[model.family]:
            raise UserError(f"analysis=[attention] needs a model with heads: leave it out for model={model.family}.")
        if name == "descent" and isinstance(model, VggConfig):
            raise UserError(
                "analysis=[descent] compares kernels under the probe's batch statistics with steps under running ones: "
                f"leave it out for model={model.family}."
            )

    inf = float("inf")
    _between("seed", config.seed, 0, 2**31 - 1)
    _between("train.pflops", train.pflops, 0, inf, open_low=True)
    for key in ("batch", "accumulation", "eval_batch", "log_steps", "checkpoint_steps"):
        _between(f"train.{key}", getattr(train, key), 1, inf)
    if train.batch % train.accumulation:
        raise UserError(
            f"train.accumulation={train.accumulation} does not divide train.batch={train.batch}: choose a divisor."
        )
    _between("train.lr", train.lr, 0, inf, open_low=True)
    _between("train.eps", train.eps, 0, inf, open_low=True)
    if train.clip is not None:
        _between("train.clip", train.clip, 0, inf, open_low=True)
    _one_of("train.optimiser", train.optimiser, ("adamw", "sgd"))
    _one_of("train.schedule", train.schedule, ("linear", "step", "onecycle"))
    _between("train.momentum", train.momentum, 0, 0.9999)
    if train.schedule == "step":
        for drop in train.drops:
            _between("train.drops", drop, train.warmup, 1)
    _between("train.weight_decay", train.weight_decay, 0, inf)
    _between("train.warmup", train.warmup, 0, 0.9)
    _between("train.eval_interval", train.eval_interval, 0, 0.025, open_low=True)
    if train.eval_samples is not None:
        _between("train.eval_samples", train.eval_samples, 1, inf)
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas={train.betas} is not usable: give two numbers within [0, 1).")
    for mark in train.marks:
        _between("train.marks", mark, 0, train.pflops, open_low=True)

    for kind in selection.units:
        if kind not in KINDS[model.family] and kind in sum(KINDS.values(), ()):
            raise UserError(f"selection.units={kind} is none of model={model.name}: add {SUITS[model.family]}.")
        _one_of("selection.units", kind, KINDS[model.family])
    if not selection.units:
        raise UserError("selection.units=[] leaves nothing to gate: name at least one kind, or use method=baseline.")
    _one_of("selection.mode", selection.mode, MODES[model.family])
    if selection.cut_last and not (isinstance(model, VggConfig) and selection.mode == "exact"):
        raise UserError(
            f"selection.cut_last={selection.cut_last} is for the layers of a VGG with selection.mode=exact: set it to "
            "0, or choose these."
        )
    if isinstance(model, VggConfig):
        _between("selection.cut_last", selection.cut_last, 0, sum(map(len, model.stages)))
    _one_of("selection.scope", selection.scope, ("kind", "layer", "all"))
    _one_of("selection.reduction", selection.reduction, ("random", "sum", "full", "online"))
    if selection.reduction == "online" and model.family != "bert":  # batch norm, capacity: samples are coupled
        raise UserError(
            f"selection.reduction=online cannot tell apart the samples of a training step of model={model.family}, "
            "which its forward pass couples: choose random."
        )
    _between("selection.interval", selection.interval, 0, 0.05, open_low=True)
    _between("selection.beta", selection.beta, 0, 1)
    _between("selection.samples", selection.samples, 1, inf)
    _between("selection.projections", selection.projections, 1, inf)
    if (selection.share is None) == (selection.alpha is None):
        raise UserError(
            f"selection.share={selection.share} and selection.alpha={selection.alpha} contradict each other: "
            "set exactly one of them and the other to null."
        )
    if selection.share is not None:
        _between("selection.share", selection.share, 0, 1)
    if selection.alpha is not None:
        _between("selection.alpha", selection.alpha, 0, 1)

    _one_of("method.policy", method.policy, ("all", "random", "multirate", "threshold", "lowest", "shuffled", "static"))
    _one_of("method.score", method.score, ("none", "lambda_max", "gradnorm"))
    _between("method.budget", method.budget, 0, 1, open_low=True)
    _between("method.slow_share", method.slow_share, 0, 1)
    _between("method.slow_steps", method.slow_steps, 1, inf)
    if method.matched is not None and method.policy != "random":
        raise UserError(f"method.matched={method.matched} is for method=rand only: remove it or choose method=rand.")
    if method.policy == "random" and selection.share is None:
        raise UserError(
            f"method={method.name} draws a share of the units: set selection.share to it and selection.alpha=null."
        )
    if method.policy in ("threshold", "lowest", "shuffled", "static") and method.score == "none":
        raise UserError(
            f"method.score=none gives method.policy={method.policy} nothing to rank by: choose lambda_max or gradnorm."
        )
    if method.temporal and method.score != "lambda_max":
        raise UserError(f"method.temporal=true needs eigenvalues: set method.score=lambda_max, not {method.score}.")

    _one_of("hardware.device", config.hardware.device, ("cpu", "cuda"))
    _one_of("hardware.precision", config.hardware.precision, ("float32", "bfloat16"))
    if config.hardware.threads is not None:
        _between("hardware.threads", config.hardware.threads, 1, os.cpu_count() or 1)
    _between("hardware.gather_block", config.hardware.gather_block, 1, inf)
    _between("hardware.gather_share", config.hardware.gather_share, 0, 1)
    _between("hardware.estimator_bytes", config.hardware.estimator_bytes, 2**20, inf)


def _validate_bert(model: BertConfig) -> None:
    for key in ("layers", "width", "heads", "ffn_hidden", "ffn_groups"):
        _between(f"model.{key}", getattr(model, key), 1, float("inf"))
    _one_of("model.positions", model.positions, ("learned", "rotary"))
    _one_of("model.norm", model.norm, ("post", "pre"))
    _between("model.dropout", model.dropout, 0, 0.9)
    if model.width % model.heads:
        raise UserError(f"model.heads={model.heads} does not divide model.width={model.width}: choose a divisor.")
    if model.positions == "rotary" and (model.width // model.heads) % 2:
        raise UserError(
            f"model.heads={model.heads} gives heads of odd width, which rotary positions cannot rotate: "
            "choose heads so that model.width / model.heads is even."
        )
    if model.ffn_hidden % model.ffn_groups:
        raise UserError(
            f"model.ffn_groups={model.ffn_groups} does not divide model.ffn_hidden={model.ffn_hidden}: "
            "choose a divisor."
        )


def _validate_switch(model: SwitchConfig, units: list[str]) -> None:
    _between("model.experts", model.experts, 1, float("inf"))
    _between("model.capacity_factor", model.capacity_factor, 0, model.experts, open_low=True)
    _between("model.switch_every", model.switch_every, 1, model.layers)
    _between("model.balance_loss", model.balance_loss, 0, float("inf"))
    _between("model.z_loss", model.z_loss, 0, float("inf"))
    if model.switch_every == 1 and units == ["ffn"]:
        raise UserError(
            "selection.units=[ffn] names no unit of a model whose every layer is a switch layer: choose heads or "
            "experts, or set model.switch_every=2."
        )


def _validate_vgg(model: VggConfig) -> None:
    if not model.stages or not all(model.stages):
        raise UserError(f"model.stages={model.stages} has an empty stage: give the filters of at least one layer each.")
    for filters in (count for stage in model.stages for count in stage):
        _between("model.stages", filters, 1, float("inf"))


def _validate_dataset(dataset: DatasetConfig) -> None:
    inf = float("inf")
    if isinstance(dataset, TextConfig):
        _between("dataset.length", dataset.length, 2, inf)
        if dataset.train_sequences is not None:
            _between("dataset.train_sequences", dataset.train_sequences, 1, inf)
        _between("dataset.vocabulary", dataset.vocabulary, 64, 2**16)  # tokens are stored in 16 bits
        _between("dataset.mask_share", dataset.mask_share, 0, 0.9, open_low=True)
    elif isinstance(dataset, ImageConfig):
        for key in ("source_size", "size", "validation"):
            _between(f"dataset.{key}", getattr(dataset, key), 1, inf)
        _between("dataset.classes", dataset.classes, 2, inf)
        _between("dataset.padding", dataset.padding, 0, dataset.size)
        if dataset.channels not in (1, 3):
            raise UserError(f"dataset.channels={dataset.channels} is no kind of image: set 3, or 1 for grey.")
    if dataset.hub_path is not None and dataset.root is not None and dataset.local_folder is None:
        raise UserError("dataset.local_folder=null names no folder below dataset.root: set one of the two.")
    if dataset.root is not None and not Path(dataset.root).expanduser().is_dir():
        otherwise = f"set it to null to load {dataset.name} from the hub" if dataset.hub_path else "set it to null"
        raise UserError(
            f"dataset.root={dataset.root} is not a folder: point it (or MAT_DATA) at the folder that holds "
            f"{dataset.local_folder}/, or {otherwise}."
        )


def resolve(composed: DictConfig) -> Config:
    """Turn Hydra's composition into dataclasses and validate them.

    Args:
        composed: What Hydra composed.

    Returns:
        The validated configuration.

    Raises:
        UserError: If a key is unknown, or a value is missing or senseless.
    """
    known = keys()
    for key in _flat_keys(OmegaConf.to_container(composed)):
        if key not in known:  # added with +key=value
            raise UserError(unknown_key(key))
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(f"{missing[0]} has no value: set it on the command line, as in {missing[0]}=...")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be resolved: give it a plain value.") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def keys() -> dict[str, Any]:
    """All keys with their types."""
    found = {f.name: f.type for f in fields(Config)}
    for group, schemas in GROUPS.items():
        for _, node in schemas:
            found |= {f"{group}.{f.name}": f.type for f in fields(node)}
    return found


def _flat_keys(value: Any, prefix: str = "") -> Iterator[str]:
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, dict) and name in GROUPS:
            yield from _flat_keys(inner, f"{name}.")
        else:
            yield name


def unknown_key(key: str) -> str:
    """The sentence for a key that does not exist, with the nearest that does."""
    known = list(keys())
    near = [k for k in known if k.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
    return f"{key} is not a key: " + (f"did you mean {near[0]}?" if near else "python launch.py --help shows them.")
