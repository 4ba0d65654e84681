"""What all tests share: one thread, no data or accounts from the environment, one token cache per session."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of token caches that tests may share."""
    return tmp_path_factory.mktemp("cache")
