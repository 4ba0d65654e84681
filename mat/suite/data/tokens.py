"""Text as masked sequences of WordPiece tokens.

The pieces are learned from the training split. Text streams through in pieces and the tokens are
memory-mapped, so that a corpus may be larger than memory.
"""

import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mat.suite.config import TextConfig
from mat.suite.data.base import EVALUATION, FEW, PROBE, Data, entropy, spaced
from mat.suite.data.cache import prepared
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.data.source import PIECE, Column, is_packaged, origin, read, source_key
from mat.suite.errors import UserError

SPLITS = ("train", "validation", "test")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNKNOWN = "<unk>"  # WikiText v1's rare words; the tokenizer's own unknown piece stands for it
LITERAL = re.compile(r"\[(PAD|UNK|CLS|SEP|MASK)\]")  # in a text these are words in brackets
LONGEST = 100  # characters; to WordPiece, longer words are unknown
LONG = re.compile(rf"[^ \t\r\n]{{{LONGEST + 1},}}")
CACHE_FORMAT = 2
ALPHABET = 1000  # characters that pieces are made of; a word with a rarer one is unknown
BLOCK = 2**14  # evaluation sequences that are masked at once
Lines = Iterable[list[str]]


def _is_text(kind: Any) -> bool:
    return any(word in str(kind) for word in ("string", "binary")) and "<" not in str(kind)


TEXT = Column(("text",), "strings", _is_text)


def lines(config: TextConfig, split: str, doing: str) -> Iterator[list[str]]:
    """The lines of a split, some at a time.

    Raises:
        UserError: If they cannot be read.
    """
    if is_packaged(config):
        yield from _pydocs(split)
        return
    for where, first, (column,) in read(config, split, doing, TEXT):
        try:
            piece = [(line or b"") for line in column.cast("large_binary").to_pylist()]
            yield [line.decode() for line in piece]
        except UnicodeDecodeError as error:
            row = first + piece.index(error.object)
            raise UserError(f"{where}, row {row}, is no UTF-8 text: convert it.") from error


def _pydocs(split: str) -> Iterator[list[str]]:
    """English prose: ``pydoc_data.topics``, every topic in one split."""
    from pydoc_data.topics import topics

    tenths = {"validation": {8}, "test": {9}}.get(split, set(range(8)))
    names = [name for i, name in enumerate(sorted(topics)) if i % 10 in tenths]
    whole = [line for name in names for line in topics[name].splitlines()]
    for first in range(0, len(whole), PIECE):
        yield whole[first : first + PIECE]


def _tokenizer(vocabulary: dict[str, int] | None = None) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL) if vocabulary else [])
    return tokenizer


def train_tokenizer(read_lines: Callable[[str], Lines], vocabulary: int) -> Any:
    """A WordPiece tokenizer; the same text gives the same one.

    Left to itself the trainer numbers the characters inside words ("##a") in the order of a
    randomly seeded hash map, and breaks ties between merges by these numbers. Here the alphabet is
    counted first and its order given.

    Args:
        read_lines: Reads the training text anew; its argument says what for.
        vocabulary: Wanted number of pieces.
    """
    from tokenizers import trainers

    tokenizer = _tokenizer()

    def parts(word: str) -> list[str]:
        normal = tokenizer.normalizer.normalize_str(word)
        split = [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
        return [part for part in split if len(part) <= LONGEST]

    def known(line: str) -> str:
        """The line without unknown words: training takes time quadratic in a word's length."""
        return LONG.sub(lambda found: " ".join(parts(found[0])), line.replace(UNKNOWN, " "))

    words: Counter[str] = Counter()
    for piece in read_lines("counting words of"):
        for line in piece:
            words.update(known(line).split())
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for word, count in words.items():
        for part in parts(word):
            counts.update(dict.fromkeys(part, count))
            inside.update(part[1:])
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET]
    starts = [f"##{c}" for c in sorted(inside.intersection(alphabet))]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *starts],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    text = ([known(line) for line in piece] for piece in read_lines("learning word pieces of"))
    tokenizer.train_from_iterator(text, trainer)
    return _tokenizer(tokenizer.get_vocab())  # in which "##a" is no special token


