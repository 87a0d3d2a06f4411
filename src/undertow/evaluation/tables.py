"""Tables as the command line prints them."""

from __future__ import annotations


def plain(*titles: str, left: int = 0):
    """An empty table without lines; the first `left` columns are text, the others numbers."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for place, title in enumerate(titles):
        made.add_column(title, justify="left" if place < left else "right")
    return made
