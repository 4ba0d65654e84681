"""Groups of hidden neurons in a plain ``nn.Sequential`` of linear layers.

A unit is some rows of one linear layer with their biases; the columns that read them belong to the
next layer, whose own rows are units again. The last linear layer belongs to the rest.
"""

from collections.abc import Iterator

import numpy as np
from torch import nn

from mat.adapters.feedforward import number_of_groups
from mat.adapters.find import Place, finder, linear_site
from mat.units import IntArray, UnitLayer

# What keeps neurons apart, so that a frozen one's column needs no gradient.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Dropout, nn.AlphaDropout, nn.Identity,
)  # fmt: skip


@finder
def sequential(place: Place) -> Iterator[UnitLayer]:
    """The hidden neurons of each linear layer that another one follows."""
    module = place.module
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return
    children = list(module.named_children())  # each module once
    if len(children) != len(module):
        return
    linears = [name for name, _ in children if place.linear(name) is not None]
    below: tuple[str, IntArray] | None = (
        None  # the layer that makes the present input, if it is gated
    )
    last: UnitLayer | None = None
    for name, child in children:
        linear = place.linear(name)
        if linear is None:
            below = below if isinstance(child, ELEMENTWISE) else None
            continue
        path = place.under(name)
        if name == linears[-1]:
            if last is not None and below is not None:
                last.sites.append(linear_site(last.name, path, below))
            break
        count = number_of_groups(place, linear.out_features)
        owner = np.repeat(np.arange(count), linear.out_features // count)
        last = UnitLayer(
            "ffn", path, count, place.parts(name, owner, 0), [linear_site(path, path, below)]
        )
        below = path, owner
        yield last
