"""Typed configuration: one dataclass per group of ``conf/``, and the checks that run before any work.

Hydra refuses unknown keys and wrong types through these schemas; ``validate`` refuses wrong ranges and senseless
combinations, each in one sentence that names the key and the remedy. This file imports neither torch nor numpy, so
that ``python launch.py --help`` answers at once.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mat.suite.errors import UserError

INF = math.inf


def bounds(low: float, high: float = INF, *, above: bool = False) -> dict[str, Any]:
    """What a key allows, of a list for every value: [low, high], or (low, high] with ``above``."""
    return {"bounds": (low, high, above)}


def number(low: float, high: float = INF, default: Any = MISSING, *, above: bool = False) -> Any:
    """A key whose value lies within bounds."""
    return field(default=default, metadata=bounds(low, high, above=above))


def choice(*options: str, default: str = MISSING) -> Any:
    """A key whose value is one of the options."""
    return field(default=default, metadata={"options": options})


@dataclass
class ModelConfig:
    """What every model has: a name, and a family, which names the code that builds it."""

    name: str = MISSING
    family: str = MISSING


@dataclass
class BertConfig(ModelConfig):
    """BERT (``mat/suite/bert.py``). Units: attention heads and feed-forward groups."""

    family: str = "bert"
    layers: int = number(1)
    width: int = number(1)
    heads: int = number(1)
    ffn_hidden: int = number(1)
    ffn_groups: int = number(1)
    positions: str = choice("learned", "rotary")
    norm: str = choice("post", "pre")
    dropout: float = number(0, 0.9, 0.0)  # on embeddings and sublayer outputs


@dataclass
class SwitchConfig(BertConfig):
    """Switch Transformer (``mat/suite/switch.py``). Units: heads, experts, groups of plain feed-forward layers."""

    family: str = "switch"
    experts: int = number(1)  # per switch layer, each with ffn_hidden neurons
    capacity_factor: float = 1.0  # an expert takes at most this many times its even share of a training batch's tokens
    switch_every: int = number(1, default=1)  # every so manieth feed-forward layer is a switch layer
    balance_loss: float = number(0, default=0.01)  # coefficient of the load-balancing loss, summed over switch layers
    z_loss: float = number(0, default=0.001)  # coefficient of the router z-loss, likewise


@dataclass
class VggConfig(ModelConfig):
    """VGG with batch norm (``mat/suite/vgg.py``). Units: filters."""

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
    vocabulary: int = number(64, 2**16)  # word pieces; tokens are stored in 16 bits
    length: int = number(2)  # tokens per sequence
    # only so many training sequences, drawn by the seed; all when null
    train_sequences: int | None = number(1, default=None)
    mask_share: float = number(0, 0.9, 0.15, above=True)  # share of the tokens that are predicted


@dataclass
class ImageConfig(DatasetConfig):
    """Labelled square images for classification."""

    modality: str = "image"
    source_size: int = number(1, 2**14)  # pixels a side in the data
    size: int = number(1, 2**12)  # pixels a side that the model reads: resized (bilinear) once
    channels: int = 3  # 3, or 1 for grey; what is stored otherwise is converted
    classes: int = number(2, 2**16)
    validation: int = number(1)  # images held out of the training split, the same for all seeds
    padding: int = number(0, default=4)  # training images move up to so many pixels each way, black coming in
    flip: bool = True  # every other training image is mirrored


@dataclass
class MethodConfig:
    """Which units train, and what is done with the others (paper section 5)."""

    name: str = MISSING
    score: str = choice("lambda_max", "gradnorm", "none", default="lambda_max")  # what the policy ranks by
    policy: str = choice(
        "all", "random", "multirate", "threshold", "lowest", "shuffled", "static", default="all"
    )  # fmt: skip
    temporal: bool = False  # eqs. (6)-(7): units whose eigenvalue has settled stop for good
    budget: float = number(0, 1, 1.0, above=True)  # share of train.pflops that the run spends
    slow_share: float = number(0, 1, 0.5)  # multirate: share of slow units
    slow_steps: int = number(1, default=5)  # multirate: a slow unit's gradient is computed every so many steps
    matched: str | None = None  # rand: run folder whose active counts per kind and layer are taken


@dataclass
class SelectionConfig:
    """What all methods share when units are selected."""

    units: list[str] = MISSING  # kinds that are gated; the others belong to the rest
    interval: float = number(0, 0.05, above=True)  # share of the run's FLOPs between selections
    mode: str = choice("cut", "exact")  # backward mode
    share: float | None = number(0, 1, None)  # wanted share of active units; alpha follows from it
    alpha: float | None = number(0, 1, None)  # eq. (4), instead of share
    scope: str = choice("kind", "layer", "all", default="kind")  # units compared with each other in eq. (4)
    beta: float = number(0, 1, 1e-3)  # eq. (7)
    samples: int = number(1, default=32)  # probe sequences n
    # random, sum, full: of the probe's outputs. online: loss gradients off a training step on its own batch, without
    # the probe, samples or projections; its samples change with t, so Delta of eqs. (6)-(7) has their noise in it.
    reduction: str = choice("random", "sum", "full", "online", default="random")
    projections: int = number(1, default=1)  # random: number m of stacked +-1 projections


@dataclass
class HardwareConfig:
    """Where the run computes, and how precisely. Changes speed, not the science."""

    device: str = choice("cpu", "cuda")
    precision: str = choice("float32", "bfloat16")  # bfloat16: autocast
    threads: int | None = number(1, os.cpu_count() or 1, None)  # CPU threads; all when null
    graphs: bool = False  # CUDA: training steps are captured as graphs and replayed while the gates stand
    gather_block: int = number(
        1, default=16
    )  # convolutions: the channels that a gated backward gathers are padded to multiples of this
    gather_share: float = number(
        0, 1, 0.75
    )  # and are gathered up to this share of a layer's; beyond it the backward is dense
    estimator_bytes: int = number(2**20, default=512 * 2**20)  # bound on the estimator's working memory
    exclusive: bool = True  # false: the machine is shared with other work, so tables leave this run's seconds out


@dataclass
class TrainConfig:
    """The recipe and the length of training."""

    pflops: float = number(0, above=True)  # planned length: what a dense run spends, without embeddings and vocabulary
    batch: int = number(1)  # sequences or images per step
    accumulation: int = number(1, default=1)  # micro-batches a step is computed in
    lr: float = number(0, above=True)
    optimiser: str = choice("adamw", "sgd", default="adamw")
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])  # adamw
    eps: float = number(0, default=1e-6, above=True)  # adamw
    momentum: float = number(0, 0.9999, 0.9)  # sgd
    weight_decay: float = number(0, default=0.01)
    schedule: str = choice("linear", "step", "onecycle", default="linear")  # mat/suite/schedule.py
    warmup: float = number(0, 0.9, 0.05)  # share of the run's FLOPs with rising learning rate
    drops: list[float] = field(
        default_factory=lambda: [0.5, 0.75], metadata=bounds(0, 1)
    )  # step: shares of the run's FLOPs
    clip: float | None = number(0, default=1.0, above=True)  # largest gradient norm; no clipping when null
    eval_interval: float = number(0, 0.025, 0.025, above=True)  # share of train.pflops between evaluations
    eval_samples: int | None = number(1, default=None)  # validation samples; all when null
    eval_batch: int = number(1, default=128)
    # PFLOPs at which the tables read the validation loss
    marks: list[float] = field(default_factory=list, metadata=bounds(0, above=True))
    log_steps: int = number(1, default=25)  # the mean training loss is logged every so many steps
    checkpoint_steps: int = number(1, default=200)
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
    seed: int = number(0, 2**31 - 1, 0)
    runs: str = "runs"
    analysis: list[str] = field(default_factory=list)  # observers of a record: attention | kernels | descent
    model: Any = MISSING
    dataset: Any = MISSING
    method: MethodConfig = MISSING
    selection: SelectionConfig = MISSING
    hardware: HardwareConfig = MISSING
    train: TrainConfig = MISSING
    tracking: TrackingConfig = MISSING


# Keys that recorded runs have and configurations no longer do, at the one value that says what is computed now.
RETIRED = {"selection.cut_last": 0}
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
    "hardware.graphs",
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def is_incidental(key: str) -> bool:
    """Whether a dotted key, or what it belongs to, is one of ``INCIDENTAL``."""
    return any(f"{key}.".startswith(f"{incidental}.") for incidental in INCIDENTAL)


def science(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was computed in a recorded run, by dotted key: a run made before a key existed ran with its default."""
    defaults = {
        f"{group}.{f.name}": f.default_factory() if callable(f.default_factory) else f.default
        for group, schemas in GROUPS.items()
        if len(schemas) == 1 and group not in ("model", "dataset")  # of these one file names the class
        for f in fields(schemas[0][1])
        if f.default is not MISSING
    }
    recorded = {key: value for key, value in flatten(config).items() if RETIRED.get(key, MISSING) != value}
    return {key: value for key, value in {**defaults, **recorded}.items() if not is_incidental(key)}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every dotted key in which two recorded configurations differ in their science, sorted."""
    here, there = science(one), science(other)
    pairs = {key: (here.get(key), there.get(key)) for key in sorted(here.keys() | there.keys())}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


CONF = Path(__file__).resolve().parents[2] / "conf"


def describe_groups(conf: Path) -> str:
    """Every group's options, each with the comment that its file begins with."""
    lines = []
    for group in sorted(path for path in conf.iterdir() if path.is_dir() and path.name != "hydra"):
        lines.append(f"{group.name}")
        for file in sorted(group.glob("*.yaml")):
            comments = [line[2:] for line in file.read_text().splitlines() if re.match("# (?!@)", line)]
            lines.append(f"  {file.stem:<21} {comments[0] if comments else ''}".rstrip())
    return "\n".join(lines).replace("$", "$$")  # Hydra takes the text for a template


