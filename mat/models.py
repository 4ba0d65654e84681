"""From a model's configuration to the model."""

from mat.bert import Bert
from mat.config import BertConfig, DatasetConfig, ModelConfig, SwitchConfig, TextConfig
from mat.interface import UnitModel
from mat.switch import Switch


def build(model: ModelConfig, dataset: DatasetConfig, outputs: int) -> UnitModel:
    """The model of a configuration, initialised from torch's random state.

    Args:
        model: The model's configuration.
        dataset: The dataset's, for the sequence length.
        outputs: Number of word pieces or classes.

    Returns:
        The model, on the CPU.
    """
    assert isinstance(model, BertConfig) and isinstance(dataset, TextConfig)
    if isinstance(model, SwitchConfig):
        return Switch(model, outputs, dataset.length)
    return Bert(model, outputs, dataset.length)
