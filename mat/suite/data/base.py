"""What all kinds of data share: which samples a batch holds, reproducible from the seed, the epoch and the step."""

import hashlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mat.suite.errors import UserError
from mat.suite.interface import Batch

Rows = NDArray[np.int64]
TRAIN, EVALUATION, PROBE, FEW = 0, 1, 2, 3  # streams of randomness; keys begin with the seed unless all share it


class Data:
    """A dataset as reproducible batches.

    Args:
        count: Number of training samples.
        seed: Of their order, and of what else is drawn for them.
        outputs: What a model has to tell apart: number of word pieces V, or of classes.
    """

    def __init__(self, count: int, seed: int, outputs: int) -> None:
        self.count, self.seed, self.outputs = count, seed, outputs
        self._epoch: tuple[int, Rows] | None = None  # the one that is being read, and its permutation

    def steps_per_epoch(self, batch: int) -> int:
        """Batches of this size in an epoch, a short last one included."""
        return -(-self.count // batch)

    def train_batch(self, step: int, batch: int) -> tuple[Batch, int]:
        """The batch of a step and its epoch; every epoch is a new permutation."""
        raise NotImplementedError

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> Iterator[Batch]:
        """Evenly spaced samples of a split (all when None), the same for all methods and seeds."""
        raise NotImplementedError

    def probe_batch(self, samples: int) -> Batch:
        """The estimator's samples, drawn once from the training split; the same at every selection."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """What is worth knowing beside every result, such as the unigram entropy."""
        raise NotImplementedError

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the samples of all splits: a run goes on with the data it was begun with."""
        digest = hashlib.sha256()
        for splits in (v for _, v in sorted(vars(self).items()) if isinstance(v, dict)):
            for split, samples in sorted(splits.items()):
                digest.update(f"{split} {samples.shape} {samples.dtype}".encode())
                digest.update(np.ascontiguousarray(samples).data)
        return digest.hexdigest()

    def _train_rows(self, step: int, batch: int) -> tuple[Rows, list[int], int]:
        """The samples of a step, sorted; a key of its own for what else is drawn for them; the epoch."""
        epoch, within = divmod(step, self.steps_per_epoch(batch))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self.seed, TRAIN, epoch]).permutation(self.count)
        rows = self._epoch[1][within * batch : (within + 1) * batch]
        return np.sort(rows), [self.seed, TRAIN, epoch, within], epoch

    def _probe_rows(self, samples: int) -> Rows:
        """The probe's samples, sorted.

        Raises:
            UserError: If there are fewer.
        """
        if samples > self.count:
            raise UserError(f"selection.samples={samples} exceeds the {self.count} training samples: choose fewer.")
        return np.sort(np.random.default_rng([self.seed, PROBE]).permutation(self.count)[:samples])


def spaced(samples: int | None, total: int) -> Rows:
    """Evenly spaced samples of a split; all when None or more than there are."""
    count = min(samples or total, total)
    return np.arange(count) * total // count


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the shares that the counts make up."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
