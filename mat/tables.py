"""Units and gates in words: the tables that printing them gives, and lines for a log."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mat.gates import Gates
    from mat.units import Part, Units


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
    header = ["layer", "kind", "name", "parameters of each", "share of FLOPs", "slices"]
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
    """A line per layer: kind, active, stopped, share of its backward that is skipped."""
    stopped = gates.policy.state.stopped
    rows = []
    for gate, (layer, where) in zip(gates.layers, gates.units.slices(), strict=True):
        rows.append(
            [
                gate.name or "the model",
                gate.kind,
                f"{gate.n_active} of {gate.n_units}",
                str(int(stopped[where].sum())),
                f"{skipped_of_layer(gates, layer.name):.1%}",
            ]
        )
    total = f"{int(gates.active.sum())} of {len(gates.active)}"
    rows.append(["all", "", total, str(int(stopped.sum())), f"{skipped_share(gates):.1%}"])
    return table(["layer", "kind", "active", "stopped", "skipped"], rows)


def skipped_of_layer(gates: "Gates", name: str) -> float:
    """Share of the backward products of a layer's own slices that its gate skips.

    A product's backward is two of its size, one for its input and one for its weight; ``cut`` skips
    both for frozen units, ``exact`` the second.
    """
    owned = skipped = 0.0
    for gate in gates.layers:
        if gate.name != name:
            continue
        for part in gate.parts.values():
            size = gates.units.products.get(part.part.parameter, 0)
            owned += size * float((part.part.owner >= 0).mean())
            skipped += size * (1 - part.count / len(part.part.owner))
    return skipped / owned * (1.0 if gates.config.mode == "cut" else 0.5) if owned else 0.0


def skipped_share(gates: "Gates") -> float:
    """Share of the whole model's backward products that is skipped."""
    total = sum(gates.units.products.values())
    owned = {
        layer.name: sum(owned_of(part, gates.units) for part in layer.parts)
        for layer in gates.units.layers
    }
    skipped = sum(skipped_of_layer(gates, name) * size for name, size in owned.items())
    return skipped / total if total else 0.0


def active_by_kind(gates: "Gates") -> str:
    """How many units are active: all, and of every kind layer by layer."""
    words = [f"{int(gates.active.sum())} of {len(gates.active)} units active"]
    for kind in dict.fromkeys(gate.kind for gate in gates.layers):
        counts = [str(gate.n_active) for gate in gates.layers if gate.kind == kind]
        words.append(f"{kind} {' '.join(counts)}")
    stopped = int(np.sum(gates.policy.state.stopped))
    return "; ".join([*words, f"{stopped} stopped"])
