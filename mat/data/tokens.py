"""WordPiece tokens: trained on the training split, cached on disk, packed into sequences.

The cache is keyed by a hash of the data's identity and the settings, and written atomically: a folder that exists is
complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mat.config import DatasetConfig
from mat.data.masking import MaskedBatch, mask
from mat.data.text import SPLITS, Splits, load_text, origin, source_key
from mat.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CACHE_FORMAT = 1
TRAIN, EVALUATION, PROBE, FEW = 0, 1, 2, 3  # streams of randomness, see MaskedText.key


def encode(config: DatasetConfig, splits: Splits, folder: Path) -> None:
    """Train the tokenizer on the training split and write ``tokenizer.json`` and one ``<split>.npy`` per split."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=config.vocabulary, special_tokens=list(SPECIAL), show_progress=False)
    # WikiText v1 writes rare words as the literal <unk>; it stands for the tokenizer's own unknown piece.
    known = (line.replace("<unk>", " ") for line in splits["train"])
    tokenizer.train_from_iterator(known, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    for split in SPLITS:
        lines = [line.replace("<unk>", "[UNK]") for line in splits[split] if line.strip()]
        ids = [i for encoding in tokenizer.encode_batch_fast(lines) for i in encoding.ids]
        np.save(folder / f"{split}.npy", np.array(ids, dtype=np.uint16))


def cached_tokens(config: DatasetConfig) -> Path:
    """The cache folder of a corpus; made if it is not there.

    Args:
        config: The dataset's configuration.

    Returns:
        A folder with ``tokenizer.json`` and ``train.npy``, ``validation.npy``, ``test.npy``.

    Raises:
        UserError: If the data cannot be had.
    """
    identity = [CACHE_FORMAT, config.name, config.vocabulary, *source_key(config)]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    root = Path(config.cache).expanduser()
    folder = root / f"{config.name}-{config.vocabulary}-{key}"
    if folder.is_dir():
        return folder
    splits = load_text(config)
    root.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
    try:
        encode(config, splits, unfinished)
        try:
            os.replace(unfinished, folder)
        except OSError:  # another run of the sweep was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@dataclass
class MaskedText:
    """A tokenised corpus as reproducible masked batches.

    Attributes:
        vocabulary: V, the number of pieces.
        sequences: Packed sequences (N, T) by split; the remainder of a split is left out.
    """

    config: DatasetConfig
    seed: int
    vocabulary: int
    mask_id: int
    sequences: dict[str, NDArray[np.uint16]]
    _order: tuple[int, NDArray[np.int64]] | None = None  # of the epoch that is being read

    @classmethod
    def load(cls, config: DatasetConfig, seed: int) -> "MaskedText":
        """Read the cache (made first if need be).

        Args:
            config: The dataset's configuration.
            seed: Seed of the order of the training data and its masks.

        Returns:
            The corpus.

        Raises:
            UserError: If the data cannot be had or a split is shorter than a sequence.
        """
        folder = cached_tokens(config)
        pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        sequences = {}
        for split in SPLITS:
            ids: NDArray[np.uint16] = np.load(folder / f"{split}.npy", mmap_mode="r")
            count = len(ids) // config.length
            if count == 0:
                raise UserError(
                    f"dataset.length={config.length} is longer than the {split} split of {origin(config)} "
                    f"({len(ids)} tokens): choose a smaller dataset.length."
                )
            sequences[split] = ids[: count * config.length].reshape(count, config.length)
        few, count = config.train_sequences, len(sequences["train"])
        if few is not None:
            if few > count:
                raise UserError(f"dataset.train_sequences={few} exceeds the {count} there are: choose fewer, or null.")
            rows = np.random.default_rng([seed, FEW]).permutation(count)[:few]
            sequences["train"] = sequences["train"][np.sort(rows)]
        return cls(config, seed, len(pieces), pieces["[MASK]"], sequences)

    @property
    def outputs(self) -> int:
        """V."""
        return self.vocabulary

    def steps_per_epoch(self, batch: int) -> int:
        """Batches of this size in an epoch, a short last one included."""
        return -(-len(self.sequences["train"]) // batch)

    def train_batch(self, step: int, batch: int) -> tuple[MaskedBatch, int]:
        """The batch of a step and its epoch; every epoch is a new permutation, its last batch may be short."""
        count = len(self.sequences["train"])
        epoch, within = divmod(step, self.steps_per_epoch(batch))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, TRAIN, epoch]).permutation(count)
        rows = self._order[1][within * batch : (within + 1) * batch]
        return self._masked(self.sequences["train"][np.sort(rows)], [self.seed, TRAIN, epoch, within]), epoch

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> list[MaskedBatch]:
        """Evenly spaced samples of a split; a sample's mask is the same for all methods, seeds and batch sizes."""
        whole = self._masked(self.sequences[split], [EVALUATION, SPLITS.index(split)])
        count = min(samples or whole.samples, whole.samples)
        return whole.take(torch.arange(count) * whole.samples // count).split(-(-count // batch))

    def probe_batch(self, samples: int) -> MaskedBatch:
        """The estimator's samples, drawn once from the training split; the same at every selection."""
        count = len(self.sequences["train"])
        if samples > count:
            raise UserError(f"selection.samples={samples} exceeds the {count} training sequences: choose fewer.")
        rows = np.sort(np.random.default_rng([self.seed, PROBE]).permutation(count)[:samples])
        return self._masked(self.sequences["train"][rows], [self.seed, PROBE, 1])

    def facts(self) -> dict[str, float]:
        """The unigram entropy of the validation split, in nats."""
        return {"unigram_entropy": self.unigram_entropy()}

    def unigram_entropy(self, split: str = "validation") -> float:
        """Cross-entropy in nats of a split under its own piece frequencies: what ignoring the context achieves."""
        counts = np.bincount(self.sequences[split].reshape(-1), minlength=self.vocabulary)
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    def _masked(self, sequences: NDArray[np.uint16], key: list[int]) -> MaskedBatch:
        return mask(sequences, self.config.mask_share, self.mask_id, len(SPECIAL), self.vocabulary, key)
