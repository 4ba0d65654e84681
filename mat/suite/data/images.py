"""Labelled images: decoded once to a uint8 cache, then whole batches cropped, mirrored and normalised at once.

A training image moves up to ``padding`` pixels each way, black coming in, and is mirrored with probability 1/2; every
image is normalised by the mean and deviation of each channel over the training split. The validation images are held
out of the stored training split, evenly spaced within each class, the same for all seeds.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mat.suite.config import ImageConfig
from mat.suite.data.base import Data, entropy, spaced
from mat.suite.data.cache import cached, progress
from mat.suite.data.sources import Columns, is_packaged, open_splits, origin, source_key
from mat.suite.errors import UserError
from mat.suite.interface import Batch

STORED = ("train", "test")
CACHE_FORMAT = 1
DIGITS_TEST = 360  # of scikit-learn's digits, evenly of every class
Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class ImageBatch(Batch):
    """Images to be classified.

    Attributes:
        inputs: (B, channels, size, size), normalised, channels last in memory.
        targets: (B,) classes.
    """

    @property
    def length(self) -> int:
        """1: an image has one output position."""
        return 1

    def split(self, parts: int) -> list["ImageBatch"]:
        """Equal consecutive parts (fewer when there are fewer samples than parts)."""
        parts = min(parts, self.samples)
        pairs = zip(self.inputs.tensor_split(parts), self.targets.tensor_split(parts), strict=True)
        return [ImageBatch(images, targets) for images, targets in pairs]


# --- from files to the cache


def _columns() -> Columns:
    import pyarrow.types as kinds

    def is_image(kind: Any) -> bool:
        return bool(kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    return {"img": ("encoded images", is_image), "label": ("class numbers", kinds.is_integer)}


def _pixels(config: ImageConfig, image: Image.Image) -> Pixels:
    """The (size, size, channels) pixels of an image."""
    image = image.convert("RGB" if config.channels == 3 else "L")
    if config.size != config.source_size:
        image = image.resize((config.size, config.size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(config.size, config.size, config.channels)


def _decode(config: ImageConfig, encoded: bytes | None, row: str) -> Pixels:
    try:
        image = Image.open(io.BytesIO(encoded or b""))
        image.load()
    except Exception as error:  # the decoders raise many kinds; all mean that this is no whole image
        raise UserError(f"{row} holds no readable image: copy the file again.") from error
    if image.size != (config.source_size, config.source_size):
        raise UserError(
            f"{row} holds an image of {image.width} x {image.height} pixels instead of {config.source_size} x "
            f"{config.source_size}: give square images of one size, or set dataset.source_size."
        )
    return _pixels(config, image)


def _from_files(config: ImageConfig) -> Iterator[tuple[str, Pixels, Labels]]:
    for split, stream in open_splits(config, STORED, _columns()).items():
        pixels, labels = [], []
        for piece in progress(stream, f"decoding {config.name} {split}"):
            encoded, classes = (piece.table.column(name).to_pylist() for name in ("img", "label"))
            for number, (image, label) in enumerate(zip(encoded, classes, strict=True), start=piece.first):
                row = f"{piece.where}, row {number},"
                if label is None or not 0 <= label < config.classes:
                    raise UserError(
                        f"{row} has the label {label}, which is none of the {config.classes} classes: copy the file "
                        "again, or set dataset.classes."
                    )
                pixels.append(_decode(config, image and image["bytes"], row))
            labels += classes
        if not pixels:
            raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")
        yield split, np.stack(pixels), np.array(labels, np.int64)


def _digits(config: ImageConfig) -> Iterator[tuple[str, Pixels, Labels]]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; its 17 shades of grey become 0..255."""
    from sklearn.datasets import load_digits

    shades, labels = load_digits(return_X_y=True)
    grey = np.rint(shades * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    pixels = np.stack([_pixels(config, Image.fromarray(image)) for image in grey])
    test = _evenly(labels, DIGITS_TEST)
    for split, part in (("train", ~test), ("test", test)):
        yield split, pixels[part], labels[part]


def _evenly(labels: Labels, count: int) -> NDArray[np.bool_]:
    """So many samples, evenly spaced within each class, as a mask."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[spaced(count, len(labels))]] = True
    return chosen


def cached_images(config: ImageConfig) -> Path:
    """The cache folder of a dataset; made if it is not there.

    Args:
        config: The dataset's configuration.

    Returns:
        A folder with ``<split>_images.npy`` (N, size, size, channels), uint8, and ``<split>_labels.npy`` (N,), for
        the splits train and test.

    Raises:
        UserError: If the data cannot be had, or an image or a label is not what it should be, naming its row.
    """

    def write(folder: Path) -> None:
        for split, pixels, labels in _digits(config) if is_packaged(config) else _from_files(config):
            np.save(folder / f"{split}_images.npy", pixels)
            np.save(folder / f"{split}_labels.npy", labels)

    key = ["digits"] if is_packaged(config) else source_key(config, STORED)
    layout = [config.source_size, config.size, config.channels, config.classes]
    return cached(config.cache, config.name, [CACHE_FORMAT, config.name, *layout, *key], write)


# --- from the cache to batches


class Images(Data):
    """Images as reproducible batches.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training images and of their crops and flips.
        pixels: (N, size, size, channels) by split: train, validation, test.
        labels: (N,) by split.
    """

    def __init__(self, config: ImageConfig, seed: int, pixels: dict[str, Pixels], labels: dict[str, Labels]) -> None:
        super().__init__(len(labels["train"]), seed, config.classes)
        self.config, self.pixels, self.labels = config, pixels, labels
        parts = np.array_split(pixels["train"].reshape(-1, config.channels), 64)  # counting takes 8 bytes a value
        counts = np.stack([sum(np.bincount(p[:, c], minlength=256) for p in parts) for c in range(config.channels)])
        share, value = counts / counts.sum(1, keepdims=True), np.arange(256)
        mean = share @ value
        deviation = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
        if not deviation.all():
            raise UserError(f"{origin(config)} has a channel that is the same in all images: get the data again.")
        self.mean, self.deviation = mean.astype(np.float32), deviation.astype(np.float32)  # (channels,), of 0..255

    @classmethod
    def load(cls, config: ImageConfig, seed: int) -> "Images":
        """Read the cache (made first if need be).

        Raises:
            UserError: If the data cannot be had or damaged, or too few images are left for training.
        """
        folder = cached_images(config)
        pixels = {split: np.load(folder / f"{split}_images.npy", mmap_mode="r") for split in STORED}
        labels = {split: np.load(folder / f"{split}_labels.npy") for split in STORED}
        stored = len(labels["train"])
        if config.validation >= stored:
            raise UserError(
                f"dataset.validation={config.validation} leaves none of the {stored} training images: hold out fewer."
            )
        held = _evenly(labels["train"], config.validation)
        for split, part in (("validation", held), ("train", ~held)):  # train is cut last
            pixels[split], labels[split] = pixels["train"][part], labels["train"][part]
        return cls(config, seed, pixels, labels)

    def train_batch(self, step: int, batch: int) -> tuple[ImageBatch, int]:
        """The batch of a step, cropped and mirrored, and its epoch; every epoch is a new permutation."""
        rows, key, epoch = self._train_rows(step, batch)
        moved = self._moved(self.pixels["train"][rows], np.random.default_rng(key))
        return self._batch(moved, self.labels["train"][rows]), epoch

    def evaluation_batches(self, split: str, samples: int | None, batch: int) -> Iterator[ImageBatch]:
        """Evenly spaced images of a split as they are, the same for all methods and seeds."""
        rows = spaced(samples, len(self.labels[split]))
        for part in np.array_split(rows, -(-len(rows) // batch)):
            yield self._batch(self.pixels[split][part], self.labels[split][part])

    def probe_batch(self, samples: int) -> ImageBatch:
        """The estimator's images, drawn once from the training split, as they are; the same at every selection."""
        rows = self._probe_rows(samples)
        return self._batch(self.pixels["train"][rows], self.labels["train"][rows])

    def facts(self) -> dict[str, float]:
        """The entropy of the validation labels in nats: the loss of a model that ignores the image."""
        return {"class_entropy": entropy(np.bincount(self.labels["validation"]))}

    def _moved(self, pixels: Pixels, random: np.random.Generator) -> Pixels:
        """Every image mirrored (in place) or not, and moved, on its own: (B, size, size, channels)."""
        count, size, padding = len(pixels), self.config.size, self.config.padding
        mirrored = (random.random(count) < 0.5) & self.config.flip
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        places = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        down, right = random.integers(0, 2 * padding + 1, (2, count))
        moved: Pixels = places[np.arange(count), down, right].transpose(0, 2, 3, 1)
        return moved

    def _batch(self, pixels: Pixels, labels: Labels) -> ImageBatch:
        # A line of an image at a time: numpy is slow at short last axes, and torch would wake its threads for this.
        line = self.config.size * self.config.channels
        normal = pixels.reshape(-1, line).astype(np.float32)
        normal -= np.resize(self.mean, line)
        normal /= np.resize(self.deviation, line)
        images = torch.from_numpy(normal.reshape(pixels.shape)).permute(0, 3, 1, 2)
        return ImageBatch(images, torch.from_numpy(labels))
