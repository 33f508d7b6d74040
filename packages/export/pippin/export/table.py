"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence


def aligned(rows: Sequence[Sequence[str]], words: Container[int]) -> list[str]:
    """Rows as lines, whose columns are as wide as they must be.

    Args:
        rows: of as many cells each.
        words: the columns, by number, that are to the left; numbers are to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
