"""WordPiece tokens: trained on the training split, cached on disk, packed into sequences.

The text streams through in pieces and the tokens are memory-mapped, so that a corpus may be larger than memory.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mat.suite.config import TextConfig
from mat.suite.data.base import EVALUATION, FEW, PROBE, Data, entropy, spaced
from mat.suite.data.cache import cached, progress, save_rows
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.data.sources import origin
from mat.suite.data.text import SPLITS, Lines, open_text, text_key
from mat.suite.errors import UserError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNKNOWN = "<unk>"  # WikiText v1 writes rare words so; it stands for the tokenizer's own unknown piece
CACHE_FORMAT = 1
ALPHABET = 1000  # characters that pieces are made of; a word with a rarer one is unknown
BLOCK = 2**14  # evaluation sequences that are masked at once


def _tokenizer(vocabulary: dict[str, int] | None = None) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL) if vocabulary else [])
    return tokenizer


def train_tokenizer(lines: Lines, vocabulary: int) -> Any:
    """A WordPiece tokenizer; the same text gives the same one.

    Left to itself the trainer numbers the characters inside words ("##a") in the order of a randomly seeded hash map,
    and breaks ties between merges by these numbers. Here the alphabet is counted first and its order given.

    Args:
        lines: The training text.
        vocabulary: Wanted number of pieces.
    """
    from tokenizers import trainers

    tokenizer = _tokenizer()
    words: Counter[str] = Counter()
    for piece in progress(lines, "counting words"):
        for line in piece:
            words.update(line.replace(UNKNOWN, " ").split())
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(word)):
            counts.update(dict.fromkeys(part, count))
            inside.update(part[1:])
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET]
    starts = [f"##{c}" for c in sorted(inside.intersection(alphabet))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL, *starts], initial_alphabet=alphabet,
        limit_alphabet=len(alphabet), show_progress=False,
    )  # fmt: skip
    known = ([line.replace(UNKNOWN, " ") for line in piece] for piece in progress(lines, "learning word pieces"))
    tokenizer.train_from_iterator(known, trainer)
    return _tokenizer(tokenizer.get_vocab())  # in which "##a" is no special token


def encoded(tokenizer: Any, lines: Lines, label: str) -> Iterator[NDArray[np.uint16]]:
    """The ids of the lines, in pieces; blank lines have none."""
    for piece in progress(lines, label):
        kept = [line.replace(UNKNOWN, "[UNK]") for line in piece if line.strip()]
        ids = [np.array(line.ids, dtype=np.uint16) for line in tokenizer.encode_batch_fast(kept)]
        yield np.concatenate([*ids, np.empty(0, np.uint16)])


def encode(config: TextConfig, folder: Path) -> None:
    """Train the tokenizer on the training split and write ``tokenizer.json`` and one ``<split>.npy`` per split."""
    text = open_text(config)
    tokenizer = train_tokenizer(text["train"], config.vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    for split in reversed(SPLITS):  # the long one last
        label = f"tokenising {config.name} {split}"
        if not save_rows(folder / f"{split}.npy", encoded(tokenizer, text[split], label), np.uint16):
            raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")


def cached_tokens(config: TextConfig) -> Path:
    """The folder that :func:`encode` wrote of a corpus; made if it is not there.

    Raises:
        UserError: If the data cannot be had.
    """
    identity = [CACHE_FORMAT, config.name, config.vocabulary, *text_key(config)]
    return cached(config.cache, f"{config.name}-{config.vocabulary}", identity, lambda folder: encode(config, folder))


class MaskedText(Data):
    """A tokenised corpus as reproducible masked batches.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training sequences and of their masks.
        outputs: V, the number of pieces.
        mask_id: Id of [MASK].
        sequences: Packed sequences (N, T) by split; the remainder of a split is left out.
    """

    def __init__(
        self, config: TextConfig, seed: int, outputs: int, mask_id: int, sequences: dict[str, NDArray[np.uint16]]
    ) -> None:
        super().__init__(len(sequences["train"]), seed, outputs)
        self.config, self.mask_id, self.sequences = config, mask_id, sequences

    @classmethod
    def load(cls, config: TextConfig, seed: int) -> "MaskedText":
        """Read the cache (made first if need be).

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

    def train_batch(self, step: int, batch: int) -> tuple[MaskedBatch, int]:
        """The batch of a step and its epoch; every epoch is a new permutation, its last batch may be short."""
        rows, key, epoch = self._train_rows(step, batch)
        return self._masked(self.sequences["train"][rows], key), epoch

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> Iterator[MaskedBatch]:
        """Evenly spaced samples of a split; a sample's mask is the same for all methods, seeds and batch sizes."""
        whole = self.sequences[split]
        chosen = spaced(samples, len(whole))
        for block, first in enumerate(range(0, len(whole), BLOCK)):
            rows = chosen[(first <= chosen) & (chosen < first + BLOCK)] - first
            if len(rows):
                masked = self._masked(whole[first : first + BLOCK], [EVALUATION, SPLITS.index(split), block])
                yield from masked.take(torch.from_numpy(rows)).split(-(-len(rows) // batch))

    def probe_batch(self, samples: int) -> MaskedBatch:
        """The estimator's samples, drawn once from the training split; the same at every selection."""
        return self._masked(self.sequences["train"][self._probe_rows(samples)], [self.seed, PROBE, 1])

    def facts(self) -> dict[str, float]:
        """The entropy of the validation split's pieces in nats: the loss of a model that ignores the context."""
        whole, counts = self.sequences["validation"], np.zeros(self.outputs, np.int64)
        for first in range(0, len(whole), BLOCK):
            counts += np.bincount(whole[first : first + BLOCK].reshape(-1), minlength=self.outputs)
        return {"unigram_entropy": entropy(counts)}

    def _masked(self, sequences: NDArray[np.uint16], key: list[int]) -> MaskedBatch:
        return mask(sequences, self.config.mask_share, self.mask_id, len(SPECIAL), self.outputs, key)
