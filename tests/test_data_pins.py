"""Data are to the bit what committed runs were trained and evaluated on."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from short_runs import composed

from mat.suite import data
from mat.suite.compose import resolve
from mat.suite.interface import Batch

TOPICS = "37d06970fc926e60"  # the prose that came with the Python of the pins
PINS = {
    "pydocs": {
        "train": "4d3bd4d09b33d368",
        "validation": "5213338f52bd456e",
        "test": "89717d8e7a157a70",
        "steps": "50d82a530c678151",
        "probe": "ac59313fe7bf4f11",
        "facts": "{'unigram_entropy': 5.365558109748081}",
        "pieces": "b1145e4eaadaa6bc",
    },
    "wikitext2": {
        "train": "a4a301dd796586c7",
        "validation": "529704978fe92321",
        "test": "1ef2e847504c4606",
        "steps": "595e3f7e03af64ef",
        "probe": "d63fa9b128cd5611",
        "facts": "{'unigram_entropy': 6.446517163480581}",
        "pieces": "50c6c9a3be931103",
    },
    "digits": {
        "train": "bd9deb9b7be49592",
        "validation": "1a41938a712239e2",
        "test": "75e14e63fdb837ad",
        "steps": "4aae9ec2767d3fa4",
        "probe": "ff831f2431b94af2",
        "facts": "{'class_entropy': 2.302473961297652}",
    },
    "cifar10": {
        "train": "1e4df91bdf062e5b",
        "validation": "08f51e425bdf5a62",
        "test": "640dd1b071847662",
        "steps": "7a6c1d70468f9c39",
        "probe": "ae6db926278f8fe2",
        "facts": "{'class_entropy': 2.3025850929940455}",
    },
}


def digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def of_batches(batches: Iterable[Batch]) -> str:
    """Hash of all tensors and their shapes."""
    tensors = [tensor for batch in batches for _, tensor in sorted(vars(batch).items())]
    return digest(str(t.shape).encode() + t.contiguous().numpy().tobytes() for t in tensors)


def pinned(name: str, cache: Path) -> dict[str, str]:
    """Hashes of a dataset's pieces, splits, batches, masks and augmentations."""
    overrides = [f"dataset={name}", f"dataset.cache={cache}", *SUITS[name]]
    loaded = data.load(resolve(composed(*overrides)).dataset, 3)
    epoch = loaded.steps_per_epoch(32)
    pins = {
        "train": of_batches(loaded.evaluation_batches("train", None, 1024)),
        "validation": of_batches(loaded.evaluation_batches("validation", 100, 32)),
        "test": of_batches(loaded.evaluation_batches("test", None, 1024)),
        "steps": of_batches(loaded.train_batch(i, 32)[0] for i in (0, 1, epoch - 1, epoch)),
        "probe": of_batches([loaded.probe_batch(8)]),
        "facts": str(loaded.facts()),
    }
    for file in cache.glob(f"{name}-*/tokenizer.json"):
        pieces = json.loads(file.read_text())["model"]["vocab"]
        pins["pieces"] = digest([json.dumps(pieces, sort_keys=True).encode()])
    return pins


IMAGES = ("model=vgg16_mini", "selection=filters_mini", "train=images_mini")
SUITS = {"pydocs": (), "wikitext2": (), "digits": IMAGES, "cifar10": IMAGES}


@pytest.mark.parametrize("name", SUITS)
def test_data_are_those_of_committed_runs(name, tmp_path):
    if name in ("wikitext2", "cifar10") and "MAT_DATA" not in os.environ:
        pytest.skip("needs the real data below MAT_DATA")
    if name == "pydocs" and digest(topics[n].encode() for n in sorted(topics)) != TOPICS:
        pytest.skip("this Python has another prose")
    assert pinned(name, tmp_path) == PINS[name]
