"""What all tests share: one thread, one cache of prepared data, and whole runs."""

from pathlib import Path

import pytest
import torch
from short_runs import Finished, small

from mat.suite import engine
from mat.suite.config import Config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of token caches that tests may share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Uninterrupted runs by their overrides, each made once."""
    made: dict[tuple[str, ...], tuple[Config, Path]] = {}

    def run(*overrides: str, steps: int = 26, modality: str = "text") -> tuple[Config, Path]:
        key = (*overrides, str(steps), modality)
        if key not in made:
            config = small(cache, *overrides, steps=steps, modality=modality)
            folder = tmp_path_factory.mktemp("finished") / "run"
            assert engine.run(config, folder) is not None
            made[key] = config, folder
        return made[key]

    return run
