"""Labelled images: decoded once to uint8, then cropped, mirrored and normalised batch by batch.

A training image moves up to ``padding`` pixels each way, black coming in, and is mirrored with
probability 1/2. Every image is normalised by the mean and deviation of each channel over the
training split. The validation images are held out of the stored training split, evenly spaced
within each class, the same for all seeds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mat.suite.config import ImageConfig
from mat.suite.data.base import Data, Rows, entropy, spaced
from mat.suite.data.cache import prepared
from mat.suite.data.source import Column, is_packaged, origin, read, source_key
from mat.suite.errors import UserError
from mat.suite.interface import Batch

STORED = ("train", "test")
CACHE_FORMAT = 2
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


# --- from rows to prepared pixels


def _is_image(kind: Any) -> bool:
    return "binary" in str(kind)  # bare, or the field "bytes" of a struct


def _is_label(kind: Any) -> bool:
    return "int" in str(kind) or "string" in str(kind)


IMAGE = Column(("img", "image"), "encoded images", _is_image)
LABEL = Column(("label", "labels"), "class numbers or names", _is_label)


def _files(config: ImageConfig, split: str) -> Iterator[tuple[str, Any, Any]]:
    """Rows of hub or local data: where it is, encoded image, label."""
    for where, first, (images, labels) in read(config, split, "decoding", IMAGE, LABEL):
        pairs = zip(images.to_pylist(), labels.to_pylist(), strict=True)
        for row, (image, label) in enumerate(pairs, first):
            yield f"{where}, row {row},", image, label


def _class_names(config: ImageConfig) -> list[str]:
    """Names of the classes in order, where labels are names."""
    found: set[Any] = set()
    for _, _, (labels,) in read(config, "train", "reading classes of", LABEL):
        found.update(labels.to_pylist())
    return sorted(label for label in found if isinstance(label, str))


def _digits(split: str) -> Iterator[tuple[str, Image.Image, int]]:
    """scikit-learn's handwritten digits of 8 x 8 pixels; 17 shades of grey become 0..255."""
    from sklearn.datasets import load_digits

    shades, labels = load_digits(return_X_y=True)
    grey = np.rint(shades * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    in_split = _evenly(labels, DIGITS_TEST) == (split == "test")
    for row in np.flatnonzero(in_split):
        yield f"dataset=digits, row {row},", Image.fromarray(grey[row]), int(labels[row])


def _evenly(labels: Labels, count: int) -> NDArray[np.bool_]:
    """So many samples, evenly spaced within each class, as a mask."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[spaced(count, len(labels))]] = True
    return chosen


def _decode(stored: Any, row: str) -> Image.Image:
    """An image upright (as its EXIF data say), of 8 bits a channel."""
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
    size = config.source_size
    if image.size != (size, size):
        raise UserError(
            f"{row} holds an image of {image.width} x {image.height} pixels instead of {size} x "
            f"{size}: give square images of one size, or set dataset.source_size."
        )
    image = image.convert("RGB" if config.channels == 3 else "L")
    if config.size != size:
        image = image.resize((config.size, config.size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(config.size, config.size, config.channels)


def _write(config: ImageConfig, folder: Path) -> None:
    packaged = is_packaged(config)
    names = [] if packaged else _class_names(config)
    numbers = {name: number for number, name in enumerate(names)}
    for split in STORED:
        labels = []
        with open(folder / f"{split}_images.bin", "wb") as file:
            for row, stored, label in _digits(split) if packaged else _files(config, split):
                number = numbers.get(label, -1) if isinstance(label, str) else label
                if number is None or not 0 <= number < config.classes:
                    raise UserError(
                        f"{row} has the label {label}, which is none of the {config.classes} "
                        "classes: copy the file again, or set dataset.classes."
                    )
                labels.append(number)
                image = stored if packaged else _decode(stored, row)
                file.write(_pixels(config, image, row).tobytes())
        if not labels:
            raise UserError(f"{origin(config)} has an empty {split} split: get the data again.")
        (folder / f"{split}_labels.bin").write_bytes(np.array(labels, np.int64).tobytes())


def prepared_images(config: ImageConfig) -> tuple[Path, str]:
    """The folder of the decoded images, made if need be, and its fingerprint.

    It holds ``<split>_images.bin`` (N, size, size, channels), uint8, and ``<split>_labels.bin``
    (N,), int64, for the splits train and test.

    Raises:
        UserError: If the data cannot be had, or an image or label is not what it should be.
    """
    key = ["digits"] if is_packaged(config) else source_key(config, STORED)
    layout = [config.source_size, config.size, config.channels, config.classes]
    return prepared(config, [CACHE_FORMAT, *layout, *key], lambda folder: _write(config, folder))


# --- from prepared pixels to batches


class Images(Data):
    """Images as reproducible batches.

    Args:
        config: The dataset's configuration.
        seed: Seed of the order of the training images and of their crops and flips.
        pixels: (N, size, size, channels) by stored split.
        labels: (N,) by stored split.
        fingerprint: Hash of the pixels and labels.

    Raises:
        UserError: If too few images are left for training, or a channel never varies.
    """

    def __init__(
        self,
        config: ImageConfig,
        seed: int,
        pixels: dict[str, Pixels],
        labels: dict[str, Labels],
        fingerprint: str,
    ) -> None:
        stored = len(labels["train"])
        if config.validation >= stored:
            raise UserError(
                f"dataset.validation={config.validation} leaves none of the {stored} training "
                "images: hold out fewer."
            )
        held_out = _evenly(labels["train"], config.validation)
        self.splits: dict[str, tuple[Pixels, Labels, Rows]] = {  # rows among the stored ones
            "train": (pixels["train"], labels["train"], np.flatnonzero(~held_out)),
            "validation": (pixels["train"], labels["train"], np.flatnonzero(held_out)),
            "test": (pixels["test"], labels["test"], np.arange(len(labels["test"]))),
        }
        super().__init__(stored - config.validation, seed, config.classes, fingerprint)
        self.config = config
        counts = np.zeros((config.channels, 256), np.int64)
        for rows in np.array_split(self.splits["train"][2], 64):  # some at a time: 8 bytes a value
            for channel, values in enumerate(pixels["train"][rows].reshape(-1, config.channels).T):
                counts[channel] += np.bincount(values, minlength=256)
        share, value = counts / counts.sum(1, keepdims=True), np.arange(256)
        mean = share @ value
        deviation = np.sqrt((share * (value - mean[:, None]) ** 2).sum(1))
        if not deviation.all():
            raise UserError(
                f"{origin(config)} has a channel that is the same in all images: get the data "
                "again."
            )
        self.mean = mean.astype(np.float32)  # (channels,), of 0..255, as is the deviation
        self.deviation = deviation.astype(np.float32)

    @classmethod
    def load(cls, config: ImageConfig, seed: int) -> "Images":
        """Read the prepared images (made first if need be).

        Raises:
            UserError: If the data cannot be had, or too few images are left for training.
        """
        folder, fingerprint = prepared_images(config)
        shape = (-1, config.size, config.size, config.channels)
        pixels = {s: np.memmap(folder / f"{s}_images.bin", np.uint8, "r") for s in STORED}
        labels = {s: np.fromfile(folder / f"{s}_labels.bin", np.int64) for s in STORED}
        return cls(
            config, seed, {s: p.reshape(shape) for s, p in pixels.items()}, labels, fingerprint
        )

    def train_batch(self, step: int, batch: int) -> tuple[ImageBatch, int]:
        """The batch of a step, cropped and mirrored, and its epoch."""
        rows, key, epoch = self._train_rows(step, batch)
        pixels, labels = self.images("train", rows)
        return self._batch(self._moved(pixels, np.random.default_rng(key)), labels), epoch

    def evaluation_batches(
        self, split: str, samples: int | None, batch: int
    ) -> Iterator[ImageBatch]:
        """Evenly spaced images of a split as they are, the same for all seeds."""
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
        """Copies of some images of a split and their labels."""
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
