"""From a model's configuration to the model."""

from mat.bert import Bert
from mat.config import BertConfig, Config, VggConfig
from mat.interface import UnitModel
from mat.vgg import Vgg


def build(config: Config, outputs: int) -> UnitModel:
    """The model of a configuration, initialised from torch's random state.

    Args:
        config: The run's configuration.
        outputs: Number of word pieces or classes.

    Returns:
        The model, on the CPU.
    """
    model, dataset = config.model, config.dataset
    if isinstance(model, VggConfig):
        return Vgg(model, outputs, dataset.channels, dataset.size, config.hardware)
    assert isinstance(model, BertConfig)
    return Bert(model, outputs, dataset.length)
