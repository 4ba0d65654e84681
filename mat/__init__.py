"""Modular Adaptive Training: train only the units whose mNTK eigenvalue says so.

Shi et al., *Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized Models*
(NeurIPS 2023). The public names; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mat import ntk
    from mat.adapters import find_units
    from mat.gates import Gates, attach_, detach_
    from mat.integrations import MATCallback
    from mat.optim import SGD, AdamW
    from mat.policy import MATConfig
    from mat.units import Unit, cols, rows

HOMES = {
    "attach_": "mat.gates",
    "detach_": "mat.gates",
    "Gates": "mat.gates",
    "find_units": "mat.adapters",
    "Unit": "mat.units",
    "rows": "mat.units",
    "cols": "mat.units",
    "MATConfig": "mat.policy",
    "AdamW": "mat.optim",
    "SGD": "mat.optim",
    "MATCallback": "mat.integrations",
}
__all__ = [
    "SGD", "AdamW", "Gates", "MATCallback", "MATConfig", "Unit", "attach_", "cols", "detach_",
    "find_units", "ntk", "rows",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ntk":
        return importlib.import_module("mat.ntk")
    if name not in HOMES:
        raise AttributeError(f"module 'mat' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
