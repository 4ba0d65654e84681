"""Backward passes that autograd cannot differentiate must say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def refuse_double_backward(backward: Backward) -> Backward:
    """Refuse a second derivative of an ``autograd.Function``.

    ``torch.autograd.function.once_differentiable`` raises only where the second pass goes through
    the layer; beside a residual connection it silently leaves the layer out.

    Raises:
        RuntimeError: In a backward pass with ``create_graph=True``.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a layer with a backward pass of its own cannot be differentiated twice: open all "
                "gates, or detach MAT, before a backward pass with create_graph=True"
            )
        return backward(ctx, *gradients)

    return wrapper
