"""Which samples a batch holds: reproducible from the seed and the step, for all kinds of data."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mat.suite.errors import UserError
from mat.suite.interface import Batch

Rows = NDArray[np.int64]
TRAIN, EVALUATION, PROBE, FEW = 0, 1, 2, 3  # streams of randomness; a key begins with the seed


class Data:
    """A dataset as reproducible batches.

    Args:
        count: Number of training samples.
        seed: Of their order, and of what else is drawn for them.
        outputs: What a model has to tell apart: number of word pieces V, or of classes.
        fingerprint: Hash of the prepared data of all splits, the same wherever they lie.
    """

    def __init__(self, count: int, seed: int, outputs: int, fingerprint: str) -> None:
        self.count, self.seed, self.outputs, self.fingerprint = count, seed, outputs, fingerprint
        self._epoch: tuple[int, Rows] | None = None  # the present one, and its permutation

    def steps_per_epoch(self, batch: int) -> int:
        """Batches of this size in an epoch, a short last one included."""
        return -(-self.count // batch)

    def train_batch(self, step: int, batch: int) -> tuple[Batch, int]:
        """The batch of a step and its epoch; every epoch is a new permutation."""
        raise NotImplementedError

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> Iterator[Batch]:
        """Evenly spaced samples of a split (all when None), the same for all seeds."""
        raise NotImplementedError

    def probe_batch(self, samples: int) -> Batch:
        """The estimator's samples, drawn once from the training split."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """What is worth knowing beside every result, such as the unigram entropy."""
        raise NotImplementedError

    def _train_rows(self, step: int, batch: int) -> tuple[Rows, list[int], int]:
        """The samples of a step, sorted; the key of what else is drawn for them; the epoch."""
        epoch, within = divmod(step, self.steps_per_epoch(batch))
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.default_rng([self.seed, TRAIN, epoch])
            self._epoch = epoch, random.permutation(self.count)
        rows = self._epoch[1][within * batch : (within + 1) * batch]
        return np.sort(rows), [self.seed, TRAIN, epoch, within], epoch

    def _probe_rows(self, samples: int) -> Rows:
        """The probe's samples, sorted; UserError if there are fewer."""
        if samples > self.count:
            raise UserError(
                f"selection.samples={samples} exceeds the {self.count} training samples: "
                "choose fewer."
            )
        random = np.random.default_rng([self.seed, PROBE])
        return np.sort(random.permutation(self.count)[:samples])


def spaced(samples: int | None, total: int) -> Rows:
    """Evenly spaced samples of a split; all when None or more than there are."""
    count = min(samples or total, total)
    return np.arange(count) * total // count


def entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the shares that the counts make up."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
