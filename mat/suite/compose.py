"""From the command line to a validated configuration; what Hydra or the system refuses becomes one
sentence.
"""

import difflib
import errno
import os
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from mat.suite.config import GROUPS, Config
from mat.suite.errors import UserError
from mat.suite.science import flatten
from mat.suite.validation import validate

CONF = Path(__file__).resolve().parents[2] / "conf"
PATHS = ("method.matched", "dataset.root", "dataset.cache", "runs")


def register_schemas() -> None:
    """Give Hydra the schemas (``schema``, ``<group>/schema_<name>``) and the resolvers.

    ``${data_root:}`` is the folder in MAT_DATA or null; ``${marks:p,20,5,10}`` scales the marks 5
    and 10 of a run of 20 PFLOPs to a run of p; ``${groups:}`` is what ``--help`` says about the
    groups.
    """
    resolvers: dict[str, Any] = {
        "data_root": lambda: os.environ.get("MAT_DATA") or None,
        "groups": lambda: describe_groups(CONF),
        "marks": lambda pflops, total, *marks: [pflops * mark / total for mark in marks],
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, schemas in GROUPS.items():
        for name, node in schemas:
            store.store(group=group, name=f"schema_{name}", node=node)


def quote_paths(arguments: Sequence[str]) -> list[str]:
    """The command line with quotes around the paths of run folders, whose ``=`` and ``,`` Hydra
    would split at.
    """
    quoted = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        plain = key in PATHS and "=" in value and not set("'\"$") & set(value)
        quoted.append(f"{key}='{value}'" if plain else argument)
    return quoted


def describe_groups(conf: Path) -> str:
    """Every group's options, each with the comment that its file begins with."""
    lines = []
    for group in sorted(path for path in conf.iterdir() if path.is_dir() and path.name != "hydra"):
        lines.append(f"{group.name}")
        for file in sorted(group.glob("*.yaml")):
            written = file.read_text(encoding="utf-8").splitlines()
            comments = [line[2:] for line in written if re.match("# (?!@)", line)]
            lines.append(f"  {file.stem:<21} {comments[0] if comments else ''}".rstrip())
    return "\n".join(lines).replace("$", "$$")  # Hydra takes the text for a template


def resolve(composed: DictConfig) -> Config:
    """Turn what Hydra composed into dataclasses and validate them.

    Raises:
        UserError: If a key is unknown, or a value is missing or senseless.
    """
    known = keys()
    given: Any = OmegaConf.to_container(composed)
    for key in flatten(given):
        if key not in known:  # added with +key=value
            raise UserError(unknown_key(key))
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(
                f"{missing[0]} has no value: set it on the command line, as in {missing[0]}=..."
            )
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be resolved: give it a plain value.") from error
    assert isinstance(config, Config)
    validate(config)
    return config


def keys() -> dict[str, Any]:
    """All keys with their types."""
    found = {f.name: f.type for f in fields(Config)}
    for group, schemas in GROUPS.items():
        for _, node in schemas:
            found |= {f"{group}.{f.name}": f.type for f in fields(node)}
    return found


def unknown_key(key: str) -> str:
    """The sentence for a key that does not exist, with the nearest that does."""
    known = list(keys())
    near = [k for k in known if k.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
    return f"{key} is not a key: " + (
        f"did you mean {near[0]}?" if near else "python launch.py --help shows them."
    )


_TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers, as in [0.1, 0.2]",
    list[str]: "a list, as in [a, b]",
}
_REMEDIES = {  # of what the system refuses
    errno.ENOSPC: "make room, then run the same command again",
    errno.EDQUOT: "make room, then run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "try another disk",
}


def explain(error: BaseException) -> str | None:
    """What was refused, in one sentence that names the key or the path, and the remedy.

    Args:
        error: What was raised.

    Returns:
        The sentence, or None if the error is a bug.
    """
    text, cause = str(error), error.__cause__
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.filename is not None and error.errno is not None:
        remedy = _REMEDIES.get(
            error.errno, "choose a place that can be written, or take away what is in the way"
        )
        return f"{error.filename} cannot be used ({os.strerror(error.errno).lower()}): {remedy}."
    # Torch raises RuntimeError
    if isinstance(error, MemoryError) or ("alloc" in text and "memory" in text):
        return "the run needs more memory than there is: lower train.batch or the model's size."
    if isinstance(error, UnicodeEncodeError):
        return f"the terminal cannot show {error.object[error.start]!a}: set PYTHONUTF8=1."
    quoted = (re.findall("'([^']*)'", text) or [""])[0]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [o for o in error.options or () if not o.startswith("schema_")]
        near = difflib.get_close_matches(option, options, n=1)
        remedy = (
            f"did you mean {group}={near[0]}?" if near else f"choose one of {', '.join(options)}."
        )
        remedy = remedy if options else "python launch.py --help lists the options."
        return f"{group}={option} is not known: {remedy}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write key=value, special characters in quotes."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown_key(quoted if text.startswith("Could not override") else str(cause.full_key))
    if isinstance(cause, ValidationError):
        key = re.sub(r"\[\d+\]$", "", str(cause.full_key))
        wanted = keys().get(key)
        plain = next((t for t in getattr(wanted, "__args__", ()) if t in _TYPES), wanted)
        kind = _TYPES.get(wanted) or (
            f"{_TYPES[plain]} or null" if plain in _TYPES else "a single value"
        )
        given = (
            text.removeprefix("Error merging override ")
            if text.startswith("Error merging override")
            else key
        )
        return f"{given} has the wrong type: give {key} {kind}."
    if text.startswith(("Ambiguous value", "Sweep parameters")):
        return (
            f"{quoted} names several values: add -m to run them all, or write a list as key=[a,b]."
        )
    if "use +" in text:
        wanted = text[text.rindex("use +") + 4 :].split()[0]
        return f"{quoted} is not chosen yet: write {wanted} with a plus sign."
    if text.startswith(("Multiple values for", "Could not append")):
        key = quoted if "append" in text else text.split()[3].rstrip(".")
        return f"{key} has a value already: write {key}=... without a plus sign."
    if isinstance(error, ValueError) and text.startswith("Config group override"):
        return "a group wants the name of one of its options: python launch.py --help lists them."
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"{text.splitlines()[0].rstrip('.')}: python launch.py --help shows what can be set."
    return None
