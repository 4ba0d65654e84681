"""Text as masked sequences of WordPiece tokens, the pieces learned from the training split."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mat.suite.config import TextConfig
from mat.suite.data.base import EVALUATION, FEW, PROBE, Data, entropy, spaced
from mat.suite.data.cache import prepared
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.data.source import Column, origin, read, source_key
from mat.suite.errors import UserError

SPLITS = ("train", "validation", "test")
TEXT = Column(("text",), "strings", "large_binary")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNKNOWN = "<unk>"  # WikiText v1's rare words; the tokenizer's own unknown piece stands for it
LITERAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]")  # in a text these are words in brackets
LONGEST = 100  # characters; to WordPiece, longer words are unknown
ALPHABET = 1000  # characters that pieces are made of; a word with a rarer one is unknown
BLOCK = 2**14  # evaluation sequences that are masked at once


def lines(config: TextConfig, split: str, doing: str) -> Iterator[list[str]]:
    """The lines of a split, some at a time; UserError if they cannot be read."""
    for where, first, (column,) in read(config, split, doing, TEXT):
        piece = [line or b"" for line in column.to_pylist()]
        try:
            yield [line.decode() for line in piece]
        except UnicodeDecodeError as error:
            row = first + piece.index(error.object)
            raise UserError(f"{where}, row {row}, is no UTF-8 text: convert it.") from error


def _tokenizer(vocabulary: dict[str, int] | None = None) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL) if vocabulary else [])
    return tokenizer


def train_tokenizer(text: Iterable[list[str]], vocabulary: int) -> Any:
    """A WordPiece tokenizer of at most so many pieces; the same text gives the same one.

    Left to itself the trainer numbers the characters inside words ("##a") in the order of a
    randomly seeded hash map, and breaks ties between merges by these numbers. Here the alphabet is
    counted first and its order given. Too long words are left out: it takes quadratic time in them.
    """
    from tokenizers import trainers

    tokenizer = _tokenizer()
    split, normalise = tokenizer.pre_tokenizer.pre_tokenize_str, tokenizer.normalizer.normalize_str
    spaced_words: Counter[str] = Counter()
    for piece in text:
        for line in piece:
            spaced_words.update(line.replace(UNKNOWN, " ").split())
    words: Counter[str] = Counter()
    for spaced_word, count in spaced_words.items():
        for word, _ in split(normalise(spaced_word)):
            words[word] += count * (len(word) <= LONGEST)
    characters: Counter[str] = Counter()
    for word, count in words.items():
        characters.update(dict.fromkeys(word, count))
    alphabet = sorted(characters, key=lambda c: (-characters[c], c))[:ALPHABET]
    inside = {c for word in words for c in word[1:]}
    starts = [f"##{c}" for c in sorted(inside.intersection(alphabet))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *starts],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    return _tokenizer(tokenizer.get_vocab())  # in which "##a" is no special token


def _repeated(words: Counter[str], most: int = 1000) -> Iterator[str]:
    """Every word as often as it was counted, at most so often in a string."""
    for word, count in words.items():
        for first in range(0, count, most):
            yield f"{word} " * min(most, count - first)


def encode(config: TextConfig, folder: Path) -> None:
    """Write ``tokenizer.json``, and ``<split>.bin`` with all ids of a split, uint16."""
    tokenizer = train_tokenizer(lines(config, "train", "counting words of"), config.vocabulary)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    for split in SPLITS:
        with open(folder / f"{split}.bin", "wb") as file:
            for piece in lines(config, split, "tokenising"):
                plain = [LITERAL.sub(r"[ \1 ]", line) for line in piece if line.strip()]
                known = [line.replace(UNKNOWN, "[UNK]") for line in plain]
                for row in tokenizer.encode_batch_fast(known):
                    file.write(np.array(row.ids, np.uint16).tobytes())
            if file.tell() == 0:
                raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")


class MaskedText(Data):
    """A tokenised corpus as reproducible masked batches; the tokens are memory-mapped.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training sequences and of their masks.

    Attributes:
        sequences: Packed sequences (N, T) by split; the remainder of a split is left out.

    Raises:
        UserError: If the data cannot be had, or there are fewer tokens or sequences than wanted.
    """

    def __init__(self, config: TextConfig, seed: int) -> None:
        identity = [config.vocabulary, *source_key(config, SPLITS)]
        folder, fingerprint = prepared(config, identity, partial(encode, config))
        pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        self.config = config
        self.sequences: dict[str, NDArray[np.uint16]] = {}
        for split in SPLITS:
            ids = np.memmap(folder / f"{split}.bin", np.uint16, "r")
            count = len(ids) // config.length
            if count == 0:
                there = f"the {split} split of {origin(config)} ({len(ids)} tokens)"
                raise UserError(
                    f"dataset.length={config.length} is longer than {there}: choose a smaller one."
                )
            self.sequences[split] = ids[: count * config.length].reshape(count, -1)  # (N, T)
        few, count = config.train_sequences, len(self.sequences["train"])
        if few is not None:
            if few > count:
                there = f"the {count} there are"
                raise UserError(f"dataset.train_sequences={few} exceeds {there}: choose fewer.")
            rows = np.random.default_rng([seed, FEW]).permutation(count)[:few]
            self.sequences["train"] = self.sequences["train"][np.sort(rows)]
        super().__init__(few or count, seed, len(pieces), fingerprint)

    def train_batch(self, step: int, batch: int) -> tuple[MaskedBatch, int]:
        """The batch of a step and its epoch; the last batch of an epoch may be short."""
        rows, key, epoch = self._train_rows(step, batch)
        return self._masked(self.sequences["train"][rows], key), epoch

    def evaluation_batches(
        self, split: str, samples: int | None, batch: int
    ) -> Iterator[MaskedBatch]:
        """Evenly spaced samples (all when None); masks depend on neither seed nor batch size."""
        whole = self.sequences[split]
        chosen = spaced(samples, len(whole))
        for block, first in enumerate(range(0, len(whole), BLOCK)):
            rows = chosen[(first <= chosen) & (chosen < first + BLOCK)] - first
            if len(rows):
                key = [EVALUATION, SPLITS.index(split), block]
                masked = self._masked(whole[first : first + BLOCK], key)
                yield from masked.take(torch.from_numpy(rows)).split(-(-len(rows) // batch))

    def probe_batch(self, samples: int) -> MaskedBatch:
        """The estimator's samples, drawn once from the training split."""
        rows = self._probe_rows(samples)
        return self._masked(self.sequences["train"][rows], [self.seed, PROBE, 1])

    def facts(self) -> dict[str, float]:
        """Entropy in nats of the validation tokens: the loss of a model that ignores context."""
        whole, counts = self.sequences["validation"], np.zeros(self.outputs, np.int64)
        for first in range(0, len(whole), BLOCK):
            block = whole[first : first + BLOCK].reshape(-1)  # (sequences * T,)
            counts += np.bincount(block, minlength=self.outputs)
        return {"unigram_entropy": entropy(counts)}

    def _masked(self, sequences: NDArray[np.uint16], key: list[int]) -> MaskedBatch:
        mask_id, first = SPECIAL.index("[MASK]"), len(SPECIAL)
        return mask(sequences, self.config.mask_share, mask_id, first, self.outputs, key)
