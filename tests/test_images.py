"""Images: decoded, held out, moved, mirrored and normalised as they should be, reproducibly."""

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
from mat.suite.data.images import STORED, ImageBatch, Images
from mat.suite.errors import UserError

SIZE, CLASSES, TRAIN, TEST = 8, 5, 60, 20


def photos(count: int, seed: int, channels: int = 3) -> np.ndarray:
    shape = (count, SIZE, SIZE, channels) if channels == 3 else (count, SIZE, SIZE)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


PIXELS = {"train": photos(TRAIN, 0), "test": photos(TEST, 1)}
LABELS = {"train": np.arange(TRAIN) * 7 % CLASSES, "test": np.arange(TEST) % CLASSES}


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def table(pixels: Any, labels: Any) -> pa.Table:
    rows = [None if image is None else {"bytes": image, "path": None} for image in pixels]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.table({"img": pa.array(rows, kind), "label": pa.array([*labels])})


def write(
    root: Path, names: tuple[str, str] = ("img", "label"), **changed: tuple[Any, Any]
) -> Path:
    """A folder as the hub has it, the training split in two files.

    Args:
        root: The folder above.
        names: Of the columns.
        changed: Images and labels of a split, instead of the usual ones.
    """
    folder = root / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    for split in STORED:
        usual = [encoded(p) for p in PIXELS[split]], LABELS[split]
        whole = table(*changed.get(split, usual)).rename_columns(list(names))
        files = 2 if split == "train" else 1
        size = len(whole) // files
        for file in range(files):
            part = whole.slice(file * size, size)
            pq.write_table(part, folder / f"{split}-{file:05}-of-{files:05}.parquet")
    return folder


def tiny(root: Path | None, cache: Path, **changes: Any) -> ImageConfig:
    values = dict(
        name="tiny",
        hub_path="some/tiny",
        root=None if root is None else str(root),
        local_folder="tiny",
        cache=str(cache),
        source_size=SIZE,
        size=SIZE,
        classes=CLASSES,
        validation=10,
        padding=2,
    )
    return ImageConfig(**(values | changes))


def digits(cache: Path, **changes: Any) -> ImageConfig:
    values = dict(cache=str(cache), source_size=8, size=32, classes=10, validation=300, flip=False)
    return ImageConfig(name="digits", **(values | changes))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ImageConfig:
    root = tmp_path_factory.mktemp("images")
    write(root)
    return tiny(root, root / "cache")


@pytest.fixture
def some(config) -> Images:
    return Images(config, seed=0)


