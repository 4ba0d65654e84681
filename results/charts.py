"""The report's interactive charts (plotly), each made from run folders in whatever state they are.

Every chart has a title, axis labels and units. Colours are Okabe and Ito's (``results.curves``);
what must be told apart is also told by dashes or by position.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mat.suite.errors import UserError
from mat.suite.glance import LEDGER, Glance
from results.curves import LINES, OTHER_MODEL, STATES, band, count, layer_colours
from results.measures import Array

COLOURS = dict(zip(LEDGER, ("#56B4E9", "#0072B2", "#E69F00", "#D55E00"), strict=True))
DASHES = ("solid", "dot", "dash", "dashdot")
ALONE = "no run had the machine to itself"
MANY = 400  # units beyond which a chart shows layers instead; BERT's 288 are shown


def row_name(run: Glance) -> str:
    """What runs that differ in their seed alone have in common: method, model, the folder's other
    overrides.
    """
    told = {"default", f"method={run.method}", f"model={run.model}"}
    return ", ".join(
        [
            run.method,
            run.model,
            *(part for part in run.path.parent.name.split(",") if part not in told),
        ]
    )


def styles(rows: Mapping[str, Sequence[Glance]], base: str) -> dict[str, tuple[str, str]]:
    """Colour and dash by row: a model other than ``base`` is grey, rows of one method differ by
    their dashes.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, (run, *_) in rows.items():
        colour, line = LINES.get(run.method, (OTHER_MODEL, ":"))
        colour = colour if run.model == base else OTHER_MODEL
        usual = {"-": "solid", "--": "dash"}.get(line, "dot")
        free = (dash for dash in (usual, *DASHES) if (colour, dash) not in found.values())
        found[name] = colour, next(free, usual)
    return found


def _layout(figure: go.Figure, title: str, height: int) -> go.Figure:
    figure.update_layout(
        title={"text": title, "x": 0, "font": {"size": 16}},
        height=height,
        template="plotly_white",
        margin={"l": 70, "r": 20, "t": 60, "b": 110},
        font={"family": "system-ui, sans-serif", "size": 12},
        hoverlabel={"font": {"size": 12}},
        legend={"orientation": "h", "y": -55 / (height - 170), "yanchor": "top"},
    )
    return figure


def _fade(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"


class Line(NamedTuple):
    """A line of a learning curve: the mean over n runs of a row, or one run by itself (n = 0)."""

    x: Array
    y: Array
    spread: Array
    who: str
    n: int


def _lines(row: str, runs: Sequence[Glance], axis: str) -> list[Line]:
    """A row's complete runs as their mean, the others each by itself: with them the mean would end
    at the youngest.
    """
    seen = [run for run in runs if len(run.evaluations) and (axis != "seconds" or run.timed)]
    whole, lines = [run for run in seen if run.status == "complete"], []
    if whole:
        try:
            lines.append(
                Line(*band(whole, axis, points=150), f"{row}, n = {len(whole)}", len(whole))
            )
        except UserError:  # they have no range in common
            whole = []
    for run in (run for run in seen if run not in whole):
        x, y = (run.evaluations[key].to_numpy(float) for key in (axis, "loss"))
        lines.append(Line(x, y, np.zeros_like(y), f"{row}, seed {run.seed}, {run.status}", 0))
    return lines


def curves(rows: Mapping[str, Sequence[Glance]], base: str) -> go.Figure:
    """Validation loss against PFLOPs, seconds and steps: means over complete runs with bands, other
    runs thin.
    """
    axes = {
        "pflops": "PFLOPs executed",
        "seconds": "seconds (training, selections, estimator)",
        "step": "steps",
    }
    timed = count(
        [run for run in runs if run.status == "complete" and run.timed] for runs in rows.values()
    )
    titles = (
        "against compute",
        f"against time (runs alone on their machine, {timed})",
        "against steps",
    )
    figure = make_subplots(
        cols=3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04
    )
    looks, spans = styles(rows, base), []
    for column, (axis, label) in enumerate(axes.items(), start=1):
        figure.update_xaxes(title_text=label, rangemode="tozero", tickformat=".4~r", col=column)
        for row, runs in rows.items():
            colour, dash = looks[row]
            common = {"legendgroup": row, "showlegend": False, "row": 1, "col": column}
            for x, y, spread, who, n in _lines(row, runs, axis):
                later = x >= x[-1] / 10  # the fall from initialisation would flatten the rest
                spans.append((n > 0, (y - spread).min(), (y + spread)[later].max()))
                if n > 1:
                    figure.add_scatter(
                        x=[*x, *x[::-1]],
                        y=[*(y + spread), *(y - spread)[::-1]],
                        fill="toself",
                        fillcolor=_fade(colour),
                        line={"width": 0},
                        mode="lines",
                        hoverinfo="skip",
                        **common,
                    )
                about = "%{y:.4f}" + (" ± %{customdata:.4f}" if n > 1 else "")
                figure.add_scatter(
                    x=x,
                    y=y,
                    customdata=spread,
                    mode="lines" if x[0] < x[-1] else "markers",
                    **common,
                    line={"color": colour, "dash": dash, "width": 2 if n else 0.8},
                    hovertemplate=f"{about} nats at %{{x:.5g}}<extra>{who}</extra>",
                )
    for row, runs in rows.items():
        colour, dash = looks[row]
        whole = sum(run.status == "complete" for run in runs)
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="lines",
            line={"color": colour, "dash": dash},
            legendgroup=row,
            name=f"{row} (n = {whole})",
            row=1,
            col=1,
        )
    # The view is that of the means where there are some: a run that has only begun is still near
    # initialisation.
    shown = [span for span in spans if span[0]] or spans
    low, high = (
        min((span[1] for span in shown), default=0),
        max((span[2] for span in shown), default=0),
    )
    if low < high:
        figure.update_yaxes(range=[low - 0.06 * (high - low), high + 0.06 * (high - low)])
    if not any(run.timed for runs in rows.values() for run in runs):
        figure.add_annotation(text=ALONE, xref="paper", yref="paper", x=0.5, y=0.5, showarrow=False)
    figure.update_yaxes(title_text="validation loss (nats)", col=1)
    return _layout(
        figure, "Validation loss, mean over complete runs ± 1 sd; unfinished runs thin", 460
    )


