"""Labelled images: decoded once to uint8, then cropped, mirrored and normalised batch by batch."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mat.suite.config import ImageConfig
from mat.suite.data.base import Data, Rows, entropy, evenly, spaced
from mat.suite.data.cache import prepared
from mat.suite.data.source import Column, origin, read, source_key
from mat.suite.errors import UserError
from mat.suite.interface import Batch

STORED = ("train", "test")
IMAGE = Column(("img", "image"), "encoded images")
LABEL = Column(("label", "labels"), "class numbers", "int64")
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


def _decode(stored: Any, row: str) -> Image.Image:
    """An image upright (as its EXIF data say) and of 8 bits a channel."""
    from datasets import Image as Feature

    try:
        fields = stored if isinstance(stored, dict) else {"bytes": stored, "path": None}
        image: Image.Image = Feature().decode_example(fields)
    except Exception as error:  # decoders raise many kinds; all mean that this is no whole image
        raise UserError(f"{row} holds no readable image: copy the file again.") from error
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{row} holds 32 bits a pixel: give images of 8 or 16 bits a channel.")
    return image


def _pixels(config: ImageConfig, image: Image.Image, row: str) -> Pixels:
    """The (size, size, channels) pixels of an image."""
    side = config.source_size
    if image.size != (side, side):
        raise UserError(
            f"{row} holds an image of {image.width} x {image.height} pixels instead of {side} x "
            f"{side}: give square images of one size, or set dataset.source_size."
        )
    image = image.convert("RGB" if config.channels == 3 else "L")
    if config.size != side:
        image = image.resize((config.size, config.size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(config.size, config.size, config.channels)


def decode(config: ImageConfig, folder: Path) -> None:
    """Write ``<split>_images.bin``, uint8 (N, size, size, channels), and labels, int64 (N,)."""
    for split in STORED:
        classes: list[int] = []
        with open(folder / f"{split}_images.bin", "wb") as file:
            for where, first, (images, labels) in read(config, split, "decoding", IMAGE, LABEL):
                pairs = zip(images.to_pylist(), labels.to_pylist(), strict=True)
                for number, (stored, label) in enumerate(pairs, first):
                    row = f"{where}, row {number},"
                    if label is None or not 0 <= label < config.classes:
                        raise UserError(
                            f"{row} has the label {label}, which is none of the {config.classes} "
                            "classes: copy the file again, or set dataset.classes."
                        )
                    file.write(_pixels(config, _decode(stored, row), row).tobytes())
                    classes.append(label)
        if not classes:
            raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")
        (folder / f"{split}_labels.bin").write_bytes(np.array(classes, np.int64).tobytes())


class Images(Data):
    """Images as reproducible batches.

    A training image moves up to ``padding`` pixels each way, black coming in, and is mirrored with
    probability 1/2. Every image is normalised by the mean and deviation of each channel over the
    training split. The validation images are held out of the stored training split, evenly spaced
    within each class, the same for all seeds.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training images and of their crops and flips.

    Attributes:
        splits: Pixels (N, size, size, channels) and labels (N,), stored, and the split's rows.

    Raises:
        UserError: If the data cannot be had, or too few images are left for training.
    """

    def __init__(self, config: ImageConfig, seed: int) -> None:
        layout = [config.source_size, config.size, config.channels, config.classes]
        identity = [*layout, *source_key(config, STORED)]
        folder, fingerprint = prepared(config, identity, partial(decode, config))
        shape = (-1, config.size, config.size, config.channels)
        train, test = (np.memmap(folder / f"{s}_images.bin", np.uint8, "r") for s in STORED)
        train_labels, test_labels = (np.fromfile(folder / f"{s}_labels.bin", int) for s in STORED)
        if config.validation >= len(train_labels):
            raise UserError(
                f"dataset.validation={config.validation} leaves none of the {len(train_labels)} "
                "training images: hold out fewer."
            )
        held_out = evenly(train_labels, config.validation)
        self.splits: dict[str, tuple[Pixels, Labels, Rows]] = {
            "train": (train.reshape(shape), train_labels, np.flatnonzero(~held_out)),
            "validation": (train.reshape(shape), train_labels, np.flatnonzero(held_out)),
            "test": (test.reshape(shape), test_labels, np.arange(len(test_labels))),
        }
        count = len(train_labels) - config.validation
        super().__init__(count, seed, config.classes, fingerprint)
        self.config = config
        counts = np.zeros((config.channels, 256), np.int64)
        for rows in np.array_split(np.arange(count), 64):  # counting takes 8 bytes a value
            values = self.images("train", rows)[0].reshape(-1, config.channels)
            counts += [np.bincount(channel, minlength=256) for channel in values.T]
        share, value = counts / counts.sum(1, keepdims=True), np.arange(256)
        mean = share @ value
        deviation = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
        if not deviation.all():
            alike = "has a channel that is the same in all images"
            raise UserError(f"{origin(config)} {alike}: get the data again.")
        self.mean = mean.astype(np.float32)  # (channels,), of 0..255, as is the deviation
        self.deviation = deviation.astype(np.float32)

    def train_batch(self, step: int, batch: int) -> tuple[ImageBatch, int]:
        """The batch of a step, cropped and mirrored, and its epoch."""
        rows, key, epoch = self._train_rows(step, batch)
        pixels, labels = self.images("train", rows)
        return self._batch(self._moved(pixels, np.random.default_rng(key)), labels), epoch

    def evaluation_batches(
        self, split: str, samples: int | None, batch: int
    ) -> Iterator[ImageBatch]:
        """Evenly spaced images of a split (all when None) as they are, the same for all seeds."""
        rows = spaced(samples, len(self.splits[split][2]))
        for part in np.array_split(rows, -(-len(rows) // batch)):
            yield self._batch(*self.images(split, part))

    def probe_batch(self, samples: int) -> ImageBatch:
        """The estimator's images, drawn once from the training split, as they are."""
        return self._batch(*self.images("train", self._probe_rows(samples)))

    def facts(self) -> dict[str, float]:
        """Entropy in nats of the validation labels: the loss of a model that ignores the image."""
        _, labels, rows = self.splits["validation"]
        return {"class_entropy": entropy(np.bincount(labels[rows]))}

    def images(self, split: str, rows: Rows) -> tuple[Pixels, Labels]:
        """Copies of some images of a split (B, size, size, channels) and their labels (B,)."""
        pixels, labels, stored = self.splits[split]
        return np.asarray(pixels[stored[rows]]), labels[stored[rows]]

    def _moved(self, pixels: Pixels, random: np.random.Generator) -> Pixels:
        """Every image mirrored (in place) or not, and moved: (B, size, size, channels)."""
        count, size, padding = len(pixels), self.config.size, self.config.padding
        mirrored = (random.random(count) < 0.5) & self.config.flip
        pixels[mirrored] = pixels[mirrored, :, ::-1]
        padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        # (B, 2 padding + 1, 2 padding + 1, channels, size, size), a view
        places = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        down, right = random.integers(0, 2 * padding + 1, (2, count))
        moved: Pixels = places[np.arange(count), down, right].transpose(0, 2, 3, 1)
        return moved

    def _batch(self, pixels: Pixels, labels: Labels) -> ImageBatch:
        # A line of an image at a time: numpy is slow at short last axes, and torch would wake its
        # threads for this.
        line = self.config.size * self.config.channels
        normal = pixels.reshape(-1, line).astype(np.float32)  # (B * size, size * channels)
        normal -= np.resize(self.mean, line)
        normal /= np.resize(self.deviation, line)
        images = torch.from_numpy(normal.reshape(pixels.shape)).permute(0, 3, 1, 2)
        return ImageBatch(images, torch.from_numpy(labels))
