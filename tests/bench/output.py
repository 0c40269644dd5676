"""Output of the benches: tables (drawn on a terminal, aligned plain text elsewhere) and progress."""

import sys
from collections.abc import Sequence

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Row = Sequence[str]


def show_table(title: str, head: Row, rows: Sequence[Row]) -> None:
    """Print a table. The first column is text; the others are figures and right-aligned."""
    if sys.stdout.isatty():
        _draw(title, head, rows)
    else:
        click.echo(f"\n{title}")
        click.echo(plain(head, rows))


def _draw(title: str, head: Row, rows: Sequence[Row]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def plain(head: Row, rows: Sequence[Row]) -> str:
    """Return the table as text: columns as wide as their longest cell, separated by two spaces."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(line: Row, widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def say(text: str) -> None:
    """Print progress to standard error; figures go to standard output."""
    click.echo(text, err=True)