def ledger(rows: Mapping[str, Sequence[Glance]]) -> go.Figure:
    """PFLOPs needed and executed (by column) and seconds, side by side; means over complete
    runs.
    """
    titles = (
        "PFLOPs needed by formula",
        "PFLOPs executed",
        "seconds (runs alone on their machine)",
    )
    figure = make_subplots(
        cols=3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04
    )
    names = list(rows)

    def bar(key: str, name: str, colour: str, column: int, unit: str) -> None:
        whole = (
            [r for r in runs if r.status == "complete" and (unit != "s" or r.timed)]
            for runs in rows.values()
        )
        values = [[float(r.last(key)) for r in runs if r.last(key) is not None] for runs in whole]
        figure.add_bar(
            y=names,
            x=[np.mean(v) if v else None for v in values],
            customdata=[len(v) for v in values],
            name=name,
            orientation="h",
            marker={"color": colour},
            row=1,
            col=column,
            hovertemplate=f"%{{x:.4g}} {unit}, n = %{{customdata}}<extra>{name}</extra>",
        )

    bar("pflops_needed", "needed", "#009E73", 1, "PFLOPs")
    for key, colour in COLOURS.items():
        bar(f"pflops_{key}", key.replace("_", " "), colour, 2, "PFLOPs")
    bar("seconds", "seconds", "#8A8A8A", 3, "s")
    for column, label in enumerate(("PFLOPs", "PFLOPs", "seconds"), start=1):
        figure.update_xaxes(title_text=label, tickformat=".4~r", nticks=6, col=column)
    figure.update_yaxes(title_text="method, model", autorange="reversed", col=1)
    figure.update_layout(barmode="stack")
    return _layout(
        figure,
        "FLOPs ledger: needed, executed, and seconds; means over complete runs",
        230 + 36 * len(names),
    )


