"""What a run computes, apart from where and how fast: the names of run folders, and what two runs
differ in.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from mat.suite.config import GROUPS, Config

# Keys that recorded runs have and configurations no longer do, at the value that says what is
# computed now.
RETIRED = {
    "selection.cut_last": 0,
    "hardware.gather_block": 16,  # now constants of mat/layers/convolution.py
    "hardware.gather_share": 0.75,
}
# Keys that say where and how a run was made, not what was computed.
INCIDENTAL = (
    "seed",
    "runs",
    "name",
    "analysis",
    "tracking",
    "dataset.root",
    "dataset.cache",
    "method.matched",  # a path; the engine compares what the run there did
    "train.checkpoint_steps",
    "hardware.threads",
    "hardware.graphs",
    "hardware.exclusive",
)
LONGEST_NAME = 200  # bytes; file systems allow 255


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _is_incidental(key: str) -> bool:
    return any(f"{key}.".startswith(f"{incidental}.") for incidental in INCIDENTAL)


def science(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a recorded run computed, by dotted key; before a key existed runs had its default."""
    defaults = {
        f"{group}.{f.name}": f.default_factory() if callable(f.default_factory) else f.default
        for group, schemas in GROUPS.items()
        if len(schemas) == 1 and group not in ("model", "dataset")  # there a file names the class
        for f in fields(schemas[0][1])
        if f.default is not MISSING
    }
    recorded = {k: v for k, v in flatten(config).items() if RETIRED.get(k, MISSING) != v}
    return {k: v for k, v in {**defaults, **recorded}.items() if not _is_incidental(k)}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every dotted key in which two recorded configurations compute something
    else.
    """
    here, there = science(one), science(other)
    pairs = {key: (here.get(key), there.get(key)) for key in sorted(here.keys() | there.keys())}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def folder_of(config: Config, overrides: list[str]) -> Path:
    """Where a run lives.

    Args:
        config: Its configuration.
        overrides: The command line's overrides, as Hydra gives them.

    Returns:
        ``<runs>/<name>/<overrides without seed>/seed=<n>``, a value always written in one way; very
        long overrides end in a hash of them all.
    """
    values, named = flatten(asdict(config)), []
    for override in overrides:
        key, _, given = override.lstrip("+~").partition("=")
        key = key.partition("@")[0]
        text = _text(values[key]) if "." in key and key in values else given
        if key == "method.matched":
            text = text.removesuffix(f"/seed={config.seed}")  # so that seeds stand side by side
        elif (
            key in ("experiment", "hardware")
            or _is_incidental(key)
            or (key, given) == ("hardware.precision", "auto")
        ):
            continue
        named.append(f"{key}={text}".replace("/", "_"))
    leaf = ",".join(sorted(set(named))) or "default"
    if len(leaf.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(leaf.encode()).hexdigest()[:12]
        leaf = f"{leaf.encode()[: LONGEST_NAME - 13].decode(errors='ignore')}-{digest}"
    return Path(config.runs) / config.name / leaf / f"seed={config.seed}"


def _text(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
