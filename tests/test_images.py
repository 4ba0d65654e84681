"""Images: decoded once, held out, moved, mirrored and normalised as they should be, reproducibly."""

import dataclasses
import io
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from short_runs import one_sentence

from mat.suite import data
from mat.suite.config import ImageConfig
from mat.suite.data import images as module
from mat.suite.data.images import ImageBatch, Images, cached_images
from mat.suite.errors import UserError

SIZE, CLASSES, TRAIN, TEST = 8, 5, 60, 20


def photos(count: int, seed: int, channels: int = 3) -> np.ndarray:
    shape = (count, SIZE, SIZE, channels) if channels == 3 else (count, SIZE, SIZE)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


PIXELS = {"train": photos(TRAIN, 0), "test": photos(TEST, 1)}
LABELS = {"train": np.arange(TRAIN) * 7 % CLASSES, "test": np.arange(TEST) % CLASSES}


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def table(pixels: Any, labels: Any) -> pa.Table:
    rows = [None if image is None else {"bytes": image, "path": None} for image in pixels]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"img": pa.array(rows, kind), "label": pa.array([*labels], pa.int64())})


def write(root: Path, **changed: tuple[Any, Any]) -> Path:
    """A folder as the hub has it, the training split in two files; ``changed`` replaces a split's images and labels."""
    folder = root / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pixels, labels = changed.get(split, ([encoded(p) for p in PIXELS[split]], LABELS[split]))
        whole, files = table(pixels, labels), 2 if split == "train" else 1
        for file in range(files):
            size = len(whole) // files
            pq.write_table(whole.slice(file * size, size), folder / f"{split}-{file:05}-of-{files:05}.parquet")
    return folder


def tiny(root: Path | None, cache: Path, **changes: Any) -> ImageConfig:
    values = dict(
        name="tiny", hub_path="some/tiny", root=None if root is None else str(root), local_folder="tiny",
        cache=str(cache), source_size=SIZE, size=SIZE, classes=CLASSES, validation=10, padding=2,
    )  # fmt: skip
    return ImageConfig(**(values | changes))


def digits(cache: Path, **changes: Any) -> ImageConfig:
    values = dict(name="digits", cache=str(cache), source_size=8, size=32, classes=10, validation=300, flip=False)
    return ImageConfig(**(values | changes))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ImageConfig:
    root = tmp_path_factory.mktemp("images")
    write(root)
    return tiny(root, root / "cache")


@pytest.fixture
def some(config) -> Images:
    return Images.load(config, seed=0)


def pixels_of(some: Images, batch: ImageBatch) -> np.ndarray:
    """The bytes behind normalised images: (B, size, size, channels)."""
    raw = batch.inputs.permute(0, 2, 3, 1).double().numpy() * some.deviation + some.mean
    assert np.abs(raw - np.rint(raw)).max() < 1e-3
    return np.rint(raw).astype(np.uint8)


# --- from files to the cache


def test_cache_holds_every_pixel_and_label_in_order(config):
    folder = cached_images(config)
    for split in ("train", "test"):
        assert np.array_equal(np.load(folder / f"{split}_images.npy"), PIXELS[split])
        assert np.array_equal(np.load(folder / f"{split}_labels.npy"), LABELS[split])


def test_grey_images_become_colour_and_colour_becomes_grey(tmp_path):
    grey = photos(TRAIN, 2, channels=1)
    write(tmp_path, train=([encoded(p) for p in grey], LABELS["train"]))
    folder = cached_images(tiny(tmp_path, tmp_path / "cache"))
    assert np.array_equal(np.load(folder / "train_images.npy"), np.repeat(grey[..., None], 3, axis=3))
    folder = cached_images(tiny(tmp_path, tmp_path / "cache", channels=1))
    assert np.array_equal(np.load(folder / "train_images.npy"), grey[..., None])
    luminance = (PIXELS["test"] @ [0.299, 0.587, 0.114])[..., None]
    assert np.abs(np.load(folder / "test_images.npy") - luminance).max() < 2


def test_images_are_resized_when_asked(tmp_path):
    level = np.broadcast_to(np.linspace(0, 248, SIZE)[None, None, :, None], (TRAIN, SIZE, SIZE, 3)).astype(np.uint8)
    write(tmp_path, train=([encoded(p) for p in level], LABELS["train"]))
    large = np.load(cached_images(tiny(tmp_path, tmp_path / "cache", size=16)) / "train_images.npy")
    assert large.shape == (TRAIN, 16, 16, 3) and (large == large[:1, :1]).all()
    line = large[0, 0, :, 0].astype(int)
    assert (np.diff(line) >= 0).all() and line[0] == 0 and line[-1] == 248  # a ramp stays one
    assert np.abs(line.reshape(8, 2).mean(1) - level[0, 0, :, 0]).max() <= 5