def split_of(some: Images, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All pixels and labels of a split."""
    return some.images(split, np.arange(len(some.splits[split][2])))


def stored(config: ImageConfig) -> dict[str, np.ndarray]:
    """The prepared pixels of the stored splits."""
    some = Images(config, 0)
    return {split: some.splits[split][0] for split in STORED}


def pixels_of(some: Images, batch: ImageBatch) -> np.ndarray:
    """The bytes behind normalised images: (B, size, size, channels)."""
    raw = batch.inputs.permute(0, 2, 3, 1).double().numpy() * some.deviation + some.mean
    assert np.abs(raw - np.rint(raw)).max() < 1e-3
    return np.rint(raw).astype(np.uint8)


# --- from rows to prepared pixels


@pytest.mark.parametrize("names", [("img", "label"), ("image", "labels")])
def test_every_pixel_and_label_is_prepared_in_order(tmp_path, names):
    write(tmp_path, names)
    some = Images(tiny(tmp_path, tmp_path / "cache"), 0)
    for split in STORED:
        pixels, labels, _ = some.splits[split]
        assert np.array_equal(pixels, PIXELS[split]) and np.array_equal(labels, LABELS[split])


def test_grey_images_become_colour_and_colour_becomes_grey(tmp_path):
    grey = photos(TRAIN, 2, channels=1)
    write(tmp_path, train=([encoded(p) for p in grey], LABELS["train"]))
    colour = stored(tiny(tmp_path, tmp_path / "cache"))
    assert np.array_equal(colour["train"], np.repeat(grey[..., None], 3, axis=3))
    single = stored(tiny(tmp_path, tmp_path / "cache", channels=1))
    assert np.array_equal(single["train"], grey[..., None])
    luminance = (PIXELS["test"] @ [0.299, 0.587, 0.114])[..., None]
    assert np.abs(single["test"] - luminance).max() < 2


def test_16_bit_grey_keeps_its_high_byte(tmp_path):
    grey = photos(TRAIN, 2, channels=1)
    deep = grey.astype(np.uint16) * 256 + 77
    write(tmp_path, train=([encoded(p) for p in deep], LABELS["train"]))
    read = stored(tiny(tmp_path, tmp_path / "cache", channels=1))["train"]
    assert np.array_equal(read, grey[..., None])


def test_images_are_turned_as_their_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    image, exact = PIXELS["train"][0], {"quality": 100, "subsampling": 0}
    rows = [encoded(image, "PNG", exif=exif)] * TRAIN
    write(tmp_path, train=(rows, LABELS["train"]))
    read = stored(tiny(tmp_path, tmp_path / "cache"))["train"]
    assert np.array_equal(read[0], np.rot90(image, -1))
    level = np.full_like(image, 0)
    level[:4] = 200
    rows = [encoded(level, "JPEG", exif=exif, **exact)] * TRAIN
    write(tmp_path, train=(rows, LABELS["train"]))
    read = stored(tiny(tmp_path, tmp_path / "cache"))["train"]
    assert np.abs(read[0].astype(int) - np.rot90(level, -1)).max() < 4


def test_images_are_resized_when_asked(tmp_path):
    ramp = np.linspace(0, 248, SIZE)[None, None, :, None]
    level = np.broadcast_to(ramp, (TRAIN, SIZE, SIZE, 3)).astype(np.uint8)
    write(tmp_path, train=([encoded(p) for p in level], LABELS["train"]))
    large = stored(tiny(tmp_path, tmp_path / "cache", size=16))["train"]
    assert large.shape == (TRAIN, 16, 16, 3) and (large == large[:1, :1]).all()
    line = large[0, 0, :, 0].astype(int)
    assert (np.diff(line) >= 0).all() and line[0] == 0 and line[-1] == 248  # a ramp stays one
    assert np.abs(line.reshape(8, 2).mean(1) - level[0, 0, :, 0]).max() <= 5


def test_the_hub_gives_the_same_as_local_files(config, tmp_path, monkeypatch):
    asked = []

    def stand_in(*where: Any, split: str) -> datasets.Dataset:
        asked.append((*where, split))
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        columns = {"img": [Image.fromarray(p) for p in PIXELS[split]], "label": LABELS[split]}
        return datasets.Dataset.from_dict(columns, features)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    hub = Images(tiny(None, tmp_path / "cache"), 0)
    assert asked == [("some/tiny", None, split) for split in STORED]
    assert hub.fingerprint == Images(config, 0).fingerprint


def replaced(index: int, image: Any = "same", label: Any = "same") -> dict[str, Any]:
    """The training split with one row changed."""
    pixels = [encoded(p) for p in PIXELS["train"]]
    labels = LABELS["train"].tolist()
    pixels[index] = pixels[index] if image == "same" else image
    labels[index] = labels[index] if label == "same" else label
    return {"train": (pixels, labels)}


SECOND = "train-00001-of-00002.parquet"  # whose row 5 is row 35 of the split
WHOLE = encoded(PIXELS["train"][0])


def cut(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-200])


def spoil(folder: Path) -> None:
    """The footer is right but the data are not."""
    path = folder / SECOND
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)


def floats(folder: Path) -> None:
    image = encoded(np.zeros((SIZE, SIZE), np.float32), "TIFF")
    write(folder.parent, **replaced(35, image))


def named(folder: Path) -> None:
    names = [f"class {label}" for label in LABELS["train"]]
    write(folder.parent, train=([encoded(p) for p in PIXELS["train"]], names))


DAMAGE: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "dataset.root"),
    "no test split": (lambda f: (f / "test-00000-of-00001.parquet").unlink(), "test*.parquet"),
    "cut off": (cut, f"{SECOND} is not a readable Parquet file (ArrowInvalid): copy it again"),
    "spoilt": (spoil, f"{SECOND} is not a readable Parquet file (OSError): copy it again"),
    "no labels": (
        lambda f: pq.write_table(pa.table({"img": [1]}), f / SECOND),
        f"{SECOND} has 'img' (int64): rename or convert them to one column 'label' of class",
    ),
    "names of classes": (named, "'label' (string): rename or convert them to one column 'label'"),
    "empty": (
        lambda f: write(f.parent, test=([], pa.array([], pa.int64()).to_numpy())),
        "empty test split",
    ),
    "corrupt image": (
        lambda f: write(f.parent, **replaced(35, b"no image")),
        f"{SECOND}, row 5, holds no readable image",
    ),
    "half an image": (
        lambda f: write(f.parent, **replaced(35, WHOLE[:90])),
        f"{SECOND}, row 5, holds no readable image",
    ),
    "missing image": (
        lambda f: write(f.parent, **replaced(35, None)),
        f"{SECOND}, row 5, holds no readable image",
    ),
    "floating point": (floats, f"{SECOND}, row 5, holds 32 bits a pixel"),
    "wrong shape": (
        lambda f: write(f.parent, **replaced(35, encoded(PIXELS["train"][0][:, :6]))),
        f"{SECOND}, row 5, holds an image of 6 x 8 pixels instead of 8 x 8",
    ),
    "label too high": (
        lambda f: write(f.parent, **replaced(35, label=5)),
        f"{SECOND}, row 5, has the label 5",
    ),
    "negative label": (
        lambda f: write(f.parent, **replaced(3, label=-1)),
        "00002.parquet, row 3, has the label -1",
    ),
    "no label": (
        lambda f: write(f.parent, **replaced(35, label=None)),
        f"{SECOND}, row 5, has the label None",
    ),
    "all black": (
        lambda f: write(
            f.parent, train=([encoded(PIXELS["train"][0] * 0)] * TRAIN, LABELS["train"])
        ),
        "the same in all",
    ),
}


def refusal(config: ImageConfig) -> str:
    """The sentence with which images are refused."""
    with pytest.raises(UserError) as caught:
        Images(config, 0)
    assert one_sentence(str(caught.value)), caught.value
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_refused_in_one_sentence(tmp_path, damage):
    act, part = DAMAGE[damage]
    act(write(tmp_path / "data"))
    message = refusal(tiny(tmp_path / "data", tmp_path / "cache"))
    assert part in message and str(tmp_path / "data") in message, message
    left = [path.name for path in (tmp_path / "cache").glob("*")]
    assert damage == "all black" or left in ([], [".lock"])


def test_settings_that_do_not_suit_the_images_are_refused(config, cache):
    held_out = refusal(dataclasses.replace(config, validation=60))
    assert held_out.startswith("dataset.validation=60 leaves none of the 60 training images")
    assert "which is none of the 5 classes" in refusal(digits(cache, classes=5))


def test_second_load_does_not_decode_again(config, monkeypatch):
    first = Images(config, seed=0)
    monkeypatch.setattr(module, "_decode", lambda *arguments: pytest.fail("decoded again"))
    other = dataclasses.replace(config, validation=20, padding=0, flip=False)  # the same pixels
    assert Images(other, seed=5).fingerprint == first.fingerprint
    with pytest.raises(pytest.fail.Exception):
        Images(dataclasses.replace(config, channels=1), seed=0)


def test_damaged_prepared_images_are_made_again(tmp_path, capsys):
    write(tmp_path)
    config = tiny(tmp_path, tmp_path / "cache")
    first = Images(config, 0).fingerprint
    (folder,) = (tmp_path / "cache").glob("tiny-*")
    for file in ("train_images.bin", "test_labels.bin"):
        content = bytearray((folder / file).read_bytes())
        content[17] ^= 4
        (folder / file).write_bytes(content)
        assert Images(config, 0).fingerprint == first
        assert capsys.readouterr().err == f"{folder} is damaged: it is made again.\n"


# --- splits


def test_held_out_images_are_the_same_for_all_seeds_and_evenly_of_every_class(config):
    some, other = (Images(config, seed) for seed in (0, 1))
    for split in some.splits:
        assert np.array_equal(split_of(some, split)[0], split_of(other, split)[0])
    counts = Counter(split_of(some, "validation")[1].tolist())
    assert counts == dict.fromkeys(range(CLASSES), 2)
    rows = {split: some.splits[split][2].tolist() for split in ("train", "validation")}
    assert sorted(rows["train"] + rows["validation"]) == list(range(TRAIN))
    for split, numbers in rows.items():
        pixels, labels = split_of(some, split)
        assert np.array_equal(pixels, PIXELS["train"][numbers]) and numbers == sorted(numbers)
        assert np.array_equal(labels, LABELS["train"][numbers])


def test_digits_need_no_download_and_no_folder(cache):
    some = data.load(digits(cache), seed=0)
    assert isinstance(some, Images) and some.outputs == 10
    sizes = {split: len(rows) for split, (_, _, rows) in some.splits.items()}
    assert sizes == {"train": 1137, "validation": 300, "test": 360}
    (batch,) = some.evaluation_batches("test", None, 360)
    assert batch.inputs.shape == (360, 3, 32, 32)
    assert torch.equal(batch.inputs[:, 0], batch.inputs[:, 2])  # grey repeated
    pixels, _ = split_of(some, "train")
    assert pixels.max() == 255 and pixels.min() == 0
    assert set(Counter(batch.targets.tolist()).values()) <= {34, 35, 36, 37, 38}
    assert some.facts()["class_entropy"] == pytest.approx(math.log(10), abs=1e-3)


@pytest.mark.skipif("MAT_DATA" not in os.environ, reason="needs CIFAR-10 below MAT_DATA")
def test_real_cifar10_is_what_it_should_be(cache):
    root = Path(os.environ["MAT_DATA"])
    real = {"name": "cifar10", "local_folder": "cifar10", "source_size": 32, "size": 32}
    some = Images(tiny(root, cache, **real, classes=10, validation=5000), seed=0)
    sizes = {split: len(rows) for split, (_, _, rows) in some.splits.items()}
    assert sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
    assert set(Counter(split_of(some, "validation")[1].tolist()).values()) == {500}
    assert some.mean / 255 == pytest.approx([0.4914, 0.4822, 0.4465], abs=2e-3)
    assert some.deviation / 255 == pytest.approx([0.2470, 0.2435, 0.2616], abs=2e-3)


# --- batches


def test_pixels_are_normalised_by_the_training_split(some):
    whole = split_of(some, "train")[0].astype(np.float64)
    mean, deviation = whole.mean((0, 1, 2)), whole.std((0, 1, 2))
    assert some.mean == pytest.approx(mean) and some.deviation == pytest.approx(deviation)
    (batch,) = some.evaluation_batches("test", None, 64)
    wanted = torch.from_numpy((PIXELS["test"] - mean) / deviation).permute(0, 3, 1, 2)
    assert batch.inputs.dtype == torch.float32 and batch.inputs.shape == (TEST, 3, SIZE, SIZE)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(batch.inputs.double(), wanted, atol=1e-5)
    assert batch.targets.dtype == torch.int64 and np.array_equal(batch.targets, LABELS["test"])
    assert (batch.samples, batch.length) == (TEST, 1)


def naive_places(image: np.ndarray, padding: int, flip: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every way an image can be moved and mirrored."""
    places = {}
    side = SIZE + 2 * padding
    for mirrored in (False, True) if flip else (False,):
        canvas = np.zeros((side, side, image.shape[2]), np.uint8)
        shown = image[:, ::-1] if mirrored else image
        canvas[padding : padding + SIZE, padding : padding + SIZE] = shown
        for down in range(2 * padding + 1):
            for right in range(2 * padding + 1):
                moved = canvas[down : down + SIZE, right : right + SIZE]
                places[moved.tobytes()] = (down, right, mirrored)
    return places


@pytest.mark.parametrize(
    ("padding", "flip", "channels"), [(2, True, 3), (1, False, 3), (0, True, 3), (2, True, 1)]
)
def test_training_images_are_moved_and_mirrored_one_by_one(config, padding, flip, channels):
    changes = {"padding": padding, "flip": flip, "channels": channels}
    some = Images(dataclasses.replace(config, **changes), seed=0)
    originals, stored_labels = split_of(some, "train")
    places = {i: naive_places(image, padding, flip) for i, image in enumerate(originals)}
    ways = Counter()
    for step in range(120):
        batch, _ = some.train_batch(step, 25)
        rows, _, _ = some._train_rows(step, 25)
        assert np.array_equal(batch.targets, stored_labels[rows])
        for row, image in zip(rows, pixels_of(some, batch), strict=True):
            ways[places[int(row)][image.tobytes()]] += 1  # a KeyError if it is not that image
    count, kinds = 120 * 25, (2 * padding + 1) ** 2 * (1 + flip)
    assert len(ways) == kinds
    deviation = math.sqrt(count / kinds)
    assert all(abs(n - count / kinds) < 5 * deviation for n in ways.values())  # each as often
    assert np.array_equal(split_of(some, "train")[0], originals)


@pytest.mark.parametrize(("batch", "sizes"), [(20, [20, 20, 10]), (25, [25, 25]), (64, [50])])
def test_every_epoch_takes_each_image_once(config, batch, sizes):
    some = Images(dataclasses.replace(config, padding=0, flip=False), seed=0)
    wanted = sorted(image.tobytes() for image in split_of(some, "train")[0])
    orders = []
    assert some.steps_per_epoch(batch) == len(sizes)
    for epoch in range(2):
        drawn = [some.train_batch(epoch * len(sizes) + i, batch) for i in range(len(sizes))]
        assert [b.samples for b, _ in drawn] == sizes and {e for _, e in drawn} == {epoch}
        orders.append([image.tobytes() for b, _ in drawn for image in pixels_of(some, b)])
        assert sorted(orders[-1]) == wanted
    assert orders[0] != orders[1] or len(sizes) == 1


def test_batches_depend_on_seed_and_step_alone(config):
    some, twin, other = (Images(config, seed) for seed in (0, 0, 1))
    for step in (4, 1):  # in any order
        ours, theirs = (loaded.train_batch(step, 16)[0] for loaded in (some, twin))
        assert torch.equal(ours.inputs, theirs.inputs)
    fresh = Images(config, 0).train_batch(9, 16)[0]
    assert torch.equal(fresh.inputs, some.train_batch(9, 16)[0].inputs)
    for draw in (lambda loaded: loaded.train_batch(1, 16)[0], lambda loaded: loaded.probe_batch(8)):
        assert torch.equal(draw(some).inputs, draw(twin).inputs)
        assert not torch.equal(draw(some).inputs, draw(other).inputs)
    ours, theirs = (loaded.evaluation_batches("test", 9, 4) for loaded in (some, other))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


def test_probe_and_evaluation_show_images_as_they_are(some):
    pairs = zip(*split_of(some, "train"), strict=True)
    originals = {image.tobytes(): label for image, label in pairs}
    probe = some.probe_batch(12)
    shown = pixels_of(some, probe)
    assert [originals[image.tobytes()] for image in shown] == probe.targets.tolist()
    assert len({image.tobytes() for image in shown}) == 12
    batches = list(some.evaluation_batches("test", 7, 3))
    assert [b.samples for b in batches] == [3, 2, 2]
    rows = np.arange(7) * TEST // 7
    read = np.concatenate([pixels_of(some, b) for b in batches])
    assert np.array_equal(read, PIXELS["test"][rows])
    with pytest.raises(UserError, match="=51 exceeds the 50 training samples") as caught:
        some.probe_batch(51)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize(("parts", "sizes"), [(1, [5]), (2, [3, 2]), (9, [1] * 5)])
def test_parts_of_a_batch_make_it_up(some, parts, sizes):
    whole, _ = some.train_batch(0, 5)
    split = whole.to(torch.device("cpu")).split(parts)
    assert [part.samples for part in split] == sizes
    assert torch.equal(torch.cat([part.inputs for part in split]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in split]), whole.targets)
    channels_last = {"memory_format": torch.channels_last}
    assert all(part.inputs.is_contiguous(**channels_last) for part in split)


def test_class_entropy_by_hand(some):
    some.splits["validation"] = (PIXELS["train"], np.array([0, 0, 1, 3]), np.arange(4))
    wanted = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert some.facts() == {"class_entropy": pytest.approx(wanted)}
