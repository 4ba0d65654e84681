"""Groups of hidden neurons in a plain ``nn.Sequential`` of linear layers.

A unit is some rows of one linear layer with their biases; the columns that read them belong to the
next layer, whose own rows are units again. The last linear layer belongs to the rest.
"""

from collections.abc import Iterator

import numpy as np
from torch import nn

from mat.adapters.feedforward import number_of_groups
from mat.adapters.find import ELEMENTWISE, Place, finder, is_plain, linear_site
from mat.units import IntArray, UnitLayer


@finder
def sequential(place: Place) -> Iterator[UnitLayer]:
    """The hidden neurons of each linear layer that another one follows."""
    module = place.module
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return
    children = list(module.named_children())  # each module once
    if len(children) != len(module):
        return
    final = [name for name, child in children if isinstance(child, nn.Linear)][-1:]
    below: tuple[str, IntArray] | None = None  # the gated layer that makes the present input
    last: UnitLayer | None = None
    for name, child in children:
        path, linear = place.under(name), place.linear(name)
        if isinstance(child, ELEMENTWISE):
            continue
        if linear is None or name in final:
            if last is not None and below is not None and is_plain(child):
                last.sites.append(linear_site(last.name, path, below))
            below = None
            continue
        count = number_of_groups(place, linear.out_features)
        owner = np.repeat(np.arange(count), linear.out_features // count)
        last = UnitLayer(
            "ffn", path, count, place.parts(name, owner, 0), [linear_site(path, path, below)]
        )
        below = path, owner
        yield last
