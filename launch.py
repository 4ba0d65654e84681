"""Run one experiment, or a sweep with -m. ``python launch.py --help`` shows what can be chosen.

Follow a run from here: compose (conf/) -> mat.config.resolve -> mat.engine.run -> the run folder.
"""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mat.config import register_schemas, resolve
from mat.errors import RunFailed, UserError

register_schemas()
OmegaConf.register_new_resolver("data_root", lambda: __import__("os").environ.get("MAT_DATA"), replace=True)
failures: list[str] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> None:
    """One run: validate, then train; what is complete is skipped, what is not is resumed."""
    try:
        config = resolve(composed)
        from mat import engine  # torch is slow to import: --help and typos should answer at once
        from mat.runs import folder_of

        folder = folder_of(config, list(HydraConfig.get().overrides.task))
        summary = engine.run(config, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        failures.append(str(error))  # the other runs of a sweep go on
        return
    if summary is None:
        print(f"interrupted: {folder} goes on when the same command is run again", file=sys.stderr)
        raise SystemExit(130)
    print(
        f"{folder}: validation {summary['best_validation_loss']:.4f}, test {summary['test_loss']:.4f} nats, "
        f"{summary['pflops']:.4g} PFLOPs, {summary['seconds']:.0f} s, active share {summary['active_share']:.2f}"
    )


if __name__ == "__main__":
    main()
    sys.exit(1 if failures else 0)
