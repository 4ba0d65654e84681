"""Bad configurations and damaged run folders, generated: each is told in one sentence, or runs and
is right.

``python -m tests.robust`` prints what each of them came to, and ends with exit code 1 if one broke
the promise: exit code 2 and one sentence that names the key or the file, or the numbers of a run
that nothing happened to.
"""

import dataclasses
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mat.suite.compose import CONF
from mat.suite.config import GROUPS, Config
from tests.short_runs import assert_same, one_sentence, result, small_overrides

COUNT = 60  # of each kind
LAUNCH = CONF.parent / "launch.py"
WRONG = {"int": "1.5", "float": "fast", "bool": "maybe", "list[float]": "[a]", "list[str]": "3"}


def launch(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command line in a folder."""
    done = subprocess.run(
        [sys.executable, str(LAUNCH), *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stderr


def configurations() -> Iterator[tuple[str, str]]:
    """Arguments that make no sense, with what the sentence must name."""
    for group, schemas in {"": (("", Config),), **GROUPS}.items():
        if group:
            yield f"{group}=nonsense", f"{group}=nonsense"
            yield f"{group}=null", "group"
        for field in dataclasses.fields(schemas[0][1]) if group != "model" else ():
            key = f"{group}.{field.name}".lstrip(".")
            kind = getattr(field.type, "__name__", str(field.type))
            kind = str(field.type) if "list" in str(field.type) else kind
            if kind in WRONG:
                yield f"{key}={WRONG[kind]}", key
            if "bounds" in field.metadata and "list" not in kind:
                low, high, _ = field.metadata["bounds"]
                whole = kind.startswith("int")
                yield f"{key}={int(low) - 1 if whole else low - 1}", key
                yield f"{key}={10**30 if whole else '.nan'}", key
                if high < 1e9:
                    yield f"{key}={int(high) * 2 if whole else high * 2}", key
            if "options" in field.metadata:
                yield f"{key}=nonsense", key
            yield f"{key}x=1", f"{key}x"


def refused(arguments: str, named: str, folder: Path) -> str:
    """What a bad configuration came to."""
    code, error = launch(folder, arguments)
    sentence = error.removeprefix("error: ")
    if (
        code == 2
        and one_sentence(sentence)
        and named in sentence
        and not any(folder.rglob("seed=*"))
    ):
        return "told"
    return f"BROKEN ({code}): {error[-300:]}"


def _cut(path: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def _flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _noise(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    content[start : start + 64] = chance.randbytes(64)
    path.write_bytes(content)


def _swap(path: Path, chance: random.Random) -> None:
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    shutil.copy(chance.choice(others), path)


DAMAGES = {
    "empty": lambda path, chance: path.write_bytes(b""),
    "gone": lambda path, chance: path.unlink(),
    "a folder": lambda path, chance: (path.unlink(), path.mkdir()),
    "cut": _cut, "one bit": _flip, "noise": _noise, "another file": _swap,
}  # fmt: skip


def damaged(run: Path, whole: Path, command: list[str], number: int) -> tuple[str, str]:
    """What a damaged folder was, and what it came to."""
    chance = random.Random(number)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
    complete = (run / "summary.json").is_file()
    path, how = chance.choice(files), chance.choice(list(DAMAGES))
    DAMAGES[how](path, chance)
    what = f"{path.relative_to(run)}: {how}"
    code, error = launch(run.parents[3], *command)
    shown = subprocess.run(
        [sys.executable, "-m", "mat.show", str(run)],
        cwd=CONF.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if "Traceback" in error + shown.stderr:
        return what, f"BROKEN: {(error + shown.stderr)[-300:]}"
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    if code == 2 and len(lines) == 1 and one_sentence(lines[0].removeprefix("error: ")):
        return f"{what}: {lines[0][:60]} ... {lines[0][-60:]}", "told"
    if code:
        return what, f"BROKEN ({code}): {error[-300:]}"
    if complete and path.parent.name == "checkpoint":  # which a complete run does not read
        shutil.rmtree(path.parent)
        shutil.copytree(whole / "checkpoint", path.parent)
    try:
        assert_same(result(run), result(whole))
    except (AssertionError, OSError) as difference:
        return what, f"BROKEN: other numbers ({difference})"
    return what, "mended, and said so" if error else "right"


def runs(folder: Path) -> tuple[list[str], Path, Path]:
    """A command, and the folders of a run of it that is complete, and of one that was stopped
    half-way.
    """
    command = small_overrides(folder / "cache", "method=mat", "runs=runs", steps=26)
    (folder / "whole").mkdir()
    assert launch(folder / "whole", *command)[0] == 0
    whole = next((folder / "whole").rglob("seed=0"))
    half = folder / "half" / whole.relative_to(folder / "whole")
    program = (
        "import os, signal, sys; from pathlib import Path; from mat.suite import engine;"
        "from tests.short_runs import run_interrupted, small;"
        "run_interrupted(small(Path(sys.argv[1]), 'method=mat', steps=26), Path(sys.argv[2]), "
        "'_train_step', 10, 'sigterm')"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(folder / "cache"), str(half)],
        cwd=CONF.parent,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tests"},
    )
    return command, whole, half


def main() -> int:
    """Command line."""
    outcomes: Counter[str] = Counter()

    def note(kind: str, what: str, outcome: str) -> None:
        outcomes[f"{kind}: {outcome.partition(' (')[0].partition(':')[0]}"] += 1
        print(f"{outcome:<20} {kind}  {what}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "empty").mkdir()
        for arguments, named in random.Random(0).sample(sorted(configurations()), COUNT):
            note("configuration", arguments, refused(arguments, named, folder / "empty"))
        command, whole, half = runs(folder)
        for number, source in zip(range(COUNT), itertools.cycle((half, whole)), strict=False):
            place = (
                folder
                / str(number)
                / source.relative_to(folder / source.relative_to(folder).parts[0])
            )
            shutil.copytree(source, place)
            note("damage", *damaged(place, whole, command, number))
            shutil.rmtree(folder / str(number))
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:>4} {outcome}")
    return int(any("BROKEN" in outcome for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
