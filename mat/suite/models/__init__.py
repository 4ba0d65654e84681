"""From a configuration to the model and its optimiser."""

from torch import nn

import mat.suite.gating  # noqa: F401  (registers where these models have units)
from mat.optim import SGD, AdamW, UnitOptimiser
from mat.suite.config import (
    BertConfig,
    Config,
    ImageConfig,
    SwitchConfig,
    TextConfig,
    TrainConfig,
    VggConfig,
)
from mat.suite.interface import Model
from mat.suite.models.bert import Bert
from mat.suite.models.switch import Switch
from mat.suite.models.vgg import Vgg


def build(config: Config, outputs: int) -> Model:
    """The model of a configuration for data with so many outputs, on the CPU.

    Its weights are drawn from torch's random state.
    """
    model, dataset = config.model, config.dataset
    if isinstance(model, VggConfig):
        assert isinstance(dataset, ImageConfig)
        return Vgg(model, outputs, dataset.channels, dataset.size)
    assert isinstance(model, BertConfig) and isinstance(dataset, TextConfig)
    if isinstance(model, SwitchConfig):
        return Switch(model, outputs, dataset.length)
    return Bert(model, outputs, dataset.length)


def build_optimiser(model: nn.Module, train: TrainConfig) -> UnitOptimiser:
    """The optimiser that a recipe names; matrices and kernels decay, biases and norms do not."""
    named = list(model.named_parameters())
    decays = [p for name, p in named if p.dim() >= 2 and not name.endswith("bias")]
    others = [p for name, p in named if p.dim() < 2 or name.endswith("bias")]
    groups = [
        {"params": decays, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if train.optimiser == "sgd":
        return SGD(groups, train.lr, train.momentum, compact=True)
    betas = train.betas[0], train.betas[1]
    return AdamW(groups, train.lr, betas, train.eps, compact=True)
