"""How results are printed: figures with their names, and tables."""

import argparse
import json


def report(a: argparse.Namespace, figures: dict) -> None:
    """Print figures, one per line, or all of them as JSON."""
    if a.json:
        print(json.dumps(figures))
        return
    width = max(map(len, figures))  # of the names
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}")


def table(rows: list[dict[str, str]]) -> str:
    """Lay out rows in columns: numbers to the right, the first and the last column to the left."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    first, *_, last = widths  # names of columns
    lines = [{name: name for name in widths}, *rows]  # the header first
    return "\n".join(
        "  ".join(
            f"{row[name]:{'<' if name in (first, last) else '>'}{width}}" for name, width in widths.items()
        ).rstrip()
        for row in lines
    )
