"""A notebook with exercises and its solution, run in one kernel: `pytest -p tools.pairs notebooks`, without --nbval.

In: notebooks/NN_*.ipynb, and notebooks/solutions/NN_*.ipynb where there is one. Out: nbval's items for all cells of the
first, then for those of the second from the first cell in which the two differ. What comes before it has the same
source and the same stored output, so to run it once more, in a second kernel, could show nothing new.

What the one kernel hides: a name that the solution needs and only the student's cells define. `make notebooks` runs
both notebooks in kernels of their own.
"""

import json
from itertools import takewhile
from pathlib import Path

from nbval.plugin import IPyNbFile

from tools.notebooks import UNCOMPARED


def _code(path: Path) -> list[tuple]:
    """What nbval runs and compares of each code cell: source, tags, outputs."""
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    tags = [cell["metadata"].get("tags", []) for cell in cells]
    outputs = [None if UNCOMPARED in tag else cell["outputs"] for cell, tag in zip(cells, tags, strict=True)]
    return [(cell["source"], tag, output) for cell, tag, output in zip(cells, tags, outputs, strict=True)]


def shared(student: Path, solution: Path) -> int:
    """Number of code cells at the start of both notebooks that are the same, up to outputs that nbval ignores."""
    both = zip(_code(student), _code(solution), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))


def pytest_collect_file(file_path, parent):
    """A solution has no collector of its own."""
    folder = file_path.parent.name
    if file_path.suffix == ".ipynb" and folder not in ("solutions", ".ipynb_checkpoints"):
        return Pair.from_parent(parent, path=file_path)
    return None


class Pair(IPyNbFile):
    """The student's notebook, which starts the kernel and stops it, and then the end of its solution."""

    def collect(self):
        yield from super().collect()
        solution = self.path.parent / "solutions" / self.path.name
        if solution.exists():
            # xdist hands out what has the same path before "::" to one worker: the pair stays together
            yield End.from_parent(self, path=solution, nodeid=f"{self.nodeid}::solution")


class End(IPyNbFile):
    """The cells of a solution that its student's notebook does not have."""

    def collect(self):
        yield from list(super().collect())[shared(self.parent.path, self.path) :]

    def setup(self):
        self.kernel, self.timed_out = self.parent.kernel, self.parent.timed_out
        self.setup_sanitize_files()

    def teardown(self):
        self.kernel = None  # the pair stops it