ANALYSES = ("attention", "kernels", "descent")  # mat/suite/analysis.py
KINDS = {"bert": ("heads", "ffn"), "switch": ("heads", "experts", "ffn"), "vgg": ("filters",)}
MODALITY = {"bert": "text", "switch": "text", "vgg": "image"}
SUITS = {  # what to choose beside a model
    "bert": "selection=mini", "switch": "selection=experts_mini", "vgg": "selection=filters_mini train=images_mini",
}  # fmt: skip


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(allowed)}."
        raise UserError(f"{key}={value} is not known: {hint}")


def _between(key: str, value: float, low: float, high: float, above: bool = False) -> None:
    if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
        left, right = "(" if above else "[", ")" if math.isinf(high) else "]"
        raise UserError(f"{key}={value} is out of range: set it within {left}{low}, {high}{right}.")


def _validate_alone(prefix: str, node: Any) -> None:
    """Refuse values outside what their own keys allow."""
    for f in fields(node):
        given = getattr(node, f.name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and "bounds" in f.metadata:
                _between(f"{prefix}{f.name}", value, *f.metadata["bounds"])
            elif value is not None and "options" in f.metadata:
                _one_of(f"{prefix}{f.name}", value, f.metadata["options"])


def validate(config: Config) -> None:
    """Refuse what cannot work, before any work.

    Args:
        config: The composed configuration.

    Raises:
        UserError: In one sentence, naming the key and the remedy.
    """
    model, train, selection, method = config.model, config.train, config.selection, config.method
    _validate_alone("", config)
    for group in GROUPS:
        _validate_alone(f"{group}.", getattr(config, group))

    for key, value, own, group in (
        ("model.family", model.family, type(model).family, "model"),
        ("dataset.modality", config.dataset.modality, type(config.dataset).modality, "dataset"),
    ):
        if value != own:
            raise UserError(f"{key}={value} contradicts {group}={getattr(config, group).name}: choose another {group}.")
    if MODALITY[model.family] != config.dataset.modality:
        wanted = "a text dataset" if MODALITY[model.family] == "text" else "a dataset of images"
        raise UserError(f"model={model.family} cannot read dataset={config.dataset.name}: choose {wanted}.")
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

    if train.batch % train.accumulation:
        raise UserError(
            f"train.accumulation={train.accumulation} does not divide train.batch={train.batch}: choose a divisor."
        )
    if config.hardware.graphs and config.hardware.device != "cuda":
        raise UserError("hardware.graphs=true captures CUDA graphs: set it to false, or choose hardware=cuda.")
    if train.schedule == "step":
        for drop in train.drops:
            _between("train.drops", drop, train.warmup, 1)
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas={train.betas} is not usable: give two numbers within [0, 1).")
    for mark in train.marks:
        _between("train.marks", mark, 0, train.pflops, above=True)

    for kind in selection.units:
        if kind not in KINDS[model.family] and kind in sum(KINDS.values(), ()):
            raise UserError(f"selection.units={kind} is none of model={model.name}: add {SUITS[model.family]}.")
        _one_of("selection.units", kind, KINDS[model.family])
    if not selection.units:
        raise UserError("selection.units=[] leaves nothing to gate: name at least one kind, or use method=baseline.")
    if selection.reduction == "online" and model.family != "bert":  # batch norm, capacity: samples are coupled
        raise UserError(
            f"selection.reduction=online cannot tell apart the samples of a training step of model={model.family}, "
            "which its forward pass couples: choose random."
        )
    if (selection.share is None) == (selection.alpha is None):
        raise UserError(
            f"selection.share={selection.share} and selection.alpha={selection.alpha} contradict each other: "
            "set exactly one of them and the other to null."
        )

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


def _validate_bert(model: BertConfig) -> None:
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
    _between("model.capacity_factor", model.capacity_factor, 0, model.experts, above=True)
    _between("model.switch_every", model.switch_every, 1, model.layers)
    if model.switch_every == 1 and units == ["ffn"]:
        raise UserError(
            "selection.units=[ffn] names no unit of a model whose every layer is a switch layer: choose heads or "
            "experts, or set model.switch_every=2."
        )


def _validate_vgg(model: VggConfig) -> None:
    if not model.stages or not all(model.stages):
        raise UserError(f"model.stages={model.stages} has an empty stage: give the filters of at least one layer each.")
    for filters in (count for stage in model.stages for count in stage):
        _between("model.stages", filters, 1, INF)


def _validate_dataset(dataset: DatasetConfig) -> None:
    if not re.fullmatch(r"[\w-][\w.-]{0,63}", dataset.name):  # it begins a folder's name
        raise UserError(
            f"dataset.name={dataset.name!r} is no name: use up to 64 letters, digits, - and _."
        )
    if not dataset.cache:
        raise UserError("dataset.cache is empty: name a folder.")
    if isinstance(dataset, ImageConfig):
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
    given: Any = OmegaConf.to_container(composed)
    for key in flatten(given):
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


def unknown_key(key: str) -> str:
    """The sentence for a key that does not exist, with the nearest that does."""
    known = list(keys())
    near = [k for k in known if k.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
    return f"{key} is not a key: " + (f"did you mean {near[0]}?" if near else "python launch.py --help shows them.")
