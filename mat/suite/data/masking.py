"""Which tokens a masked language model has to predict, reproducibly (Devlin et al. 2019, 3.1).

Every sequence hides the same number M of tokens, so that a step's FLOPs do not depend on chance.
Of the hidden tokens 80 % become [MASK], 10 % a random piece, 10 % stay.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mat.suite.interface import Batch

MASK_TO_MASK, MASK_TO_RANDOM = 0.8, 0.1


@dataclass
class MaskedBatch(Batch):
    """Sequences with hidden tokens.

    Attributes:
        inputs: (B, T) ids, some replaced.
        targets: (P,) original ids of the hidden tokens, P = B * M.
        positions: (P,) their indices into the flattened B * T tokens, sorted by sample.
    """

    positions: Tensor

    @property
    def length(self) -> int:
        """T."""
        return self.inputs.shape[1]

    def take(self, rows: Tensor) -> "MaskedBatch":
        """The samples with these numbers, masks included."""
        within = self.positions.view(self.samples, -1) % self.length  # (B, M)
        first = torch.arange(len(rows), device=rows.device)[:, None] * self.length  # (rows, 1)
        targets = self.targets.view(self.samples, -1)[rows].flatten()  # (rows * M,)
        return MaskedBatch(self.inputs[rows], targets, (within[rows] + first).flatten())

    def split(self, parts: int) -> list["MaskedBatch"]:
        """Equal consecutive parts (fewer when there are fewer samples than parts)."""
        rows = torch.arange(self.samples, device=self.inputs.device)
        return [self.take(part) for part in rows.tensor_split(min(parts, self.samples))]


def masked_per_sequence(length: int, mask_share: float) -> int:
    """M: how many tokens of a sequence are hidden."""
    return max(1, round(length * mask_share))


def mask(
    sequences: NDArray[np.uint16],
    mask_share: float,
    mask_id: int,
    first_piece: int,
    vocabulary: int,
    key: list[int],
) -> MaskedBatch:
    """Hide tokens of a batch.

    Args:
        sequences: (B, T) token ids.
        mask_share: Share of tokens to hide.
        mask_id: Id of [MASK].
        first_piece: Ids below are special tokens, which never replace another.
        vocabulary: Number of ids.
        key: Seed of this batch's randomness; the same key gives the same batch.
    """
    random = np.random.default_rng(key)
    batch, length = sequences.shape
    masked = masked_per_sequence(length, mask_share)
    lowest = np.argpartition(random.random((batch, length)), masked - 1, axis=1)[:, :masked]
    positions = (np.sort(lowest, axis=1) + np.arange(batch)[:, None] * length).reshape(-1)  # (P,)
    tokens = sequences.astype(np.int64).reshape(-1)  # (B * T,)
    targets = tokens[positions]
    draw = random.random(len(positions))
    pieces = random.integers(first_piece, vocabulary, len(positions))
    replaced = np.where(draw < MASK_TO_MASK + MASK_TO_RANDOM, pieces, targets)
    tokens[positions] = np.where(draw < MASK_TO_MASK, mask_id, replaced)
    inputs = tokens.reshape(batch, length)
    return MaskedBatch(*(torch.from_numpy(a) for a in (inputs, targets, positions)))