def _folded(units: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """Rows to show, and whether they are layers: of many units a layer's share and median
    eigenvalue.
    """
    score = "lambda_max" if "lambda_max" in units else "gradnorm"
    units = units.rename(columns={score: "score"})
    if len(units[["kind", "layer", "unit"]].drop_duplicates()) <= MANY:
        where = zip(units["kind"], units["layer"], units["unit"], strict=True)
        return units.assign(name=[f"{kind} {layer}.{unit}" for kind, layer, unit in where]), False
    keys = ["t", "step", "pflops", "kind", "layer"]
    by = units.groupby(keys, sort=False)
    rows = by.agg(
        score=("score", "median"),
        threshold=("threshold", "first"),
        active=("active", "mean"),
        stopped=("stopped", "mean"),
    ).reset_index()
    return rows.assign(
        name=[f"{kind} {layer}" for kind, layer in zip(rows["kind"], rows["layer"], strict=True)]
    ), True


def _score_name(run: Glance, layers: bool) -> str:
    """What a run's units are ranked by, for hovers."""
    assert run.units is not None
    return ("median " if layers else "") + (
        "gradient norm" if "gradnorm" in run.units else "lambda_max"
    )


def active_set(run: Glance) -> go.Figure:
    """Heat-map of the active set, units by time, with state and eigenvalue on hover."""
    assert run.units is not None
    rows, layers = _folded(run.units)
    names, times = list(dict.fromkeys(rows["name"])), rows.drop_duplicates("t")

    def matrix(values: "pd.Series[Any]") -> pd.DataFrame:
        wide = pd.DataFrame({"name": rows["name"], "t": rows["t"], "value": values})
        return wide.pivot(index="name", columns="t", values="value").loc[names]

    active, stopped = rows["active"].astype(float), rows["stopped"].astype(float)
    if layers:
        state, text = (
            active,
            active.map("active {:.0%}, ".format) + stopped.map("stopped {:.0%}".format),
        )
        scale: list[tuple[float, str]] = [(0, STATES["frozen"]), (1, STATES["active"])]
        bar: dict[str, object] = {"title": {"text": "active share"}}
    else:
        state = active.where(stopped == 0, -1.0)
        told = ("stopped", "frozen", "active")
        text = state.map(dict(zip((-1.0, 0.0, 1.0), told, strict=True)))
        scale = [((i + end) / 3, STATES[name]) for i, name in enumerate(told) for end in (0, 1)]
        bar = {"tickvals": [-2 / 3, 0, 2 / 3], "ticktext": told}
    hover = [matrix(rows[column].astype(float)) for column in ("score", "threshold")]
    hover += [pd.DataFrame(np.tile(times[c], (len(names), 1))) for c in ("step", "pflops")]
    height = (
        13 if len(names) <= 100 else 5
    )  # of a row, in pixels; thin ones are labelled by the first of a layer
    labelled = names if height > 8 else rows.drop_duplicates(["kind", "layer"])["name"]
    figure = go.Figure(
        go.Heatmap(
            z=matrix(state),
            x=times["t"],
            y=names,
            zmin=0 if layers else -1,
            zmax=1,
            colorscale=scale,
            colorbar=bar,
            xgap=1,
            ygap=1 if height > 8 else 0,
            customdata=np.stack(hover, axis=-1),
            text=matrix(text),
            hovertemplate="%{y}: %{text}, t = %{x}, step %{customdata[2]}, "
            "%{customdata[3]:.4g} PFLOPs<br>"
            f"{_score_name(run, layers)} %{{customdata[0]:.4g}}<br>"
            "threshold %{customdata[1]:.4g}<extra></extra>",
        )
    )
    figure.update_xaxes(
        title_text=f"record t (one per {run.config['selection']['interval']:.3g} of the PFLOPs)"
    )
    figure.update_yaxes(
        title_text="layer" if layers else "unit (kind layer.unit)",
        autorange="reversed",
        tickvals=labelled,
        tickfont={"size": 9},
        showgrid=False,
    )
    return _layout(
        figure, "Active set" + (", share by layer" if layers else ""), 200 + height * len(names)
    )


def eigenvalues(run: Glance) -> go.Figure:
    """Courses of the units' scores (medians of layers where units are many) and the moving
    threshold.
    """
    assert run.units is not None
    rows, layers = _folded(run.units)
    gradnorm = "gradnorm" in run.units
    figure = go.Figure()
    kinds, colours = list(dict.fromkeys(rows["kind"])), layer_colours(rows["layer"])
    for name, one in rows.groupby("name", sort=False):
        first = one.iloc[0]
        dash = DASHES[kinds.index(first["kind"]) % len(DASHES)]
        line = {"color": colours[first["layer"]], "dash": dash, "width": 1.2}
        key = f"{first['kind']} {first['layer']}"
        figure.add_scatter(
            x=one["pflops"],
            y=one["score"],
            mode="lines",
            line=line,
            opacity=0.75,
            legendgroup=key,
            name=key,
            showlegend=not any(t.name == key for t in figure.data),
            hovertemplate=f"{name}: {_score_name(run, layers)} %{{y:.4g}}<extra></extra>",
        )
    for kind in kinds:
        level = rows[rows["kind"] == kind].drop_duplicates("t")
        if level["threshold"].notna().any():
            figure.add_scatter(
                x=level["pflops"],
                y=level["threshold"],
                mode="lines+markers",
                name=f"threshold, {kind}",
                line={
                    "color": "#000000",
                    "width": 3,
                    "dash": DASHES[kinds.index(kind) % len(DASHES)],
                },
            )
    figure.update_xaxes(title_text="PFLOPs executed", rangemode="tozero")
    label = "gradient norm" if gradnorm else "lambda_max of the mNTK"
    figure.update_yaxes(title_text=label, type="log", dtick=1, exponentformat="power")
    title = "Gradient norms" if gradnorm else "Top eigenvalues and the moving threshold (eq. 4)"
    return _layout(figure, title + (", medians of layers" if layers else ""), 520)
