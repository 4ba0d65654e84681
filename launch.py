"""Run one experiment, or a sweep with -m. ``python launch.py --help`` shows what can be chosen.

Follow a run from here: compose (conf/) -> mat.suite.config.resolve -> mat.suite.engine.run -> the run folder.
"""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mat.suite.config import register_schemas, resolve
from mat.suite.errors import RunFailed, UserError
from mat.suite.explain import explain

register_schemas()
exit_codes = [0]
told: set[str] = set()  # what is wrong with all runs of a sweep is said once
checking = False  # a sweep is composed and validated as a whole before its first run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """One run: validate, then train; what is complete is skipped, what is not is resumed."""
    try:
        config = resolve(composed)
        if checking:
            return
        from mat.suite import engine  # torch is slow to import: --help and typos should answer at once
        from mat.suite.runs import folder_of

        folder = folder_of(config, list(HydraConfig.get().overrides.task))
        summary = engine.run(config, folder)
    except UserError as error:
        if str(error) not in told:
            print(f"error: {error}", file=sys.stderr)
            told.add(str(error))
        exit_codes.append(2)  # the other runs of a sweep go on
        return
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        exit_codes.append(1)
        return
    if summary is None:
        print(f"interrupted: {folder} goes on when the same command is run again", file=sys.stderr)
        raise SystemExit(130)
    print(
        f"{folder}: validation {summary['best_validation_loss']:.4f}, test {summary['test_loss']:.4f} nats, "
        f"{summary['pflops']:.4g} PFLOPs, {summary['seconds']:.0f} s, active share {summary['active_share']:.2f}"
    )


def cli() -> int:
    """Compose and run; what Hydra refuses becomes one sentence."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing in Hydra's own words
    global checking
    try:
        checking = bool({"-m", "--multirun"} & set(sys.argv[1:]))
        if checking:
            main()
            checking = False
        if max(exit_codes) == 0:
            main()
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return max(exit_codes)


if __name__ == "__main__":
    sys.exit(cli())
