"""Run one experiment, or a sweep with -m. ``python launch.py --help`` shows what can be chosen.

Follow a run from here: compose (conf/) -> mat.suite.compose.resolve -> mat.suite.engine.run -> the
run folder.
"""

import os
import shlex
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mat.suite.compose import explain, quote_paths, register_schemas, resolve
from mat.suite.errors import RunFailed
from mat.suite.files import keep_streams, say
from mat.suite.science import folder_of

register_schemas()
checking = False  # everything is composed and validated as a whole before the first run
sweeping = False  # as Hydra understands the command line
jobs: dict[Path, list[str]] = {}  # overrides of all runs, by folder
refused: dict[Path | None, str] = {}  # what was wrong with them
INTERRUPTED = 130


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """One run: validate, then train; what is complete is skipped, what is not is resumed."""
    global sweeping
    folder = None
    try:
        config, overrides = resolve(composed), list(HydraConfig.get().overrides.task)
        folder = folder_of(config, overrides)
        if checking:
            sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
            jobs[folder] = overrides
            return
        # Torch is slow to import: --help and typos should answer at once
        from mat.suite import engine

        summary = engine.run(config, folder)
    except RunFailed as error:
        say(f"failed: {error}")
        return
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if sentence not in refused.values():  # what is wrong with all runs of a sweep is said once
            say(f"error: {sentence}")
        refused[folder] = sentence
        return
    if summary is None:
        say(f"interrupted: {folder} goes on when the same command is run again")
        raise SystemExit(INTERRUPTED)
    say(
        f"{folder}: validation {summary['best_validation_loss']:.4f}, test "
        f"{summary['test_loss']:.4f} nats, {summary['pflops']:.4g} PFLOPs, "
        f"{summary['seconds']:.0f} s, active share {summary['active_share']:.2f}",
        sys.stdout,
    )


def check(arguments: list[str]) -> bool:
    """Compose and validate all runs, in this process, whatever the launcher; whether there is
    something to run.
    """
    global checking
    checking, sys.argv[1:] = True, [a for a in arguments if not a.startswith("hydra/launcher=")]
    if len(sys.argv) <= len(arguments):
        sys.argv.append("hydra/launcher=basic")
    main()
    checking, sys.argv[1:] = False, arguments
    return bool(jobs) and not refused


def outcome() -> int:
    """The exit code, from the run folders; of a sweep whose runs are not all complete a table,
    too.
    """
    from mat.suite.glance import state_of

    states = {f: ("refused", refused[f]) if f in refused else state_of(f) for f in jobs}
    codes = {"complete": 0, "refused": 2, "failed": 1}
    if sweeping and any(state != "complete" for state, _ in states.values()):
        shared = set.intersection(*map(set, jobs.values()))
        for folder, (state, sentence) in states.items():
            own = " ".join(o for o in jobs[folder] if o not in shared)
            say(f"{state:<11} {own}: {sentence or folder}")
        say(f"To go on: {shlex.join(['python', 'launch.py', *sys.argv[1:]])}")
    return max(codes.get(state, INTERRUPTED) for state, _ in states.values())


def cli() -> int:
    """Check all runs, then run them."""
    keep_streams()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing in Hydra's own words
    sys.argv[1:] = quote_paths(sys.argv[1:])
    try:
        if not check(sys.argv[1:]):
            return 2 if refused else 0
        try:
            main()
        except SystemExit as ended:
            if ended.code != INTERRUPTED:
                raise
        return outcome()
    except KeyboardInterrupt:
        say("interrupted: nothing is lost, the same command goes on")
        return INTERRUPTED
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        say(f"error: {sentence}")
        return 2


if __name__ == "__main__":
    sys.exit(cli())
