"""Feed-forward groups: first matrix (or two), activation, last matrix.

Shapes of the activation: (..., F) for each first matrix to (..., F).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mat.adapters.find import Place, count_heads, finder, linear_site, part_of
from mat.layers.gate import Gate
from mat.layers.hidden import HiddenSite
from mat.layers.site import rows_of
from mat.probe import untouched
from mat.units import UnitLayer

DEFAULT_GROUPS = 8  # where a model names no heads


@dataclass(frozen=True)
class Form:
    """How one family names the parts of a feed-forward module.

    Attributes:
        firsts: First matrices; with two, the activated one is multiplied by the other.
        activation: Name of the activation.
        last: Last matrix; ``../`` when the module's forward ends with the activation.
        between: Name of a module between activation and last matrix.
        after: Name of a module behind the last matrix.
        method: The method that runs them.
    """

    firsts: tuple[str, ...]
    activation: str
    last: str
    between: str | None = None
    after: str | None = None
    method: str = "forward"


FORMS = (
    Form(("dense",), "intermediate_act_fn", "../output.dense"),  # BERT, RoBERTa
    Form(("lin1",), "activation", "lin2", after="dropout"),  # DistilBERT
    Form(("fc1",), "activation_fn", "fc2"),  # ViT
    Form(("gate_proj", "up_proj"), "act_fn", "down_proj"),  # Llama, Qwen2
    Form(("wi",), "act", "wo", between="dropout"),  # Switch Transformers
    # nn.TransformerDecoderLayer, nn.TransformerEncoderLayer
    Form(("linear1",), "activation", "linear2", "dropout", "dropout3", "_ff_block"),
    Form(("linear1",), "activation", "linear2", "dropout", "dropout2", "_ff_block"),
)
LIBRARIES = ("transformers.", "torch.nn.modules.transformer")


@finder
def groups(place: Place) -> Iterator[UnitLayer]:
    """The groups of hidden neurons of a feed-forward module of transformers or of torch."""
    if not type(place.module).__module__.startswith(LIBRARIES):
        return
    for form in FORMS:
        layer = feed_forward(place, form)
        if layer is not None:
            yield layer
            return


def feed_forward(place: Place, form: Form) -> UnitLayer | None:
    """The groups of a module that has the form, else None."""
    firsts = [place.linear(name) for name in form.firsts]
    last = place.linear(form.last)
    needed = (form.activation, form.method, *filter(None, (form.between, form.after)))
    if last is None or any(first is None for first in firsts):
        return None
    if not all(hasattr(place.module, name) for name in needed):
        return None
    reason = misfit(place.module, form)
    if reason is not None:
        place.refuse((*form.firsts, form.last), reason)
        return None
    hidden = last.in_features
    count = number_of_groups(place, hidden)
    owner = np.repeat(np.arange(count), hidden // count)
    parts = [part for name in form.firsts for part in place.parts(name, owner, 0)]
    parts += place.parts(form.last, owner, 1)
    sites = [
        linear_site(place.path, place.under(form.last)),
        (place.path, hidden_site(place, form)),
    ]
    return UnitLayer("ffn", place.path, count, parts, sites)


def misfit(module: nn.Module, form: Form) -> str | None:
    """Why a module with the names of a form does not compute what the form says, if so.

    Whoever gives the same names to other things is found out by running the module on a random
    input (1, 2, D), in evaluation mode.
    """
    kind = type(module).__name__
    firsts: list[Any] = [getattr(module, name) for name in form.firsts]
    named = {*form.firsts, form.last, form.activation, form.between, form.after}
    others = [
        name.partition(".")[0]
        for name, _ in module.named_parameters()
        if name.partition(".")[0] not in named
    ]
    if form.method == "forward" and others:
        return f"{kind} is more than a feed-forward network: it has {others[0]}"
    activation = getattr(module, form.activation)
    if isinstance(activation, nn.Module) and list(activation.parameters()):
        return f"the activation of {kind} has parameters"
    if firsts[0].weight.is_meta:
        return None
    weight, random = firsts[0].weight, torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, weight.shape[1], generator=random, device="cpu").to(weight)
    some = torch.randperm(len(weight), generator=random, device="cpu")[::2].to(weight.device)
    activate, finish = Activate(module, form), Finish(module, form)
    try:
        with untouched(module), torch.no_grad():
            z = [first(x) for first in firsts]  # (1, 2, F)
            # As the backward does it: some of the neurons, without the rest.
            apart = activate(*(rows_of(each)[:, some] for each in z))
            hidden = activate(*z)
            wanted = hidden if form.last.startswith("../") else finish(hidden)
            result = getattr(module, form.method)(x)
    except Exception:  # whatever it says, it wants something else
        return f"{kind} is no feed-forward network of hidden states"
    if not close(rows_of(hidden)[:, some], apart):
        return f"the activation of {kind} is not elementwise"
    return None if close(result, wanted) else f"{kind} does more between its matrices"


def close(result: Any, wanted: Tensor) -> bool:
    """Whether a result is the wanted tensor, up to rounding in its precision."""
    if not isinstance(result, Tensor) or result.shape != wanted.shape:
        return False
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
    return torch.allclose(result, wanted.to(result), rtol=0.0, atol=tolerance, equal_nan=True)


def number_of_groups(place: Place, hidden: int) -> int:
    """Groups of a feed-forward layer of so many hidden neurons.

    Raises:
        ValueError: If a number that was asked for does not divide them.
    """
    wanted = place.groups or count_heads(place.model, place.module) or DEFAULT_GROUPS
    if hidden % wanted == 0:
        return wanted
    if place.groups:
        raise ValueError(
            f"groups={place.groups} does not divide the {hidden} neurons of {place.path}"
        )
    return max(n for n in range(1, wanted + 1) if hidden % n == 0)


def hidden_site(
    place: Place, form: Form
) -> Callable[[nn.Module, Callable[[str], Gate | None]], Any]:
    """What makes the site of a feed-forward module."""

    def make(module: nn.Module, gate_of: Callable[[str], Gate | None]) -> HiddenSite:
        gate = gate_of(place.path)
        assert gate is not None
        firsts: list[Any] = [getattr(module, name) for name in form.firsts]
        weights: Any = [part_of(gate, place.under(f"{name}.weight")) for name in form.firsts]
        biases = [part_of(gate, place.under(f"{name}.bias")) for name in form.firsts]
        inside = not form.last.startswith("../")
        finish = Finish(module, form) if inside else None
        return HiddenSite(
            module, firsts, weights, biases, Activate(module, form), finish, form.method
        )

    return make


class Activate:
    """The activation of a feed-forward module."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self.module, self.form = module, form

    def __call__(self, *z: Tensor) -> Tensor:
        """Of the outputs of the first matrices."""
        hidden: Tensor = getattr(self.module, self.form.activation)(z[0])
        return hidden * z[1] if len(z) > 1 else hidden


class Finish:
    """What a feed-forward module does after its activation."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self.module, self.form = module, form

    def __call__(self, hidden: Tensor) -> Tensor:
        """Of the hidden neurons."""
        for name in (self.form.between, self.form.last, self.form.after):
            if name is not None:
                hidden = getattr(self.module, name)(hidden)
        return hidden
