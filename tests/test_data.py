"""Text, tokens and masks: the right text, tokenised once in bounded memory, hidden reproducibly."""

import dataclasses
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from short_runs import composed, one_sentence
from tokenizers import Tokenizer

from mat.suite.compose import resolve
from mat.suite.config import TextConfig
from mat.suite.data import tokens
from mat.suite.data.masking import MaskedBatch, mask, masked_per_sequence
from mat.suite.data.text import SPLITS, open_text
from mat.suite.data.tokens import SPECIAL, MaskedText, cached_tokens
from mat.suite.errors import UserError

LINES = {
    "train": ["", " = Title = \n", *["the cat <unk> on the mat , unhappily\n", "dogs and <unk> cats ran\n"] * 40],
    "validation": ["the dog <unk> on the cat\n"] * 12,
    "test": ["cats ran and the mat ran\n"] * 12,
}
MASK_ID, FIRST = SPECIAL.index("[MASK]"), len(SPECIAL)


def write(root: Path, lines: dict[str, list[Any]] = LINES, *, column: str = "text", kind: pa.DataType | None = None):
    """A folder as the hub has it, one Parquet file per split."""
    folder = root / "wikitext-2"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        pq.write_table(pa.table({column: pa.array(lines[split], kind)}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def wikitext(root: Path | None, cache: Path = Path("unused"), **changes: Any) -> TextConfig:
    values = dict(
        name="wikitext2", hub_path="Salesforce/wikitext", hub_name="wikitext-2-v1", local_folder="wikitext-2",
        root=None if root is None else str(root), cache=str(cache), vocabulary=64, length=8,
    )  # fmt: skip
    return TextConfig(**(values | changes))


def pydocs(cache: Path, **changes: Any) -> TextConfig:
    return TextConfig(**(dict(name="pydocs", cache=str(cache), vocabulary=256, length=16) | changes))


def read_text(config: TextConfig) -> dict[str, list[str]]:
    """All lines of every split."""
    text = {
        split: (lines.rows, [line for piece in lines for line in piece]) for split, lines in open_text(config).items()
    }
    assert all(rows == len(lines) for rows, lines in text.values())
    return {split: lines for split, (_, lines) in text.items()}


def left_in(cache: Path) -> list[Path]:
    """What a cache folder holds beside its lock."""
    return [path for path in cache.glob("*") if path.name != ".lock"]


@pytest.fixture(scope="module")
def corpus(cache: Path) -> MaskedText:
    return MaskedText.load(pydocs(cache), seed=0)


@pytest.fixture
def toy() -> MaskedText:
    """Ten training sequences whose tokens name their row."""
    rows = np.repeat(np.arange(FIRST, FIRST + 10, dtype=np.uint16)[:, None], 8, axis=1)
    return MaskedText(TextConfig(length=8, mask_share=0.25), 3, 20, MASK_ID, dict.fromkeys(SPLITS, rows))


# --- text


def test_pydocs_gives_every_topic_to_one_split(cache):
    splits = read_text(pydocs(cache))
    text = {split: "\n".join(lines) for split, lines in splits.items()}
    homes = {name: [s for s in SPLITS if "\n".join(topics[name].splitlines()) in text[s]] for name in topics}
    assert all(len(home) == 1 for home in homes.values()), homes
    shares = Counter(home[0] for home in homes.values())
    assert min(shares.values()) >= 5 and shares["train"] > 0.7 * len(topics)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_gives_the_lines_of_every_split(tmp_path, kind):
    write(tmp_path, {**LINES, "test": ["a", None, "b"]}, kind=kind)
    splits = read_text(wikitext(tmp_path))
    assert splits == {**LINES, "test": ["a", "", "b"]}


def test_several_parquet_files_are_read_in_order(tmp_path):
    folder = write(tmp_path)
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": ["first"]}), folder / "train-00000-of-00002.parquet")
    assert read_text(wikitext(tmp_path))["train"] == ["first", *LINES["train"]]


def truncate(folder: Path) -> None:
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


DAMAGE = {
    "no folder": (shutil.rmtree, "dataset.root"),
    "no test split": (lambda folder: (folder / "test-00000-of-00001.parquet").unlink(), "test*.parquet"),
    "truncated": (truncate, "copy it again"),
    "not Parquet": (lambda folder: (folder / "train.parquet").write_text("text"), "train.parquet"),
    "wrong column": (lambda folder: write(folder.parent, column="page"), "no column 'text'"),
    "wrong type": (lambda folder: write(folder.parent, {split: [1, 2] for split in SPLITS}), "no column 'text'"),
    "empty split": (lambda folder: write(folder.parent, {**LINES, "validation": []}, kind=pa.string()), "validation"),
    "blank split": (lambda folder: write(folder.parent, {**LINES, "test": ["", " \n"]}), "test"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_refused_in_one_sentence(tmp_path, damage):
    act, part = DAMAGE[damage]
    act(write(tmp_path / "data"))
    with pytest.raises(UserError) as caught:
        MaskedText.load(wikitext(tmp_path / "data", tmp_path / "cache"), seed=0)
    message = str(caught.value)
    assert part in message and one_sentence(message), message
    assert str(tmp_path / "data") in message, message
    assert not left_in(tmp_path / "cache")


def test_sequence_longer_than_a_split_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"dataset.length=500 is longer than the validation split") as caught:
        MaskedText.load(wikitext(tmp_path, tmp_path / "cache", length=500), seed=0)
    assert one_sentence(str(caught.value)) and str(tmp_path / "wikitext-2") in str(caught.value)


def test_hub_is_asked_for_all_splits(monkeypatch):
    asked = []

    def stand_in(*arguments: Any) -> dict[str, datasets.Dataset]:
        asked.append(arguments)
        return {split: datasets.Dataset.from_dict({"text": LINES[split]}) for split in SPLITS}

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert read_text(wikitext(None)) == LINES
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1")]


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    def fail(*arguments: Any) -> None:
        raise ConnectionError("a long story\nover several lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"ConnectionError.*MAT_DATA.*wikitext-2/\*\.parquet") as caught:
        read_text(wikitext(None))
    assert one_sentence(str(caught.value))


@pytest.mark.skipif("MAT_DATA" not in os.environ, reason="needs the real WikiText-2 below MAT_DATA")
def test_real_wikitext_2_is_what_it_should_be():
    splits = read_text(wikitext(Path(os.environ["MAT_DATA"])))
    assert {s: len(splits[s]) for s in SPLITS} == {"train": 36718, "validation": 3760, "test": 4358}
    words = {s: sum(len(line.split()) for line in splits[s]) for s in SPLITS}
    assert words == {"train": 2051910, "validation": 213886, "test": 241211}
    assert any("<unk>" in line for line in splits["train"])


@pytest.mark.skipif("MAT_DATA" not in os.environ, reason="needs wikitext-103-slice below MAT_DATA")
def test_real_enwiki2015_is_what_it_should_be():
    """Of the training split the first of three files."""
    read = open_text(resolve(composed("dataset=enwiki2015")).dataset)
    lines = {split: list(itertools.islice(itertools.chain.from_iterable(read[split]), 99_285)) for split in SPLITS}
    assert {s: read[s].rows for s in SPLITS} == {"train": 297_667, "validation": 3760, "test": 4358}
    counts = {s: sum(len(line.split()) + 1 for line in lines[s]) for s in SPLITS}  # a line ends with one
    assert counts == {"train": 5_007_638, "validation": 217_646, "test": 245_569}
    unknown = {s: sum(line.count("<unk>") for line in lines[s]) for s in SPLITS}
    assert unknown == {"train": 0, "validation": 1657, "test": 2492}  # WikiText-103's training text has some


# --- tokens


def test_unk_is_one_special_token_and_never_split(tmp_path):
    write(tmp_path)
    config = wikitext(tmp_path, tmp_path / "cache")
    folder = cached_tokens(config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = tokenizer.get_vocab()
    assert [pieces[name] for name in SPECIAL] == list(range(len(SPECIAL)))
    assert not any("unk" in piece and piece != "[UNK]" for piece in pieces)
    ids = {split: np.load(folder / f"{split}.npy") for split in SPLITS}
    unknown = {split: int((ids[split] == pieces["[UNK]"]).sum()) for split in SPLITS}
    assert unknown == {split: sum(line.count("<unk>") for line in LINES[split]) for split in SPLITS}
    assert tokenizer.decode(ids["test"].tolist()).replace(" ##", "") == " ".join(LINES["test"]).replace("\n", "")
    assert len(pieces) <= config.vocabulary and all(values.dtype == np.uint16 for values in ids.values())


def test_second_load_does_not_tokenise_again(tmp_path, monkeypatch):
    write(tmp_path)
    config = wikitext(tmp_path, tmp_path / "cache")
    first = MaskedText.load(config, seed=0)
    monkeypatch.setattr(tokens, "encode", lambda *arguments: pytest.fail("tokenised again"))
    again = MaskedText.load(dataclasses.replace(config, length=4), seed=5)  # neither needs other tokens
    assert np.array_equal(again.sequences["test"].reshape(-1)[:8], first.sequences["test"][0])


def test_cache_is_keyed_by_data_and_settings(tmp_path):
    write(tmp_path / "a")
    config = wikitext(tmp_path / "a", tmp_path / "cache")
    folders = [cached_tokens(config), cached_tokens(dataclasses.replace(config, vocabulary=65))]
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # the same text at another time and place
    assert cached_tokens(dataclasses.replace(config, root=str(tmp_path / "b"))) == folders[0]
    write(tmp_path / "a", {**LINES, "test": ["other text"]})
    folders += [cached_tokens(config), cached_tokens(pydocs(tmp_path / "cache", vocabulary=64))]
    assert len(set(folders)) == 4 and cached_tokens(config) == folders[2]


def test_failure_while_encoding_leaves_nothing_behind(tmp_path, monkeypatch):
    write(tmp_path)
    config = wikitext(tmp_path, tmp_path / "cache")

    def fail(config: TextConfig, folder: Path) -> None:
        (folder / "train.npy").write_text("half")
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(tokens, "encode", fail)
        cached_tokens(config)
    assert left_in(tmp_path / "cache") == []


def test_other_runs_of_a_sweep_wait_for_the_one_that_tokenises(tmp_path, monkeypatch):
    write(tmp_path)
    config = wikitext(tmp_path, tmp_path / "cache")
    encode, calls = tokens.encode, []

    def slow(config: TextConfig, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.3)
        encode(config, folder)

    monkeypatch.setattr(tokens, "encode", slow)
    runs = [threading.Thread(target=cached_tokens, args=[config]) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(calls) == 1 and left_in(tmp_path / "cache") == [cached_tokens(config)]


def in_another_process(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script that finds ``mat``."""
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=path)


def prose(lines: int) -> list[str]:
    """Lines of twelve common words each, some with an unknown one."""
    words = [word for word, _ in Counter(" ".join(topics.values()).split()).most_common(300)]
    return [" ".join(words[i % 97 : i % 97 + 12]) + " <unk> \n" * (i % 7 > 0) for i in range(lines)]


def test_a_killed_run_is_cleaned_up_and_started_again(tmp_path):
    write(tmp_path, {**LINES, "train": prose(500)})
    config = wikitext(tmp_path, tmp_path / "cache", vocabulary=256)
    done = in_another_process(f"""
import os, signal
from mat.suite.config import TextConfig
from mat.suite.data import tokens
def killed(*arguments):
    yield from encoded(*arguments)  # which is written
    os.kill(os.getpid(), signal.SIGKILL)
encoded, tokens.encoded = tokens.encoded, killed
tokens.cached_tokens(TextConfig(**{dataclasses.asdict(config)!r}))
""")
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = left_in(tmp_path / "cache")
    assert left.name.startswith(".unfinished-wikitext2-256-") and (left / "test.npy").is_file()
    (tmp_path / "cache" / ".unfinished-other").mkdir()  # what another dataset's killed run left
    tokenizer = (left / "tokenizer.json").read_bytes()
    folder = cached_tokens(config)
    assert left_in(tmp_path / "cache") == [folder] and ".unfinished-" + folder.name == left.name
    assert {path.stem for path in folder.iterdir()} == {"tokenizer", *SPLITS}
    # The same text gives the same tokens in another process too, whose hash maps are seeded otherwise.
    assert (folder / "tokenizer.json").read_bytes() == tokenizer


def in_one_piece(config: TextConfig) -> dict[str, np.ndarray]:
    """The tokens of all splits, each tokenised as a whole with the cached tokenizer."""
    tokenizer = Tokenizer.from_file(str(cached_tokens(config) / "tokenizer.json"))
    ids = {}
    for split, lines in read_text(config).items():
        known = [line.replace("<unk>", "[UNK]") for line in lines if line.strip()]
        ids[split] = np.array([i for line in tokenizer.encode_batch(known) for i in line.ids], dtype=np.uint16)
    return ids


def test_streamed_tokens_are_those_of_the_whole_text(tmp_path, monkeypatch):
    folder = write(tmp_path)
    lines = prose(1000)
    for shard in range(3):  # of 700, 200 and 100 lines
        first, last = ((0, 700), (700, 900), (900, 1000))[shard]
        pq.write_table(pa.table({"text": lines[first:last]}), folder / f"train-0000{shard}-of-00003.parquet")
    (folder / "train-00000-of-00001.parquet").unlink()
    monkeypatch.setattr("mat.suite.data.sources.PIECE", 64)
    config = wikitext(tmp_path, tmp_path / "cache", vocabulary=256)
    assert read_text(config)["train"] == lines
    for split, ids in in_one_piece(config).items():
        np.save(tmp_path / "whole.npy", ids)
        streamed = cached_tokens(config) / f"{split}.npy"
        assert streamed.read_bytes() == (tmp_path / "whole.npy").read_bytes() and len(ids) > 50
        assert not np.load(streamed, mmap_mode="r").flags.writeable


def test_pieces_have_no_use_for_what_never_stands_inside_a_word(tmp_path):
    write(tmp_path, {**LINES, "train": ["ab, -c (d) <unk>\n"] * 30})
    config = wikitext(tmp_path, tmp_path / "cache")
    pieces = Tokenizer.from_file(str(cached_tokens(config) / "tokenizer.json")).get_vocab()
    assert set(pieces) == {*SPECIAL, "##b", "a", "b", "c", "d", ",", "-", "(", ")", "ab"}
    assert "<" not in pieces and max(pieces.values()) == len(pieces) - 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's record of peak memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Tokenising four times the text takes little more than that did; at once it takes some 100 bytes a token."""
    configs = []
    for lines in (2_000, 8_000):
        text = ["the cat sat on the mat and the dog ran from the cat to the mat " * 6] * lines
        folder = write(tmp_path / str(lines), {**LINES, "train": text})
        configs.append(dataclasses.asdict(wikitext(folder.parent, tmp_path / "cache")))
    done = in_another_process(f"""
from mat.suite.data import sources
sources.PIECE = 256
from mat.suite.config import TextConfig
from mat.suite.data.tokens import cached_tokens
def memory(which):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(which))
for config in {configs!r}:
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    print(cached_tokens(TextConfig(**config)), memory("VmHWM") - before)
""")
    assert done.returncode == 0, done.stderr
    (small, _), (large, growth) = (line.split() for line in done.stdout.splitlines())
    few, many = (len(np.load(Path(folder) / "train.npy", mmap_mode="r")) for folder in (small, large))
    assert many == 4 * few > 500_000
    assert int(growth) < 20 * (many - few), done.stdout


def test_files_without_a_hub_say_so(tmp_path):
    config = wikitext(None, tmp_path, name="enwiki2015", hub_path=None, local_folder="wikitext-103-slice")
    with pytest.raises(UserError, match=r"dataset=enwiki2015 is not on the hub: .*wikitext-103-slice/") as caught:
        MaskedText.load(config, seed=0)
    assert one_sentence(str(caught.value))
    with pytest.raises(UserError, match="choose another dataset") as caught:
        MaskedText.load(dataclasses.replace(config, root=str(tmp_path)), seed=0)
    assert one_sentence(str(caught.value))


def test_sequences_are_the_tokens_in_order(corpus, cache):
    for split in SPLITS:
        ids = np.load(cached_tokens(pydocs(cache)) / f"{split}.npy")
        rows = corpus.sequences[split]
        assert rows.shape == (len(ids) // 16, 16) and np.array_equal(rows.reshape(-1), ids[: rows.size])


def test_unigram_entropy_by_hand(monkeypatch):
    rows = {"train": np.zeros((1, 4), np.uint16), "validation": np.array([[5, 5, 5, 5], [6, 6, 7, 8]], dtype=np.uint16)}
    text = MaskedText(TextConfig(length=4), 0, 9, MASK_ID, rows)
    monkeypatch.setattr(tokens, "BLOCK", 1)
    wanted = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert text.facts() == {"unigram_entropy": pytest.approx(wanted)}


# --- batches


@pytest.mark.parametrize(("batch", "sizes"), [(4, [4, 4, 2]), (5, [5, 5]), (10, [10]), (64, [10])])
def test_every_epoch_takes_each_sequence_once(toy, batch, sizes):
    orders = []
    for epoch in range(3):
        drawn = [toy.train_batch(epoch * len(sizes) + i, batch) for i in range(len(sizes))]
        assert [b.samples for b, _ in drawn] == sizes and {e for _, e in drawn} == {epoch}
        rows = [int(row) for b, _ in drawn for row in restored(b)[:, 0] - FIRST]
        assert sorted(rows) == list(range(10))
        orders.append(rows)
    if len(sizes) > 1:
        assert orders[0] != orders[1] != orders[2]


def restored(batch: MaskedBatch) -> torch.Tensor:
    """The tokens with the targets back in place."""
    flat = batch.inputs.reshape(-1).clone()
    flat[batch.positions] = batch.targets
    return flat.view_as(batch.inputs)


def test_masking_hides_the_same_number_in_every_sequence():
    rows = np.random.default_rng(0).integers(FIRST, 50, (33, 16), dtype=np.uint16)
    batch = mask(rows, 0.15, MASK_ID, FIRST, 50, [1])
    assert masked_per_sequence(16, 0.15) == 2 and masked_per_sequence(4, 0.01) == 1
    per_sample = batch.positions.view(33, 2)
    assert torch.equal(per_sample // 16, torch.arange(33)[:, None].expand(33, 2))  # sorted by sample, all its own
    assert (per_sample[:, 0] < per_sample[:, 1]).all()
    assert torch.equal(restored(batch), torch.from_numpy(rows.astype(np.int64)))
    assert all(t.dtype == torch.int64 for t in (batch.inputs, batch.positions, batch.targets))


def test_masking_shares_are_80_10_10_and_never_draw_special_tokens():
    vocabulary, n = 1000, 40_000
    rows = np.full((n // 4, 16), FIRST, dtype=np.uint16)
    batch = mask(rows, 0.25, MASK_ID, FIRST, vocabulary, [2])
    shown = batch.inputs.reshape(-1)[batch.positions]
    assert len(shown) == n and (batch.targets == FIRST).all()
    shares = [float((shown == value).float().mean()) for value in (MASK_ID, FIRST)]
    deviation = 4 * math.sqrt(0.25 / n)
    assert shares == pytest.approx([0.8, 0.1], abs=deviation)
    drawn = shown[(shown != MASK_ID) & (shown != FIRST)]
    assert drawn.min() >= FIRST and drawn.max() == vocabulary - 1
    assert len(drawn) / n == pytest.approx(0.1, abs=deviation)
    places = torch.bincount(batch.positions % 16, minlength=16) / n
    assert places == pytest.approx(torch.full((16,), 1 / 16), abs=deviation)  # every place is as likely


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip((a.inputs, a.positions), (b.inputs, b.positions), strict=True))


def test_masks_depend_on_seed_and_step_alone(corpus, cache):
    twin, other = (MaskedText.load(pydocs(cache), seed) for seed in (0, 1))
    assert same(corpus.train_batch(5, 8)[0], twin.train_batch(5, 8)[0])
    for a, b in [(corpus.train_batch(6, 8)[0], twin.train_batch(5, 8)[0]),
                 (corpus.train_batch(5, 8)[0], other.train_batch(5, 8)[0]),
                 (corpus.probe_batch(8), other.probe_batch(8))]:  # fmt: skip
        assert not torch.equal(a.inputs, b.inputs) and not torch.equal(a.positions, b.positions)
    assert same(corpus.probe_batch(8), twin.probe_batch(8))
    for a, b in zip(corpus.evaluation_batches("test", 40, 16), other.evaluation_batches("test", 40, 16), strict=True):
        assert same(a, b)


def test_a_sequence_gets_new_masks_in_every_epoch(toy):
    shown = [toy.train_batch(epoch, 10)[0] for epoch in range(2)]
    assert torch.equal(restored(shown[0]), restored(shown[1]))
    assert not torch.equal(shown[0].positions, shown[1].positions)


def test_evaluation_takes_evenly_spaced_samples_whose_masks_do_not_depend_on_the_batch(corpus):
    batches = list(corpus.evaluation_batches("validation", 40, 16))
    assert sum(b.samples for b in batches) == 40 and max(b.samples for b in batches) <= 16
    whole = corpus.sequences["validation"]
    rows = np.linspace(0, len(whole), 40, endpoint=False).astype(int)
    assert np.array_equal(torch.cat([restored(b) for b in batches]).numpy(), whole[rows])
    one_by_one = corpus.evaluation_batches("validation", 40, 1)
    assert torch.equal(torch.cat([b.inputs for b in one_by_one]), torch.cat([b.inputs for b in batches]))
    for samples in (None, 10**6):
        everything = corpus.evaluation_batches("validation", samples, 16)
        assert np.array_equal(torch.cat([restored(b) for b in everything]).numpy(), whole)


def test_long_splits_are_masked_block_by_block(corpus, monkeypatch):
    whole = next(corpus.evaluation_batches("validation", None, 10**6))  # fewer than BLOCK
    first = corpus._masked(corpus.sequences["validation"], [tokens.EVALUATION, 1])
    assert same(whole, first)  # as before there were blocks
    monkeypatch.setattr(tokens, "BLOCK", 50)
    blocks = list(corpus.evaluation_batches("validation", None, 32))
    assert max(b.samples for b in blocks) <= 32 and sum(b.samples for b in blocks) == whole.samples
    assert torch.equal(torch.cat([restored(b) for b in blocks]), restored(whole))
    shown = torch.cat([b.inputs for b in blocks])
    assert torch.equal(shown[0], corpus._masked(corpus.sequences["validation"][:50], [tokens.EVALUATION, 1]).inputs[0])
    some = torch.cat([b.inputs for b in corpus.evaluation_batches("validation", 40, 16)])
    assert torch.equal(some, shown[torch.arange(40) * whole.samples // 40])


def test_probe_larger_than_the_data_is_refused(toy):
    with pytest.raises(UserError, match=r"selection.samples=11 exceeds the 10 training samples") as caught:
        toy.probe_batch(11)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize(("parts", "sizes"), [(1, [5]), (2, [3, 2]), (5, [1] * 5), (9, [1] * 5)])
def test_parts_of_a_batch_make_it_up(toy, parts, sizes):
    whole, _ = toy.train_batch(0, 5)
    split = whole.split(parts)
    assert [part.samples for part in split] == sizes
    assert torch.equal(torch.cat([restored(part) for part in split]), restored(whole))
    assert torch.equal(torch.cat([part.inputs for part in split]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in split]), whole.targets)
