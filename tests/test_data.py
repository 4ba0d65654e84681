"""Text, tokens and masks: the right text, tokenised once in bounded memory, hidden reproducibly."""

import dataclasses
import errno
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
from mat.suite.data import source, tokens
from mat.suite.data.masking import MaskedBatch, mask, masked_per_sequence
from mat.suite.data.tokens import SPECIAL, SPLITS, MaskedText, lines
from mat.suite.errors import UserError

LINES = {
    "train": [
        "",
        " = Title = \n",
        *["the cat <unk> on the mat , unhappily\n", "dogs and <unk> cats ran\n"] * 40,
    ],
    "validation": ["the dog <unk> on the cat\n"] * 12,
    "test": ["cats ran and the mat ran\n"] * 12,
}
MASK_ID, FIRST = SPECIAL.index("[MASK]"), len(SPECIAL)


def write(root: Path, text: dict[str, Any] = LINES, column: str = "text") -> Path:
    """A folder as the hub has it, one Parquet file per split."""
    folder = root / "wikitext-2"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = pa.array(text[split], pa.string()) if isinstance(text[split], list) else text[split]
        pq.write_table(pa.table({column: rows}), folder / f"{split}-00000-of-00001.parquet")
    return folder


def wikitext(root: Path | None, cache: Path = Path("unused"), **changes: Any) -> TextConfig:
    values = dict(
        name="wikitext2",
        hub_path="Salesforce/wikitext",
        hub_name="wikitext-2-v1",
        local_folder="wikitext-2",
        root=None if root is None else str(root),
        cache=str(cache),
        vocabulary=64,
        length=8,
    )
    return TextConfig(**(values | changes))


def pydocs(cache: Path, **changes: Any) -> TextConfig:
    values = dict(name="pydocs", cache=str(cache), vocabulary=256, length=16)
    return TextConfig(**(values | changes))


def read_text(config: TextConfig) -> dict[str, list[str]]:
    """All lines of every split."""
    return {s: [line for piece in lines(config, s, "reading") for line in piece] for s in SPLITS}


def prepared(config: TextConfig) -> Path:
    """The folder of a corpus's tokens, made if need be."""
    return Path(MaskedText(config, 0).sequences["test"].base.filename).parent


def ids_of(folder: Path) -> dict[str, np.ndarray]:
    """All tokens of every split."""
    return {split: np.fromfile(folder / f"{split}.bin", np.uint16) for split in SPLITS}


def left_in(cache: Path) -> list[Path]:
    """What a cache folder holds beside its lock."""
    return [path for path in cache.glob("*") if path.name != ".lock"]


def refusal(config: TextConfig) -> str:
    """The sentence with which a corpus is refused."""
    with pytest.raises(UserError) as caught:
        MaskedText(config, 0)
    assert one_sentence(str(caught.value)), caught.value
    return str(caught.value)


@pytest.fixture(scope="module")
def corpus(cache: Path) -> MaskedText:
    return MaskedText(pydocs(cache), seed=0)


@pytest.fixture
def toy(cache: Path) -> MaskedText:
    """Ten training sequences whose tokens name their row."""
    text = MaskedText(pydocs(cache, length=8, mask_share=0.25), seed=3)
    rows = np.repeat(np.arange(FIRST, FIRST + 10, dtype=np.uint16)[:, None], 8, axis=1)
    text.sequences, text.count, text.outputs = dict.fromkeys(SPLITS, rows), 10, 20
    return text


# --- text


def test_pydocs_gives_every_topic_to_one_split(cache):
    text = {split: "\n".join(rows) for split, rows in read_text(pydocs(cache)).items()}
    whole = {name: "\n".join(topics[name].splitlines()) for name in topics}
    homes = {name: [s for s in SPLITS if whole[name] in text[s]] for name in topics}
    assert all(len(home) == 1 for home in homes.values()), homes
    shares = Counter(home[0] for home in homes.values())
    assert min(shares.values()) >= 5 and shares["train"] > 0.7 * len(topics)


