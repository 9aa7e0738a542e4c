"""Tables as text, for terminals and pipes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

_RULE = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""A table's lines in rich's terms: one below the head, in ASCII, as output may be read by another program."""
PIPE_WIDTH = 10_000
"""Columns of what is no terminal: whoever reads lines there wants each row in one."""


def text_table(
    rows: Sequence[Sequence[str]],
    head: Sequence[str] | None = None,
    *,
    left: Sequence[int] = (0,),
    width: int | None = None,
) -> str:
    """Return aligned columns, without a line's end.

    head: names of the columns, with a rule below. left: numbers of the columns that are aligned to the left; the
    others, of figures, are to the right. width: columns to fit into, by wrapping cells; None: the terminal's.
    """
    from rich.box import Box  # here, as most verbs print no table
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    count = len(head or rows[0])
    sides = [i % count for i in left]
    table = Table(
        box=Box(_RULE, ascii=True), show_edge=False, pad_edge=False, collapse_padding=True, show_header=head is not None
    )
    for i in range(count):
        title = Text(head[i]) if head else ""
        table.add_column(title, justify="left" if i in sides else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as text, for which no square bracket is markup
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
