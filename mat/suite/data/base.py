"""Which samples a batch holds: reproducible from the seed and the step, for all kinds of data."""

import numpy as np
from numpy.typing import NDArray

from mat.suite.errors import UserError

Rows = NDArray[np.int64]
TRAIN, EVALUATION, PROBE, FEW = 0, 1, 2, 3  # streams of randomness, part of every key


class Data:
    """What all datasets share; every epoch takes the training samples in a new order.

    Attributes:
        count: Number of training samples.
        seed: Of their order, and of what else is drawn for them.
        outputs: What a model has to tell apart: number of word pieces V, or of classes.
        fingerprint: Hash of the prepared data of all splits, the same wherever they lie.
    """

    def __init__(self, count: int, seed: int, outputs: int, fingerprint: str = "") -> None:
        self.count, self.seed, self.outputs, self.fingerprint = count, seed, outputs, fingerprint
        self._epoch: tuple[int, Rows] | None = None  # the present one, and its permutation

    def steps_per_epoch(self, batch: int) -> int:
        """Batches of this size in an epoch, a short last one included."""
        return -(-self.count // batch)

    def _train_rows(self, step: int, batch: int) -> tuple[Rows, list[int], int]:
        """The samples of a step, sorted; the key of what else is drawn for them; the epoch."""
        epoch, within = divmod(step, self.steps_per_epoch(batch))
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, TRAIN, epoch])
            self._epoch = epoch, random.permutation(self.count)
        rows = self._epoch[1][within * batch : (within + 1) * batch]
        return np.sort(rows), [self.seed, TRAIN, epoch, within], epoch

    def _probe_rows(self, samples: int) -> Rows:
        """The estimator's samples, sorted; UserError if there are fewer."""
        if samples > self.count:
            there = f"the {self.count} training samples"
            raise UserError(f"selection.samples={samples} exceeds {there}: choose fewer.")
        random = np.random.default_rng([self.seed, PROBE])
        return np.sort(random.permutation(self.count)[:samples])


def spaced(samples: int | None, total: int) -> Rows:
    """Evenly spaced samples of a split; all when None or more than there are."""
    count = min(samples or total, total)
    return np.arange(count) * total // count


def evenly(labels: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """So many samples, evenly spaced within each class, as a mask (N,)."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[spaced(count, len(labels))]] = True
    return chosen


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the shares that the counts make up."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
