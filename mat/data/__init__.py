"""Datasets: from a configuration to reproducible batches."""

from mat.config import DatasetConfig
from mat.data.tokens import MaskedText
from mat.interface import Data


def load(config: DatasetConfig, seed: int) -> Data:
    """The dataset of a configuration.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training data and of its masks or augmentation.

    Raises:
        UserError: If the data cannot be had.
    """
    return MaskedText.load(config, seed)
