"""What Hydra refuses to compose, in our words: one sentence that names the key and the remedy."""

import difflib
import re
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from mat.suite.config import keys, unknown_key

_TYPES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers, as in [0.1, 0.2]",
    list[str]: "a list, as in [a, b]",
}


def explain(error: BaseException) -> str | None:
    """What Hydra refused to compose, in one sentence that names the key and the remedy.

    Args:
        error: What was raised.

    Returns:
        The sentence, or None if the error is not about the configuration.
    """
    text, cause = str(error), error.__cause__
    quoted = (re.findall("'([^']*)'", text) or [""])[0]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [o for o in error.options or () if not o.startswith("schema_")]
        near = difflib.get_close_matches(option, options, n=1)
        remedy = f"did you mean {group}={near[0]}?" if near else f"choose one of {', '.join(options)}."
        return f"{group}={option} is not known: {remedy if options else 'python launch.py --help lists the options.'}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write key=value, with quotes around special characters."
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown_key(quoted if text.startswith("Could not override") else str(cause.full_key))
    if isinstance(cause, ValidationError):
        key = re.sub(r"\[\d+\]$", "", str(cause.full_key))
        wanted = keys().get(key)
        plain = next((t for t in getattr(wanted, "__args__", ()) if t in _TYPES), wanted)
        kind = _TYPES.get(wanted) or (f"{_TYPES[plain]} or null" if plain in _TYPES else "a single value")
        given = text.removeprefix("Error merging override ") if text.startswith("Error merging override") else key
        return f"{given} has the wrong type: give {key} {kind}."
    if text.startswith(("Ambiguous value", "Sweep parameters")):
        return f"{quoted} names several values: add -m to run them all, or write a list as key=[a,b]."
    if "use +" in text:
        return f"{quoted} is not chosen yet: write {text[text.rindex('use +') + 4 :].split()[0]} with a plus sign."
    if text.startswith(("Multiple values for", "Could not append")):
        key = quoted if "append" in text else text.split()[3].rstrip(".")
        return f"{key} has a value already: write {key}=... without a plus sign."
    if isinstance(error, ValueError) and text.startswith("Config group override"):
        return "a group wants the name of one of its options: python launch.py --help lists them."
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"{text.splitlines()[0].rstrip('.')}: python launch.py --help shows what can be set."
    return None