KINDS = {
    "string": pa.string(),
    "large string": pa.large_string(),
    "string view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_any_arrow_type_is_read(tmp_path, kind):
    rows = ["a", None, "b", "\u00e9", "a"]
    folder = write(tmp_path, {**LINES, "test": pa.array(rows).cast(KINDS[kind])})
    stored = pq.read_schema(folder / "test-00000-of-00001.parquet").field("text").type
    assert stored == KINDS[kind]
    assert read_text(wikitext(tmp_path)) == {**LINES, "test": ["a", "", "b", "\u00e9", "a"]}


def test_several_parquet_files_are_read_in_order(tmp_path):
    folder = write(tmp_path / "odd [1] * folder")  # nothing in a path is a pattern
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00001-of-00002.parquet")
    pq.write_table(pa.table({"text": ["first"]}), folder / "train-00000-of-00002.parquet")
    assert read_text(wikitext(folder.parent))["train"] == ["first", *LINES["train"]]


def truncate(folder: Path) -> None:
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])


def latin(*rows: bytes) -> pa.Array:
    """A string column that holds these bytes."""
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(rows), pa.py_buffer(ends), pa.py_buffer(b"".join(rows)))


DAMAGE = {
    "no folder": (shutil.rmtree, "dataset.root"),
    "no test split": (lambda f: (f / "test-00000-of-00001.parquet").unlink(), "test*.parquet"),
    "a folder": (lambda f: (f / "train.parquet").mkdir(), "cannot be read (Is a directory)"),
    "truncated": (truncate, "copy it again"),
    "not Parquet": (lambda f: (f / "train.parquet").write_text("text"), "train.parquet"),
    "wrong column": (lambda f: write(f.parent, column="page"), "'page' (string)"),
    "wrong type": (
        lambda f: write(f.parent, {**LINES, "train": pa.array([1, 2])}),
        "'text' (int64): rename or convert them to one column 'text' of strings",
    ),
    "no UTF-8": (
        lambda f: write(f.parent, {**LINES, "test": latin(b"a", b"caf\xe9")}),
        "test-00000-of-00001.parquet, row 1, is no UTF-8 text",
    ),
    "empty split": (lambda f: write(f.parent, {**LINES, "validation": []}), "empty validation"),
    "blank split": (lambda f: write(f.parent, {**LINES, "test": ["", " \n"]}), "empty test"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_files_are_refused_in_one_sentence(tmp_path, damage):
    act, part = DAMAGE[damage]
    act(write(tmp_path / "data"))
    message = refusal(wikitext(tmp_path / "data", tmp_path / "cache"))
    assert part in message and str(tmp_path / "data") in message, message
    assert not left_in(tmp_path / "cache")


def test_sequence_longer_than_a_split_is_refused(tmp_path):
    write(tmp_path)
    message = refusal(wikitext(tmp_path, tmp_path / "cache", length=500))
    assert message.startswith("dataset.length=500 is longer than the validation split")
    assert str(tmp_path / "wikitext-2") in message


def test_hub_gives_every_split(monkeypatch):
    asked = []

    def stand_in(*where: str, split: str) -> datasets.Dataset:
        asked.append((*where, split))
        return datasets.Dataset.from_dict({"text": LINES[split]})

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert read_text(wikitext(None)) == LINES
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1", split) for split in SPLITS]


def test_hub_out_of_reach_is_one_sentence(monkeypatch, tmp_path):
    def fail(*where: str, split: str) -> None:
        raise ConnectionError("a long story\nover several lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refusal(wikitext(None, tmp_path))
    assert all(part in message for part in ("ConnectionError", "MAT_DATA", "wikitext-2/*.parquet"))


def test_files_without_a_hub_say_so(tmp_path):
    slice_of = {"name": "enwiki2015", "hub_path": None, "local_folder": "wikitext-103-slice"}
    message = refusal(wikitext(None, tmp_path, **slice_of))
    assert message.startswith("dataset=enwiki2015 is not on the hub: ")
    assert "wikitext-103-slice/" in message
    assert "choose other data" in refusal(wikitext(tmp_path, tmp_path, **slice_of))


@pytest.mark.skipif("MAT_DATA" not in os.environ, reason="needs the real data below MAT_DATA")
@pytest.mark.parametrize(
    ("name", "rows", "words", "unknown"),  # of training text; the other splits are the same text
    [("wikitext2", 36_718, 2_088_628, 54_625), ("enwiki2015", 297_667, 15_007_729, 0)],
)
def test_real_text_is_what_it_should_be(name, rows, words, unknown):
    text = read_text(resolve(composed(f"dataset={name}")).dataset)
    assert [len(text[s]) for s in SPLITS] == [rows, 3_760, 4_358]
    counts = [sum(len(line.split()) + 1 for line in text[s]) for s in SPLITS]  # a line ends in one
    assert counts == [words, 217_646, 245_569]
    assert sum(line.count("<unk>") for line in text["train"]) == unknown


# --- tokens


def test_unk_is_one_special_token_and_never_split(tmp_path):
    write(tmp_path)
    folder = prepared(wikitext(tmp_path, tmp_path / "cache"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces, ids = tokenizer.get_vocab(), ids_of(folder)
    assert [pieces[name] for name in SPECIAL] == list(range(len(SPECIAL))) and len(pieces) <= 64
    assert not any("unk" in piece and piece != "[UNK]" for piece in pieces)
    unknown = {split: int((ids[split] == pieces["[UNK]"]).sum()) for split in SPLITS}
    assert unknown == {split: sum(line.count("<unk>") for line in LINES[split]) for split in SPLITS}
    text = tokenizer.decode(ids["test"].tolist()).replace(" ##", "")
    assert text == " ".join(LINES["test"]).replace("\n", "")


def test_names_of_special_pieces_in_a_text_are_plain_words(tmp_path):
    text = ["[mask] of a cat, [pad] of a dog\n"] * 20
    literal = [line.replace("mask", "MASK").replace("pad", "PAD") for line in text]
    ids = []
    for number, rows in enumerate((text, literal)):
        write(tmp_path / str(number), {**LINES, "train": rows})
        ids.append(ids_of(prepared(wikitext(tmp_path / str(number), tmp_path / "cache")))["train"])
    assert np.array_equal(*ids) and ids[0].min() >= FIRST


@pytest.mark.timeout(60)
def test_overlong_words_are_unknown_and_cost_no_more(tmp_path):
    """Quadratic time would be minutes here."""
    long = ["a" * 1_000_000, "b," * 20_000, "the cat " * 20_000]
    write(tmp_path, {**LINES, "validation": [*LINES["validation"], *long], "train": long})
    folder = prepared(wikitext(tmp_path, tmp_path / "cache"))
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    ids = ids_of(folder)["train"]
    assert ids[0] == pieces["[UNK]"] and (ids == pieces["[UNK]"]).sum() == 1
    assert len(ids) == 1 + 2 * 20_000 + 2 * 20_000 and {"the", "cat", "b", ","} <= set(pieces)
    assert not any("aa" in piece for piece in pieces)


def test_tokens_in_pieces_are_those_of_the_whole_text(tmp_path, monkeypatch):
    folder, rows = write(tmp_path), prose(1000)
    for shard, (first, last) in enumerate(((0, 700), (700, 900), (900, 1000))):
        part = pa.table({"text": rows[first:last]})
        pq.write_table(part, folder / f"train-0000{shard}-of-00003.parquet")
    (folder / "train-00000-of-00001.parquet").unlink()
    monkeypatch.setattr(source, "PIECE", 64)
    config = wikitext(tmp_path, tmp_path / "cache", vocabulary=256)
    text = read_text(config)
    assert text["train"] == rows
    tokenizer = Tokenizer.from_file(str(prepared(config) / "tokenizer.json"))
    for split, ids in ids_of(prepared(config)).items():
        known = [line.replace("<unk>", "[UNK]") for line in text[split] if line.strip()]
        assert ids.tolist() == [i for line in tokenizer.encode_batch(known) for i in line.ids]
    assert not MaskedText(config, 0).sequences["train"].flags.writeable


def prose(count: int) -> list[str]:
    """Lines of twelve common words each, some with an unknown one."""
    words = [word for word, _ in Counter(" ".join(topics.values()).split()).most_common(300)]
    unknown = [" <unk> \n" * (i % 7 > 0) for i in range(count)]
    return [" ".join(words[i % 97 : i % 97 + 12]) + unknown[i] for i in range(count)]


def test_pieces_have_no_use_for_what_never_stands_inside_a_word(tmp_path):
    write(tmp_path, {**LINES, "train": ["ab, -c (d) <unk>\n"] * 30})
    folder = prepared(wikitext(tmp_path, tmp_path / "cache"))
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert set(pieces) == {*SPECIAL, "##b", "a", "b", "c", "d", ",", "-", "(", ")", "ab"}
    assert max(pieces.values()) == len(pieces) - 1


def in_another_process(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script that finds ``mat``."""
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=path, **options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Tokenising ten times the text takes little more; at once it takes some 100 bytes a token."""
    configs = []
    for count in (500, 5_500):
        text = ["the cat sat on the mat and the dog ran from the cat to the mat " * 6] * count
        folder = write(tmp_path / str(count), {**LINES, "train": text})
        configs.append(dataclasses.asdict(wikitext(folder.parent, tmp_path / "cache")))
    done = in_another_process(f"""
from mat.suite.data import source
source.PIECE = 512
from mat.suite.config import TextConfig
from mat.suite.data.tokens import MaskedText
def memory(which):
    status = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(which))
warm, *configs = {[configs[0], *configs]!r}
MaskedText(TextConfig(**(warm | dict(vocabulary=65))), 0)  # imports
for config in configs:
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    print(MaskedText(TextConfig(**config), 0).sequences["train"].size, memory("VmHWM") - before)
""")
    assert done.returncode == 0, done.stderr
    (few, _), (many, growth) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert many == 11 * few > 500_000
    assert growth < 40 * (many - few), done.stdout


# --- what is prepared


def test_prepared_data_are_found_again_by_content_and_settings(tmp_path, monkeypatch):
    write(tmp_path / "a")
    config = wikitext(tmp_path / "a", tmp_path / "cache")
    first = MaskedText(config, 0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # the same text at another time and place
    with monkeypatch.context() as patched:
        patched.setattr(tokens, "encode", lambda *arguments: pytest.fail("tokenised again"))
        moved = dataclasses.replace(config, root=str(tmp_path / "b"), length=4, mask_share=0.3)
        assert MaskedText(moved, 5).fingerprint == first.fingerprint
    fewer = dataclasses.replace(config, vocabulary=40)
    prints = {first.fingerprint, MaskedText(fewer, 0).fingerprint}
    for split in SPLITS:  # other data in any split
        write(tmp_path / "a", {**LINES, split: [*LINES[split], "the mat ran\n"]})
        prints.add(MaskedText(config, 0).fingerprint)
    assert len(prints) == len(left_in(tmp_path / "cache")) == 5


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("train.bin", act) for act in (empty, flip, halve, Path.unlink)),
        ("tokenizer.json", flip),
        *(("checksums.json", act) for act in (empty, flip, Path.unlink)),
    ],
)
def test_damaged_prepared_data_are_made_again(tmp_path, capsys, file, damage):
    write(tmp_path)
    config = wikitext(tmp_path, tmp_path / "cache")
    first = MaskedText(config, 0)
    (folder,) = left_in(tmp_path / "cache")
    damage(folder / file)
    again = MaskedText(config, 0)
    assert capsys.readouterr().err == f"{folder} is damaged: it is made again.\n"
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.sequences["train"], MaskedText(config, 0).sequences["train"])
    assert capsys.readouterr().err == ""


def test_failure_while_preparing_leaves_nothing_behind(tmp_path, monkeypatch):
    write(tmp_path)

    def fail(config: TextConfig, folder: Path) -> None:
        (folder / "train.bin").write_text("half")
        raise MemoryError

    monkeypatch.setattr(tokens, "encode", fail)
    with pytest.raises(MemoryError):
        MaskedText(wikitext(tmp_path, tmp_path / "cache"), 0)
    assert left_in(tmp_path / "cache") == []


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    write(tmp_path)
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refusal(wikitext(tmp_path, cache))
        assert message.startswith(f"dataset.cache={cache} cannot be written (")

    def full(config: TextConfig, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokens, "encode", full)
    message = refusal(wikitext(tmp_path, tmp_path / "cache"))
    assert "(No space left on device): make room there" in message
    assert left_in(tmp_path / "cache") == []


def test_full_disk_while_tokenising_is_one_sentence(tmp_path):
    write(tmp_path, {**LINES, "train": prose(5_000)})
    config = dataclasses.asdict(wikitext(tmp_path, tmp_path / "cache"))
    done = in_another_process(f"""
import resource
from mat.suite.config import TextConfig
from mat.suite.data.tokens import MaskedText
from mat.suite.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may be larger
try:
    MaskedText(TextConfig(**{config!r}), 0)
except UserError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert one_sentence(done.stdout) and "cannot be written (File too large)" in done.stdout
    assert left_in(tmp_path / "cache") == []


def test_other_runs_of_a_sweep_wait_for_the_one_that_prepares(tmp_path, monkeypatch):
    write(tmp_path)
    encode, calls = tokens.encode, []

    def slow(config: TextConfig, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.3)
        encode(config, folder)

    monkeypatch.setattr(tokens, "encode", slow)
    config = wikitext(tmp_path, tmp_path / "cache")
    runs = [threading.Thread(target=MaskedText, args=[config, 0]) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(calls) == 1 and len(left_in(tmp_path / "cache")) == 1


KILLED = """
import os, signal
from mat.suite.config import TextConfig
from mat.suite.data import tokens
def struck(config, split, doing):
    yield from lines(config, split, doing)
    if split == "validation":
        os.kill(os.getpid(), signal.{signal})
lines, tokens.lines = tokens.lines, struck
tokens.MaskedText(TextConfig(**{config!r}), 0)
"""


def test_a_killed_run_is_cleaned_up_and_started_again(tmp_path):
    write(tmp_path, {**LINES, "train": prose(500)})
    config = wikitext(tmp_path, tmp_path / "cache", vocabulary=256)
    values = dataclasses.asdict(config)
    done = in_another_process(KILLED.format(signal="SIGKILL", config=values))
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = left_in(tmp_path / "cache")
    assert left.name.startswith(".unfinished-wikitext2-")
    (tmp_path / "cache" / ".unfinished-other").mkdir()  # what another dataset's killed run left
    written = {name: (left / name).read_bytes() for name in ("tokenizer.json", "train.bin")}
    folder = prepared(config)
    assert left_in(tmp_path / "cache") == [folder] and ".unfinished-" + folder.name == left.name
    # The same text gives the same tokens in another process, whose hash maps are seeded otherwise.
    assert {name: (folder / name).read_bytes() for name in written} == written


def test_ctrl_c_while_preparing_is_one_sentence(tmp_path):
    root = Path(__file__).parents[1]
    script = f"""
import os, runpy, signal, sys
from mat.suite.data import tokens
def struck(config, split, doing):
    yield from lines(config, split, doing)
    os.kill(os.getpid(), signal.SIGINT)
lines, tokens.lines = tokens.lines, struck
sys.argv = ["launch.py", "dataset.cache={tmp_path}/cache", "runs={tmp_path}/runs", "hardware=cpu"]
runpy.run_path({str(root / "launch.py")!r}, run_name="__main__")
"""
    done = in_another_process(script, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("interrupted: ") and len(done.stderr.splitlines()) == 1
    assert left_in(tmp_path / "cache") == []


def test_sequences_are_the_tokens_in_order(corpus, cache):
    for split, ids in ids_of(prepared(pydocs(cache))).items():
        rows = corpus.sequences[split]
        assert rows.shape == (len(ids) // 16, 16)
        assert np.array_equal(rows.reshape(-1), ids[: rows.size])


def test_unigram_entropy_by_hand(toy, monkeypatch):
    toy.sequences["validation"] = np.array([[5, 5, 5, 5], [6, 6, 7, 8]], dtype=np.uint16)
    monkeypatch.setattr(tokens, "BLOCK", 1)
    wanted = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert toy.facts() == {"unigram_entropy": pytest.approx(wanted)}


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
    assert len(sizes) == 1 or orders[0] != orders[1] != orders[2]


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
    own = torch.arange(33)[:, None].expand(33, 2)
    assert torch.equal(per_sample // 16, own)  # sorted by sample
    assert (per_sample[:, 0] < per_sample[:, 1]).all()
    assert torch.equal(restored(batch), torch.from_numpy(rows.astype(np.int64)))
    assert all(t.dtype == torch.int64 for t in vars(batch).values())


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
    assert places == pytest.approx(torch.full((16,), 1 / 16), abs=deviation)  # each as likely


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_masks_depend_on_seed_and_step_alone(corpus, cache):
    twin, other = (MaskedText(pydocs(cache), seed) for seed in (0, 1))
    assert same(corpus.train_batch(5, 8)[0], twin.train_batch(5, 8)[0])
    for a, b in [
        (corpus.train_batch(6, 8)[0], twin.train_batch(5, 8)[0]),
        (corpus.train_batch(5, 8)[0], other.train_batch(5, 8)[0]),
        (corpus.probe_batch(8), other.probe_batch(8)),
    ]:
        assert not torch.equal(a.inputs, b.inputs) and not torch.equal(a.positions, b.positions)
    assert same(corpus.probe_batch(8), twin.probe_batch(8))
    ours, theirs = (text.evaluation_batches("test", 40, 16) for text in (corpus, other))
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_sequence_gets_new_masks_in_every_epoch(toy):
    shown = [toy.train_batch(epoch, 10)[0] for epoch in range(2)]
    assert torch.equal(restored(shown[0]), restored(shown[1]))
    assert not torch.equal(shown[0].positions, shown[1].positions)


def test_evaluation_takes_evenly_spaced_samples_masked_alike_at_any_batch_size(corpus):
    batches = list(corpus.evaluation_batches("validation", 40, 16))
    assert sum(b.samples for b in batches) == 40 and max(b.samples for b in batches) <= 16
    whole = corpus.sequences["validation"]
    rows = np.linspace(0, len(whole), 40, endpoint=False).astype(int)
    assert np.array_equal(torch.cat([restored(b) for b in batches]).numpy(), whole[rows])
    single = torch.cat([b.inputs for b in corpus.evaluation_batches("validation", 40, 1)])
    assert torch.equal(single, torch.cat([b.inputs for b in batches]))
    for samples in (None, 10**6):
        everything = corpus.evaluation_batches("validation", samples, 16)
        assert np.array_equal(torch.cat([restored(b) for b in everything]).numpy(), whole)


def test_long_splits_are_masked_block_by_block(corpus, monkeypatch):
    split = corpus.sequences["validation"]
    whole = next(corpus.evaluation_batches("validation", None, 10**6))  # fewer than BLOCK
    assert same(whole, corpus._masked(split, [tokens.EVALUATION, 1, 0]))
    monkeypatch.setattr(tokens, "BLOCK", 50)
    blocks = list(corpus.evaluation_batches("validation", None, 32))
    assert max(b.samples for b in blocks) <= 32
    assert torch.equal(torch.cat([restored(b) for b in blocks]), restored(whole))
    shown = torch.cat([b.inputs for b in blocks])
    second = corpus._masked(split[50:100], [tokens.EVALUATION, 1, 1])
    assert torch.equal(shown[50:100], second.inputs)
    some = torch.cat([b.inputs for b in corpus.evaluation_batches("validation", 40, 16)])
    assert torch.equal(some, shown[torch.arange(40) * whole.samples // 40])


def test_probe_larger_than_the_data_is_refused(toy):
    with pytest.raises(UserError, match="=11 exceeds the 10 training samples") as caught:
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
