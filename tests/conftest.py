"""What all tests share: one thread, one cache of prepared data, and whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)  # before the engine is imported, which notes the number


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of token caches that tests may share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted runs by their overrides, each made once: ``short_runs.Finished``."""
    from short_runs import small

    from mat.suite import engine

    made: dict[tuple[str, ...], tuple[Any, Path]] = {}

    def run(*overrides: str, steps: int = 26, modality: str = "text") -> tuple[Any, Path]:
        key = (*overrides, str(steps), modality)
        if key not in made:
            config = small(cache, *overrides, steps=steps, modality=modality)
            folder = tmp_path_factory.mktemp("finished") / "run"
            assert engine.run(config, folder) is not None
            made[key] = config, folder
        return made[key]

    return run
