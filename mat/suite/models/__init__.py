"""From a model's configuration to the model."""

from mat.suite.bert import Bert
from mat.suite.config import BertConfig, Config, ImageConfig, SwitchConfig, TextConfig, VggConfig
from mat.suite.interface import UnitModel
from mat.suite.switch import Switch
from mat.suite.vgg import Vgg


def build(config: Config, outputs: int) -> UnitModel:
    """The model of a configuration for data with so many outputs, on the CPU.

    Its weights are drawn from torch's random state.
    """
    model, dataset = config.model, config.dataset
    if isinstance(model, VggConfig):
        assert isinstance(dataset, ImageConfig)
        return Vgg(model, outputs, dataset.channels, dataset.size, config.hardware)
    assert isinstance(model, BertConfig) and isinstance(dataset, TextConfig)
    if isinstance(model, SwitchConfig):
        return Switch(model, outputs, dataset.length)
    return Bert(model, outputs, dataset.length)
