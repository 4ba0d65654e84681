"""One table in four formats: Markdown, LaTeX, HTML, terminal. Knows texts only, nothing of runs or
statistics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape as escape_html

from rich.console import Console
from rich.markup import escape
from rich.table import Table

EMPTY = "–"


@dataclass(frozen=True)
class Column:
    """One column: its header, a text per row, and the rows to stress."""

    header: str
    texts: Sequence[str]
    best: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Section:
    """One block of a table: a title above columns of equal length, the first of which names the
    rows.
    """

    title: str
    columns: Sequence[Column]

    def rows(self, plain: Callable[[str], str], bold: str) -> list[list[str]]:
        """The cells row by row: each text escaped by ``plain``, the best ones put into
        ``bold.format(text)``.
        """
        styled = [
            [
                bold.format(plain(text)) if row in column.best else plain(text)
                for row, text in enumerate(column.texts)
            ]
            for column in self.columns
        ]
        return [list(row) for row in zip(*styled, strict=True)]


def decimals(values: Sequence[float | None]) -> int:
    """Decimals that show the largest value of a column with four digits."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 3 if largest == 0 else min(8, max(0, 3 - math.floor(math.log10(largest))))


def cell(mean: float | None, sd: float | None, n: int | str | None, digits: int) -> str:
    """``mean ± sd (n)``; without sd or n where there is none. n in words stands beside no mean,
    too.
    """
    if mean is None:
        return f"{EMPTY} ({n})" if isinstance(n, str) else EMPTY
    return (
        f"{mean:.{digits}f}"
        + ("" if sd is None else f" ± {sd:.{digits}f}")
        + ("" if n is None else f" ({n})")
    )


def to_markdown(
    title: str, command: str, sections: Sequence[Section], footer: Sequence[str]
) -> str:
    """The whole table as Markdown; ``command`` is what made it."""
    lines = [f"# {title}", "", f"Made by `{command}`."]
    for section in sections:
        table = [
            [c.header for c in section.columns],
            ["-" for _ in section.columns],
            *section.rows(str, "**{}**"),
        ]
        lines += ["", f"## {section.title}", "", *("| " + " | ".join(row) + " |" for row in table)]
    return "\n".join([*lines, "", *(f"- {note}" for note in footer)]) + "\n"


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
}


def latex_escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(LATEX.get(character, character) for character in text)


def to_latex(title: str, command: str, sections: Sequence[Section], footer: Sequence[str]) -> str:
    """The whole table as LaTeX: one ``tabular`` per section; needs booktabs and graphicx."""
    lines = [
        rf"% Made by {command}. Needs \usepackage{{booktabs,graphicx}}.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_escape(title)}}}",
    ]
    for section in sections:
        lines += [
            r"\par\medskip",
            latex_escape(section.title),
            r"\par\smallskip",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(section.columns) - 1)}}}",
            r"\toprule",
            " & ".join(latex_escape(column.header) for column in section.columns) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in section.rows(latex_escape, r"\textbf{{{}}}")),
            r"\bottomrule",
            r"\end{tabular}}",
        ]
    return (
        "\n".join(
            [*lines, r"\par\medskip\footnotesize", *map(latex_escape, footer), r"\end{table}"]
        )
        + "\n"
    )


def to_html(section: Section) -> str:
    """One block as an HTML table under its title."""
    head = "".join(f"<th>{escape_html(column.header)}</th>" for column in section.columns)
    rows = (
        f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>"
        for row in section.rows(escape_html, "<b>{}</b>")
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h4>{escape_html(section.title)}</h4><div class='scroll'>{table}</div>"


def show(title: str, sections: Sequence[Section], footer: Sequence[str], console: Console) -> None:
    """The whole table in the terminal."""
    console.print(f"[bold]{escape(title)}[/bold]")
    for section in sections:
        table = Table(title=escape(section.title), title_justify="left")
        for position, column in enumerate(section.columns):
            table.add_column(escape(column.header), justify="right" if position else "left")
        for row in section.rows(escape, "[bold]{}[/bold]"):
            table.add_row(*row)
        console.print(table)
    for note in footer:
        console.print(f"- {escape(note)}", highlight=False)
