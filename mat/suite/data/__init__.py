"""Datasets: from a configuration to reproducible batches."""

from mat.suite.config import DatasetConfig, ImageConfig, TextConfig
from mat.suite.data.images import Images
from mat.suite.data.tokens import MaskedText


def load(config: DatasetConfig, seed: int) -> Images | MaskedText:
    """The dataset of a configuration, prepared first if need be.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training samples and of their masks or augmentation.

    Raises:
        UserError: If the data cannot be had.
    """
    if isinstance(config, ImageConfig):
        return Images(config, seed)
    assert isinstance(config, TextConfig)
    return MaskedText(config, seed)
