"""A small notebook that keeps every rule of the course, to be broken one rule at a time."""

import nbformat
import pytest

OPENING = """# How wide is one step?

A step is the distance between two levels. Here you make one.

- You need: nothing
- Runs in: 1 s
- Paper section: 2
- After this you can: divide
"""
TAIL = "## Check yourself\n\n## Exercises\n\n## What we left out\n\n## Next\n"
SOLUTION = "# solution\nwide = 6.0\nsteps = wide / 16\n# end solution\nprint('steps' in globals())"


@pytest.fixture
def notebook():
    """A solution notebook, not yet run: imports, a result, an exercise."""
    cell = nbformat.v4
    return cell.new_notebook(
        cells=[
            cell.new_markdown_cell(OPENING),
            cell.new_code_cell("import math"),
            cell.new_markdown_cell("## By hand\n\n### One step\n\n```python\n# no heading\n```"),
            cell.new_code_cell("print('half')\nmath.sqrt(0.25)"),
            cell.new_code_cell(SOLUTION, metadata={"tags": ["exercise"]}),
            cell.new_markdown_cell(TAIL),
        ]
    )


@pytest.fixture
def stored(notebook):
    """The same as if it had been run."""
    outputs = [[], [("stream", "half\n"), ("execute_result", "0.5")], [("stream", "True\n")]]
    codes = [c for c in notebook.cells if c.cell_type == "code"]
    for number, (cell, saved) in enumerate(zip(codes, outputs, strict=True), 1):
        cell.execution_count = number
        cell.outputs = [_output(kind, text, number) for kind, text in saved]
    return notebook


def _output(kind, text, number):
    if kind == "stream":
        return nbformat.v4.new_output("stream", name="stdout", text=text)
    return nbformat.v4.new_output(kind, {"text/plain": text}, execution_count=number)
