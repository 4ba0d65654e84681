"""Probes: how a model is run on batches of any form, and left as it was.

A batch is a mapping (``model(**batch)``), a tuple (``model(*batch)``) or anything else
(``model(batch)``); a list of batches makes up one probe.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def samples_of(batch: Any) -> int:
    """Number of samples of a batch: what it says itself, else the first axis of its first tensor.

    Raises:
        ValueError: If there is neither.
    """
    if isinstance(getattr(batch, "samples", None), int):
        return int(batch.samples)
    values = batch.values() if isinstance(batch, Mapping) else batch
    for value in values if isinstance(batch, Mapping | tuple) else [batch]:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(
        f"a {type(batch).__name__} does not say how many samples it has: give samples="
    )


def copied(batch: Any, device: torch.device | None = None) -> Any:
    """A batch of tensors (in dicts, lists and tuples) as tensors of its own, on a device."""
    if isinstance(batch, Tensor):
        return batch.detach().to(device, copy=True)
    if hasattr(batch, "items"):
        return {key: copied(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(copied(value, device) for value in batch)
    return batch


def run(model: nn.Module, batch: Any) -> Any:
    """What a model makes of a batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def pick(result: Any, output: Callable[[Any], Tensor] | None) -> Tensor:
    """The outputs to differentiate: what ``output`` picks, the result itself, or its ``logits``.

    Raises:
        ValueError: If that is no tensor.
    """
    outputs = result if output is None else output(result)
    if output is None and not isinstance(outputs, Tensor):
        outputs = getattr(outputs, "logits", None)
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"a {type(result).__name__} is no tensor and has no logits: pick the outputs by "
            "output=lambda result: ..."
        )
    return outputs


def joined(batches: Sequence[Any]) -> Any:
    """Several batches as one, tensors joined along their first axis.

    Raises:
        ValueError: If tensors of the batches differ in the other axes.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        try:
            return torch.cat(list(batches))
        except RuntimeError:
            raise ValueError(
                "batch norm takes its statistics from the whole probe: its batches must differ in "
                "the number of samples only"
            ) from None
    if isinstance(first, Mapping):
        return {name: joined([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(values) for values in zip(*batches, strict=True))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = {n: joined([getattr(b, n) for b in batches]) for n in vars(first)}
        return dataclasses.replace(first, **fields)
    return first


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Within, the model evaluates as if nothing were gated, and no parameter gets a gradient.

    Afterwards modes, ``requires_grad`` and random states are as they were.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    cuda = sorted({p.device.index for p in wanted if p.is_cuda})
    capturing = bool(cuda) and torch.cuda.is_current_stream_capturing()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([] if capturing else cuda))
        gates: Any = getattr(model, "_gates", None)
        if gates is not None:
            stack.enter_context(gates.transparent())
        try:
            model.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            torch.backends.mha.set_fastpath_enabled(False)  # it calls no module
            with torch.enable_grad():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for parameter, value in wanted.items():
                parameter.requires_grad_(value)
            for module, value in training.items():
                module.training = value
