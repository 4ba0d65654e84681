"""Labelled text for fine-tuning: read from parquet files, tokenised once, validation held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor
from transformers import AutoTokenizer

HELD_OUT = 10  # every tenth training document is for validation


@dataclass
class Split:
    """Documents with their labels; a dataset that gives a whole batch at once.

    Attributes:
        columns: Inputs of the model and ``labels``; (documents, length), labels (documents,).
    """

    columns: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: values[i] for name, values in self.columns.items()}

    def __getitems__(self, numbers: list[int]) -> dict[str, Tensor]:
        """What a DataLoader asks for; its ``collate_fn`` has nothing left to do."""
        return self.batch(torch.tensor(numbers))

    def batch(self, numbers: Tensor | slice, device: str = "cpu") -> dict[str, Tensor]:
        """Some documents."""
        return {name: values[numbers].to(device) for name, values in self.columns.items()}


@dataclass
class Documents:
    """The splits of a data set; the number of classes is that of its labels."""

    train: Split
    validation: Split
    test: Split

    @property
    def classes(self) -> int:
        """Number of labels."""
        return int(self.train.columns["labels"].max()) + 1


def read(folder: Path, tokeniser: str, length: int, cache: Path) -> Documents:
    """Tokens of all documents, cut or padded to a length; kept in a file for the next time.

    Args:
        folder: With ``train.parquet`` and ``test.parquet``, columns ``text`` and ``label``.
        tokeniser: Name or folder of a pretrained model.
        length: Tokens of a document.
        cache: Where the tokens are kept.
    """
    path = cache / f"{folder.name}-{length}.pt"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        splits = {name: _tokenised(folder / f"{name}.parquet", tokeniser, length) for name in PARTS}
        torch.save(splits, path)
    splits = torch.load(path)
    train = splits["train"]
    held_out = torch.arange(len(train["labels"])) % HELD_OUT == HELD_OUT - 1
    return Documents(
        Split({name: values[~held_out] for name, values in train.items()}),
        Split({name: values[held_out] for name, values in train.items()}),
        Split(splits["test"]),
    )


PARTS = ("train", "test")


def _tokenised(path: Path, tokeniser: str, length: int) -> dict[str, Tensor]:
    rows = pyarrow.parquet.read_table(path, columns=["text", "label"]).to_pydict()
    tokens: Any = AutoTokenizer.from_pretrained(tokeniser)(
        rows["text"], truncation=True, padding="max_length", max_length=length, return_tensors="pt"
    )
    names = "input_ids", "attention_mask"
    return {name: tokens[name] for name in names} | {"labels": torch.tensor(rows["label"])}
