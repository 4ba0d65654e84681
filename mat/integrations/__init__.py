"""MAT in other libraries' training loops: a callback for the Trainer of transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mat.integrations.trainer import MATCallback

__all__ = ["MATCallback"]


def __getattr__(name: str) -> Any:
    if name != "MATCallback":
        raise AttributeError(f"module 'mat.integrations' has no attribute {name!r}")
    from mat.integrations.trainer import MATCallback  # imports transformers

    return MATCallback
