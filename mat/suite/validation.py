"""Which configurations make sense: every value alone, every group, and all groups together."""

import itertools
import re
from dataclasses import fields

from mat.suite.checks import between, one_line, one_of
from mat.suite.config import GROUPS, Config, SwitchConfig, VggConfig
from mat.suite.errors import UserError

ANALYSES = ("attention", "kernels", "descent")  # mat/suite/analysis.py
UNFIT_FOR_IMAGES = {
    "attention": "needs a model with heads",
    "descent": "compares kernels under the probe's batch statistics with steps under running ones",
}
KINDS = {"bert": ("heads", "ffn"), "switch": ("heads", "experts", "ffn"), "vgg": ("filters",)}
MODALITY = {"bert": "text", "switch": "text", "vgg": "image"}
COUPLES = {  # models in whose forward pass a sample's outputs depend on the batch
    "switch": "the capacity of experts is that of a batch",
    "vgg": "batch norm takes the statistics of a batch",
}
SUITS = {  # what to choose beside a model
    "bert": "selection=mini",
    "switch": "selection=experts_mini",
    "vgg": "selection=filters_mini train=images_mini",
}


def validate(config: Config) -> None:
    """Refuse what cannot work, before any work: first each value alone, then each group, then all
    together.

    Raises:
        UserError: In one sentence, naming the key and the remedy.
    """
    groups = {"": config, **{f"{group}.": getattr(config, group) for group in GROUPS}}
    for prefix, node in groups.items():
        for f in fields(node):
            given = getattr(node, f.name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and "bounds" in f.metadata:
                    between(f"{prefix}{f.name}", value, *f.metadata["bounds"])
                elif value is not None and "options" in f.metadata:
                    one_of(f"{prefix}{f.name}", value, f.metadata["options"])
    for group in GROUPS:
        getattr(config, group).check()
    check_together(config)


def check_together(config: Config) -> None:
    """Refuse names that are none, and groups that do not fit each other."""
    one_line("runs", config.runs)
    if not re.fullmatch(r"\w[\w.,=+@-]{0,99}", config.name):
        raise UserError(
            f"name={config.name!r} is no name of one folder: give up to 100 letters, digits and "
            ". , = + @ - _."
        )
    _check_model(config)
    _check_units(config)
    budget, pflops = config.method.budget, config.train.pflops
    for mark in config.train.marks:
        if mark > budget * pflops * (1 + 1e-9):
            raise UserError(
                f"train.marks={mark} is beyond the run's end (method.budget={budget} of "
                f"train.pflops={pflops}): lower it, or set train.marks=[]."
            )


def _check_model(config: Config) -> None:
    model, dataset = config.model, config.dataset
    for key, value, own, group in (
        ("model.family", model.family, type(model).family, "model"),
        ("dataset.modality", dataset.modality, type(dataset).modality, "dataset"),
    ):
        if value != own:
            given = getattr(config, group).name
            raise UserError(f"{key}={value} contradicts {group}={given}: choose another {group}.")
    if MODALITY[model.family] != dataset.modality:
        wanted = "a text dataset" if MODALITY[model.family] == "text" else "a dataset of images"
        raise UserError(
            f"model={model.family} cannot read dataset={dataset.name}: choose {wanted}."
        )
    if isinstance(model, VggConfig) and 2 ** len(model.stages) > dataset.size:
        raise UserError(
            f"model.stages={model.stages} halves an image {len(model.stages)} times, but "
            f"dataset.size={dataset.size} has too few pixels: give fewer stages or larger "
            "images."
        )
    for name in config.analysis:
        one_of("analysis", name, ANALYSES)
        if isinstance(model, VggConfig) and name in UNFIT_FOR_IMAGES:
            raise UserError(
                f"analysis=[{name}] {UNFIT_FOR_IMAGES[name]}: leave it out for "
                f"model={model.family}."
            )


def _check_units(config: Config) -> None:
    model, selection, method = config.model, config.selection, config.method
    kinds = KINDS[model.family]
    if isinstance(model, SwitchConfig) and model.switch_every == 1:
        # Every such layer has experts instead
        kinds = tuple(kind for kind in kinds if kind != "ffn")
    for kind in selection.units:
        if kind not in kinds and kind in itertools.chain(*KINDS.values()):
            raise UserError(
                f"selection.units={kind} is none of model={model.name}: add {SUITS[model.family]}."
            )
        one_of("selection.units", kind, kinds)
    if selection.reduction == "online" and model.family in COUPLES:
        raise UserError(
            "selection.reduction=online cannot tell apart the samples of a training step of "
            f"model={model.family}, which its forward pass couples: choose random."
        )
    if config.train.accumulation > 1 and model.family in COUPLES:
        raise UserError(
            f"train.accumulation={config.train.accumulation} changes the gradient of "
            f"model={model.family}, where {COUPLES[model.family]}: set train.accumulation=1 and "
            "lower train.batch if memory is short."
        )
    if method.policy == "random" and selection.share is None:
        raise UserError(
            f"method={method.name} draws a share of the units: set selection.share to it and "
            "selection.alpha=null."
        )
