"""Whether a run fits into the machine, asked before anything is allocated."""

from pathlib import Path

import torch

from mat.suite.config import BertConfig, Config
from mat.suite.errors import UserError
from mat.suite.models import build

COPIES = 4  # of every parameter: itself, its gradient, and two moments
KEPT = 2  # outputs of a layer as wide as the model, at least, that the backward pass needs


def check_memory(config: Config, outputs: int) -> None:
    """Refuse a run whose parameters and activations cannot fit; what passes may still be too large.

    Args:
        config: The run's configuration.
        outputs: What a model has to tell apart: number of word pieces V, or of classes.

    Raises:
        UserError: If even the least it needs is more than there is.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(config, outputs).parameters())
    model, dataset, train = config.model, config.dataset, config.train
    samples = max(train.batch // train.accumulation, train.eval_batch if train.eval_samples else 1)
    if isinstance(model, BertConfig):
        values = samples * dataset.length * model.width * model.layers * KEPT
    else:
        values = samples * dataset.size**2 * sum(model.stages[0]) * KEPT
    needed, there = 4 * (COPIES * parameters + values), _available(config.hardware.device)
    if needed > there:
        what = "the model" if COPIES * parameters > values else "a batch"
        raise UserError(
            f"model={model.name} with train.batch={train.batch} needs at least "
            f"{needed / 2**30:.3g} GiB of memory, most of it for {what}, and there are "
            f"{there / 2**30:.3g}: choose smaller values."
        )


def _available(device: str) -> float:
    """Bytes of memory that are free; infinity where the system does not tell."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    free = [float("inf")]
    system, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if system.is_file():
        lines = system.read_text().splitlines()
        free += [1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    if group.is_file() and (limit := group.read_text().strip()) != "max":
        free.append(float(limit))
    return min(free)
