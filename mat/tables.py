"""Units and gates in words: the tables that printing them gives, and lines for a log."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mat.probe import run

if TYPE_CHECKING:
    from mat.gates import Gates
    from mat.units import Part, Units

Costs = Mapping[str, float]  # by the name of a weight


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns of equal width; the first is flush left, numbers flush right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def units_table(units: "Units") -> str:
    """A line per layer of units, and what was left out."""
    total = sum(units.products.values())
    rows = []
    for layer in units.layers:
        counts = layer.parameters_of_a_unit(units.shapes)
        each = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.mean():,.1f}"
        names = layer.unit_names or [f"unit 0 to {layer.n_units - 1}"]
        share = sum(owned_of(part, units) for part in layer.parts) / total if total else 0.0
        slices = ", ".join(slices_in_words(layer.name, part) for part in layer.parts)
        rows.append(
            [layer.name or "the model", layer.kind, ", ".join(names), each, f"{share:.1%}", slices]
        )
    header = ["layer", "kind", "name", "parameters of each", "share of weights", "slices"]
    lines = [table(header, rows)]
    if units.left_out:
        lines.append(f"left out: {units.left_out_in_words()}")
    return "\n".join(lines)


def slices_in_words(layer: str, part: "Part") -> str:
    """What a layer's units own of a parameter."""
    name = part.parameter.removeprefix(f"{layer}.")
    return f"{'rows' if part.dim == 0 else 'columns'} of {name}"


def owned_of(part: "Part", units: "Units") -> float:
    """Elements of a matrix that multiplies activations which units own of it; 0 for others."""
    return units.products.get(part.parameter, 0) * float((part.owner >= 0).mean())


def gates_table(gates: "Gates") -> str:
    """A line per layer: kind, active, stopped, share of the backward of its matrices skipped."""
    stopped = gates.policy.state.stopped
    dense, now, measured = backward_costs(gates)
    rows = []
    for gate, (layer, where) in zip(gates.layers, gates.units.slices(), strict=True):
        names = {part.parameter for part in layer.parts}
        rows.append(
            [
                gate.name or "the model",
                gate.kind,
                f"{gate.n_active} of {gate.n_units}",
                str(int(stopped[where].sum())),
                f"{skipped(dense, now, names):.1%}",
            ]
        )
    total = f"{int(gates.active.sum())} of {len(gates.active)}"
    share = f"{skipped(dense, now, dense):.1%}"
    rows.append(["all", "", total, str(int(stopped.sum())), share])
    last = "skipped FLOPs" if measured else "skipped, by weights"
    return table(["layer", "kind", "active", "stopped", last], rows)


def skipped_numbers(gates: "Gates") -> dict[str, float]:
    """The share of the model's backward that is skipped, under a name that says how it is known."""
    dense, now, measured = backward_costs(gates)
    name = "mat/skipped_backward" if measured else "mat/skipped_backward_by_weights"
    return {name: skipped(dense, now, dense)}


def skipped(dense: Costs, now: Costs, names: Iterable[str]) -> float:
    """Share of the backward of some weights that is skipped."""
    whole = sum(dense.get(name, 0) for name in names)
    return 1 - sum(now.get(name, 0) for name in names) / whole if whole else 0.0


def backward_costs(gates: "Gates") -> tuple[Costs, Costs, bool]:
    """Cost of the backward by weight, if nothing were gated and as it is; whether it is measured.

    With a probe it is FLOPs, recorded once. Without one every weight counts by its size: a
    product's backward is two of that, one for its input and one for its weight; ``cut`` skips both
    for frozen units, ``exact`` the second.
    """
    if gates.probe is not None:
        from mat.flops import Ledger
        from mat.gates import copied

        if gates.ledger is None:
            batch = gates.probe[0] if isinstance(gates.probe, list) else gates.probe
            batch = copied(batch, next(gates.model.parameters()).device)
            gates.ledger = Ledger(gates.model, lambda: run(gates.model, batch), training=False)
        return gates.ledger.backward(dense=True), gates.ledger.backward(), True
    dense = {name: 2.0 * size for name, size in gates.units.products.items()}
    now = dict(dense)
    for part in gates.parts():
        frozen = 1 - part.count / len(part.part.owner)
        name, share = part.part.parameter, 1.0 if gates.config.mode == "cut" else 0.5
        if name in now:
            now[name] -= dense[name] * frozen * share
    return dense, now, False


def active_by_kind(gates: "Gates") -> str:
    """How many units are active: all, and of every kind layer by layer."""
    words = [f"{int(gates.active.sum())} of {len(gates.active)} units active"]
    for kind in dict.fromkeys(gate.kind for gate in gates.layers):
        counts = [str(gate.n_active) for gate in gates.layers if gate.kind == kind]
        words.append(f"{kind} {' '.join(counts)}")
    stopped = int(np.sum(gates.policy.state.stopped))
    return "; ".join([*words, f"{stopped} stopped"])
