"""What all kinds of data share: which samples a batch holds, reproducible from the seed, the epoch and the step."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mat.errors import UserError

Rows = NDArray[np.int64]
TRAIN, EVALUATION, PROBE, FEW = 0, 1, 2, 3  # streams of randomness; keys begin with the seed unless all share it


@dataclass
class Order:
    """The order of a training split.

    Attributes:
        count: Number of training samples.
        seed: Of the run.
    """

    count: int
    seed: int
    _epoch: tuple[int, Rows] | None = None  # the one that is being read

    def steps(self, batch: int) -> int:
        """Steps of an epoch; its last batch may be short."""
        return -(-self.count // batch)

    def rows(self, step: int, batch: int) -> tuple[Rows, list[int], int]:
        """The samples of a step, sorted; a key of its own for what else is drawn for them; the epoch.

        Every epoch is a new permutation.
        """
        epoch, within = divmod(step, self.steps(batch))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([self.seed, TRAIN, epoch]).permutation(self.count)
        rows = self._epoch[1][within * batch : (within + 1) * batch]
        return np.sort(rows), [self.seed, TRAIN, epoch, within], epoch

    def probe(self, samples: int) -> Rows:
        """The estimator's samples, drawn once; sorted.

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