def test_the_hub_gives_the_same_as_local_files(config, tmp_path, monkeypatch):
    asked = []

    def stand_in(*arguments: Any) -> dict[str, datasets.Dataset]:
        asked.append(arguments)
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        rows = {s: {"img": [Image.fromarray(p) for p in PIXELS[s]], "label": LABELS[s]} for s in ("train", "test")}
        return {split: datasets.Dataset.from_dict(columns, features) for split, columns in rows.items()}

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    ours, theirs = (cached_images(c) for c in (config, tiny(None, tmp_path / "cache")))
    assert asked == [("some/tiny", None)]
    for file in ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def replaced(index: int, image: Any = "same", label: Any = "same") -> dict[str, tuple[list[Any], list[Any]]]:
    """The training split with one row changed."""
    pixels, labels = [encoded(p) for p in PIXELS["train"]], [int(label) for label in LABELS["train"]]
    pixels[index] = pixels[index] if image == "same" else image
    labels[index] = labels[index] if label == "same" else label
    return {"train": (pixels, labels)}


def cut(folder: Path) -> None:
    path = folder / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def spoil(folder: Path) -> None:
    """The footer is right but the data are not."""
    path = folder / "train-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:1000] = bytes(996)
    path.write_bytes(content)


SECOND = "train-00001-of-00002.parquet"  # whose row 5 is row 35 of the split
DAMAGE: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "dataset.root"),
    "no test split": (lambda f: (f / "test-00000-of-00001.parquet").unlink(), "test*.parquet"),
    "cut off": (cut, f"{SECOND} is not a readable Parquet file: copy it again"),
    "spoilt": (spoil, f"{SECOND} is not a readable Parquet file: copy it again"),
    "no labels": (lambda f: pq.write_table(pa.table({"img": [1]}), f / SECOND), "no column 'img' of encoded images"),
    "empty": (lambda f: write(f.parent, test=([], [])), "empty test split"),
    "corrupt image": (lambda f: write(f.parent, **replaced(35, b"no image")), f"{SECOND}, row 5, holds no readable"),
    "half an image": (
        lambda f: write(f.parent, **replaced(35, encoded(PIXELS["train"][0])[:90])),
        f"{SECOND}, row 5, holds no readable",
    ),
    "missing image": (lambda f: write(f.parent, **replaced(35, None)), f"{SECOND}, row 5, holds no readable"),
    "wrong shape": (
        lambda f: write(f.parent, **replaced(35, encoded(PIXELS["train"][0][:, :6]))),
        f"{SECOND}, row 5, holds an image of 6 x 8 pixels instead of 8 x 8",
    ),
    "label too high": (lambda f: write(f.parent, **replaced(35, label=5)), f"{SECOND}, row 5, has the label 5"),
    "negative label": (lambda f: write(f.parent, **replaced(3, label=-1)), "00002.parquet, row 3, has the label -1"),
    "no label": (lambda f: write(f.parent, **replaced(35, label=None)), f"{SECOND}, row 5, has the label None"),
    "all black": (
        lambda f: write(f.parent, train=([encoded(PIXELS["train"][0] * 0)] * TRAIN, LABELS["train"])), "the same in all"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_refused_in_one_sentence(tmp_path, damage):
    act, part = DAMAGE[damage]
    act(write(tmp_path / "data"))
    with pytest.raises(UserError) as caught:
        Images.load(tiny(tmp_path / "data", tmp_path / "cache"), seed=0)
    message = str(caught.value)
    assert part in message and one_sentence(message), message
    assert str(tmp_path / "data") in message, message
    assert damage == "all black" or [p.name for p in (tmp_path / "cache").glob("*")] in ([], [".lock"])


def test_too_many_held_out_are_refused(config):
    with pytest.raises(UserError, match=r"dataset.validation=60 leaves none of the 60 training images") as caught:
        Images.load(dataclasses.replace(config, validation=60), seed=0)
    assert one_sentence(str(caught.value))


def test_second_load_does_not_decode_again(config, monkeypatch):
    Images.load(config, seed=0)
    monkeypatch.setattr(module, "_decode", lambda *arguments: pytest.fail("decoded again"))
    Images.load(dataclasses.replace(config, validation=20, padding=0, flip=False), seed=5)  # none needs other pixels
    with pytest.raises(pytest.fail.Exception):
        Images.load(dataclasses.replace(config, channels=1), seed=0)


# --- splits


def test_held_out_images_are_the_same_for_all_seeds_and_evenly_of_every_class(config):
    loaded = [Images.load(config, seed) for seed in (0, 1)]
    for split in ("train", "validation", "test"):
        assert np.array_equal(loaded[0].pixels[split], loaded[1].pixels[split])
    some = loaded[0]
    assert Counter(some.labels["validation"].tolist()) == dict.fromkeys(range(CLASSES), 2)
    rows = {image.tobytes(): row for row, image in enumerate(PIXELS["train"])}
    found = {split: [rows[p.tobytes()] for p in some.pixels[split]] for split in ("train", "validation")}
    assert sorted(found["train"] + found["validation"]) == list(range(TRAIN))
    for split, numbers in found.items():
        assert np.array_equal(some.labels[split], LABELS["train"][numbers]) and numbers == sorted(numbers)


def test_digits_need_no_download_and_no_folder(cache):
    some = data.load(digits(cache), seed=0)
    assert isinstance(some, Images) and some.outputs == 10
    sizes = {split: len(labels) for split, labels in some.labels.items()}
    assert sizes == {"train": 1137, "validation": 300, "test": 360}
    batch = next(some.evaluation_batches("test", None, 360))
    assert batch.inputs.shape == (360, 3, 32, 32)
    assert torch.equal(batch.inputs[:, 0], batch.inputs[:, 2])  # grey repeated
    assert some.pixels["train"].max() == 255 and some.pixels["train"].min() == 0
    assert set(Counter(batch.targets.tolist()).values()) <= {34, 35, 36, 37, 38}
    assert some.facts()["class_entropy"] == pytest.approx(math.log(10), abs=1e-3)


@pytest.mark.skipif("MAT_DATA" not in os.environ, reason="needs the real CIFAR-10 below MAT_DATA")
def test_real_cifar10_is_what_it_should_be(cache):
    real = tiny(Path(os.environ["MAT_DATA"]), cache, name="cifar10", local_folder="cifar10", source_size=32, size=32,
                classes=10, validation=5000)  # fmt: skip
    some = Images.load(real, seed=0)
    assert {split: len(labels) for split, labels in some.labels.items()} == {
        "train": 45_000, "validation": 5_000, "test": 10_000
    }  # fmt: skip
    assert set(Counter(some.labels["validation"].tolist()).values()) == {500}
    assert some.mean / 255 == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    assert some.deviation / 255 == pytest.approx([0.2470, 0.2435, 0.2616], abs=2e-3)


# --- batches


def test_pixels_are_normalised_by_the_training_split(some):
    whole = some.pixels["train"].astype(np.float64)
    assert some.mean == pytest.approx(whole.mean((0, 1, 2))) and some.deviation == pytest.approx(whole.std((0, 1, 2)))
    (batch,) = some.evaluation_batches("test", None, 64)
    wanted = (PIXELS["test"] - whole.mean((0, 1, 2))) / whole.std((0, 1, 2))
    assert batch.inputs.dtype == torch.float32 and batch.inputs.shape == (TEST, 3, SIZE, SIZE)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(batch.inputs.double(), torch.from_numpy(wanted).permute(0, 3, 1, 2), atol=1e-5)
    assert batch.targets.dtype == torch.int64 and np.array_equal(batch.targets, LABELS["test"])
    assert (batch.samples, batch.length) == (TEST, 1)


def naive_places(image: np.ndarray, padding: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every way an image can be moved and mirrored."""
    places = {}
    for mirrored in (False, True) if flip else (False,):
        canvas = np.zeros((SIZE + 2 * padding, SIZE + 2 * padding, image.shape[2]), np.uint8)
        canvas[padding : padding + SIZE, padding : padding + SIZE] = image[:, ::-1] if mirrored else image
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                moved = canvas[down : down + SIZE, right : right + SIZE]
                places[moved.tobytes()] = (down, right, mirrored)
    return places


@pytest.mark.parametrize(("padding", "flip", "channels"), [(2, True, 3), (1, False, 3), (0, True, 3), (2, True, 1)])
def test_training_images_are_moved_and_mirrored_one_by_one(config, padding, flip, channels):
    some = Images.load(dataclasses.replace(config, padding=padding, flip=flip, channels=channels), seed=0)
    ways, originals = Counter(), some.pixels["train"].copy()
    places = {i: naive_places(image, padding, flip) for i, image in enumerate(originals)}
    for step in range(120):
        batch, _ = some.train_batch(step, 25)
        rows, _, _ = some._train_rows(step, 25)
        assert np.array_equal(batch.targets, some.labels["train"][rows])
        for row, image in zip(rows, pixels_of(some, batch), strict=True):
            ways[places[int(row)][image.tobytes()]] += 1  # a KeyError if it is not that image, moved
    count, kinds = 120 * 25, (2 * padding + 1) ** 2 * (1 + flip)
    assert len(ways) == kinds
    deviation = math.sqrt(count / kinds)
    assert all(abs(n - count / kinds) < 5 * deviation for n in ways.values())  # each way as often
    assert np.array_equal(some.pixels["train"], originals)


@pytest.mark.parametrize(("batch", "sizes"), [(20, [20, 20, 10]), (25, [25, 25]), (64, [50])])
def test_every_epoch_takes_each_image_once(config, batch, sizes):
    some = Images.load(dataclasses.replace(config, padding=0, flip=False), seed=0)
    orders = []
    assert some.steps_per_epoch(batch) == len(sizes)
    for epoch in range(2):
        drawn = [some.train_batch(epoch * len(sizes) + i, batch) for i in range(len(sizes))]
        assert [b.samples for b, _ in drawn] == sizes and {e for _, e in drawn} == {epoch}
        seen = [image.tobytes() for b, _ in drawn for image in pixels_of(some, b)]
        assert sorted(seen) == sorted(image.tobytes() for image in some.pixels["train"])
        orders.append(seen)
    assert orders[0] != orders[1] or len(sizes) == 1


def test_batches_depend_on_seed_and_step_alone(config):
    some, twin, other = (Images.load(config, seed) for seed in (0, 0, 1))
    for step in (4, 1):  # in any order
        assert torch.equal(some.train_batch(step, 16)[0].inputs, twin.train_batch(step, 16)[0].inputs)
    fresh = Images.load(config, 0)
    assert torch.equal(fresh.train_batch(9, 16)[0].inputs, some.train_batch(9, 16)[0].inputs)
    assert not torch.equal(some.train_batch(1, 16)[0].inputs, other.train_batch(1, 16)[0].inputs)
    assert torch.equal(some.probe_batch(8).inputs, twin.probe_batch(8).inputs)
    assert not torch.equal(some.probe_batch(8).inputs, other.probe_batch(8).inputs)
    for a, b in zip(some.evaluation_batches("test", 9, 4), other.evaluation_batches("test", 9, 4), strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_probe_and_evaluation_show_images_as_they_are(some):
    originals = {
        image.tobytes(): label for image, label in zip(some.pixels["train"], some.labels["train"], strict=True)
    }
    probe = some.probe_batch(12)
    shown = pixels_of(some, probe)
    assert [originals[image.tobytes()] for image in shown] == probe.targets.tolist()
    assert len({image.tobytes() for image in shown}) == 12
    batches = list(some.evaluation_batches("test", 7, 3))
    assert [b.samples for b in batches] == [3, 2, 2]
    rows = np.arange(7) * TEST // 7
    assert np.array_equal(np.concatenate([pixels_of(some, b) for b in batches]), PIXELS["test"][rows])
    with pytest.raises(UserError, match=r"selection.samples=51 exceeds the 50 training samples") as caught:
        some.probe_batch(51)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize(("parts", "sizes"), [(1, [5]), (2, [3, 2]), (9, [1] * 5)])
def test_parts_of_a_batch_make_it_up(some, parts, sizes):
    whole, _ = some.train_batch(0, 5)
    split = whole.to(torch.device("cpu")).split(parts)
    assert [part.samples for part in split] == sizes
    assert torch.equal(torch.cat([part.inputs for part in split]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in split]), whole.targets)
    assert all(part.inputs.is_contiguous(memory_format=torch.channels_last) for part in split)


def test_class_entropy_by_hand(config):
    labels = {"train": np.array([0, 1]), "validation": np.array([0, 0, 1, 3]), "test": np.array([0])}
    pixels = {split: photos(len(values), 3) for split, values in labels.items()}
    wanted = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert Images(config, 0, pixels, labels).facts() == {"class_entropy": pytest.approx(wanted)}