def encoded(tokenizer: Any, text: Lines) -> Iterator[NDArray[np.uint16]]:
    """The ids of the lines, in pieces; blank lines have none."""
    for piece in text:
        known = [LITERAL.sub(r"[ \1 ]", line).replace(UNKNOWN, "[UNK]") for line in piece]
        rows = tokenizer.encode_batch_fast([line for line in known if line.strip()])
        yield np.concatenate([np.empty(0, np.uint16), *(np.array(r.ids, np.uint16) for r in rows)])


def encode(config: TextConfig, folder: Path) -> None:
    """Write ``tokenizer.json``, and ``<split>.bin`` with all ids of a split, uint16."""
    tokenizer = train_tokenizer(lambda doing: lines(config, "train", doing), config.vocabulary)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    for split in reversed(SPLITS):  # the long one last
        with open(folder / f"{split}.bin", "wb") as file:
            for ids in encoded(tokenizer, lines(config, split, "tokenising")):
                file.write(ids.tobytes())
            if file.tell() == 0:
                raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")


def prepared_tokens(config: TextConfig) -> tuple[Path, str]:
    """The folder that :func:`encode` wrote, made if need be, and its fingerprint.

    Raises:
        UserError: If the data cannot be had.
    """
    packaged = is_packaged(config)
    key = ["pydocs", platform.python_version()] if packaged else source_key(config, SPLITS)
    identity = [CACHE_FORMAT, config.vocabulary, *key]
    return prepared(config, identity, lambda folder: encode(config, folder))


class MaskedText(Data):
    """A tokenised corpus as reproducible masked batches.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training sequences and of their masks.
        outputs: V, the number of pieces.
        sequences: Packed sequences (N, T) by split; the remainder of a split is left out.
        fingerprint: Hash of the tokens of all splits and of the pieces.
    """

    def __init__(
        self,
        config: TextConfig,
        seed: int,
        outputs: int,
        sequences: dict[str, NDArray[np.uint16]],
        fingerprint: str,
    ) -> None:
        super().__init__(len(sequences["train"]), seed, outputs, fingerprint)
        self.config, self.sequences = config, sequences

    @classmethod
    def load(cls, config: TextConfig, seed: int) -> "MaskedText":
        """Read the prepared tokens (made first if need be).

        Raises:
            UserError: If the data cannot be had or a split is shorter than a sequence.
        """
        folder, fingerprint = prepared_tokens(config)
        pieces = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        sequences = {}
        for split in SPLITS:
            ids = np.memmap(folder / f"{split}.bin", np.uint16, "r")
            count = len(ids) // config.length
            if count == 0:
                raise UserError(
                    f"dataset.length={config.length} is longer than the {split} split of "
                    f"{origin(config)} ({len(ids)} tokens): choose a smaller dataset.length."
                )
            sequences[split] = ids[: count * config.length].reshape(count, config.length)  # (N, T)
        few, count = config.train_sequences, len(sequences["train"])
        if few is not None:
            if few > count:
                raise UserError(
                    f"dataset.train_sequences={few} exceeds the {count} there are: choose fewer, "
                    "or null."
                )
            rows = np.random.default_rng([seed, FEW]).permutation(count)[:few]
            sequences["train"] = sequences["train"][np.sort(rows)]
        return cls(config, seed, len(pieces), sequences, fingerprint)

    def train_batch(self, step: int, batch: int) -> tuple[MaskedBatch, int]:
        """The masked batch of a step and its epoch; the last of an epoch may be short."""
        rows, key, epoch = self._train_rows(step, batch)
        return self._masked(self.sequences["train"][rows], key), epoch

    def evaluation_batches(
        self, split: str, samples: int | None, batch: int
    ) -> Iterator[MaskedBatch]:
        """Evenly spaced samples; a sample's mask is the same for all seeds and batch sizes."""
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
