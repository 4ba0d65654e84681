"""Mirrors of the run folder: wandb, and the progress bar. Neither can stop a run, and nothing reads
them back.
"""

import logging
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from tqdm import tqdm

from mat.suite.config import Config
from mat.suite.files import hush

log = logging.getLogger(__name__)
MODES = ("online", "offline", "disabled")  # of WANDB_MODE


class Mirror:
    """wandb as a view of the run folder. The first failure is reported in one line and ends the
    mirroring.

    Args:
        run: An initialised wandb run (or a stand-in that records); None for a mirror that shows
            nothing.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, event: dict[str, Any]) -> None:
        """Send one event of ``metrics.jsonl``, its numbers named by kind of event; the x axis is
        the step.
        """
        kind = event["event"]
        numbers = {
            f"{kind}/{k}": v for k, v in event.items() if isinstance(v, int | float) and k != "step"
        }
        self._attempt(lambda: self._run.log(numbers, step=event["step"]))

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Send the summary, which a failed or interrupted run does not have, and close."""
        if summary is not None:
            self._attempt(lambda: self._run.summary.update(summary))
        self._attempt(lambda: self._run.finish(exit_code=0 if summary is not None else 1))

    def _attempt(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:  # a dashboard must never cost a run
            log.warning("wandb stopped mirroring this run (%s); the run folder goes on", error)
            self._run = None


def open_mirror(config: Config, folder: Path) -> Mirror:
    """The mirror that the configuration asks for; offline without a key or a network.

    Args:
        config: The run's configuration.
        folder: The run folder; wandb's own files go below it.

    Returns:
        A mirror. If wandb cannot start at all, one that shows nothing, with a warning.
    """
    asked = os.environ.get("WANDB_MODE") or "online"
    if asked not in MODES:
        log.warning(
            "WANDB_MODE=%s is none of %s; the run folder goes on alone", asked, ", ".join(MODES)
        )
    if not config.tracking.wandb or asked not in MODES[:2]:
        return Mirror(None)
    try:
        import wandb

        online = _has_key() and asked == "online"
        modes: list[Literal["online", "offline"]] = ["online", "offline"] if online else ["offline"]
        identity = folder / "wandb.id"  # a resumed run goes on where its mirror stopped
        if not identity.is_file():
            identity.write_text(uuid.uuid4().hex[:12])
        for mode in modes:
            try:
                run = wandb.init(
                    project=config.tracking.project,
                    entity=config.tracking.entity,
                    dir=str(folder),
                    name=f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name}",
                    config=asdict(config),
                    id=identity.read_text(),
                    resume="allow" if mode == "online" else None,
                    mode=mode,
                    settings=wandb.Settings(init_timeout=20, silent=True),
                )
                return Mirror(run)
            except Exception as error:  # no network, a wrong key: the mirror goes offline
                log.warning("wandb could not start %s (%s)", mode, error)
    except Exception as error:  # wandb itself is broken
        log.warning("wandb could not start (%s); the run folder goes on alone", error)
    return Mirror(None)


def _has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment, or where ``wandb login``
    puts it.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(str(host)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Progress:
    """A progress bar over the run's FLOPs: ETA, loss, active share, PFLOPs.

    Args:
        pflops: The run's length.
        done: PFLOPs spent before (resumed runs).
        shown: Whether to show it.
        label: What stands before the bar.
    """

    def __init__(self, pflops: float, done: float, shown: bool, label: str) -> None:
        self._pflops = pflops
        self._bar: tqdm[Any] | None = None
        if shown:
            self._attempt(lambda: self._begin(100 * done / pflops, label))

    def _begin(self, done: float, label: str) -> None:
        self._bar = tqdm(
            total=100.0,
            initial=done,
            desc=label,
            mininterval=1.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            dynamic_ncols=True,
        )

    def update(
        self, pflops: float, loss: float, active_share: float, validation: float | None
    ) -> None:
        """Show the present state."""
        if (bar := self._bar) is None:
            return
        text = f"loss {loss:.3f}" + (f" val {validation:.3f}" if validation is not None else "")
        text += f" active {active_share:.0%} {pflops:.4g}/{self._pflops:.4g} PFLOPs"
        bar.set_postfix_str(text, refresh=False)
        self._attempt(lambda: bar.update(min(100 * pflops / self._pflops, 100.0) - bar.n))

    def close(self) -> None:
        """Leave the last line standing."""
        if self._bar is not None:
            self._attempt(self._bar.close)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError):  # nobody reads standard error any more
            hush(sys.stderr)
            self._bar = None
