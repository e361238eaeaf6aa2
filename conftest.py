"""Guards for `pytest --nbval notebooks`, and the options of the browser test.

For every notebook that pytest collects, one more item, "rules", says what nbval lets pass silently and where the
notebook leaves the course's shape (tools/notebook_rules.py). A sanitize rule that nbval would drop without a word stops
the run.
"""

import json
import re
from pathlib import Path

import pytest

from tools.notebook_rules import problems, unsolved


def pytest_addoption(parser):
    parser.addoption("--browser-runs", type=int, default=1, metavar="N", help="run each browser test N times")


class Rules(pytest.Item):
    """The rules of one notebook."""

    def runtest(self):
        notebook = json.loads(self.path.read_text("utf-8"))
        broken = problems(notebook) + (list(unsolved(notebook)) if self.path.parent.name == "solutions" else [])
        if broken:
            raise AssertionError("\n".join(broken))

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}::rules"

    def repr_failure(self, excinfo):
        return str(excinfo.value)


class RulesFile(pytest.File):
    """A notebook, as the holder of its rules."""

    def collect(self):
        yield Rules.from_parent(self, name="rules")


def pytest_collect_file(file_path, parent):
    wanted = file_path.suffix == ".ipynb" and ".ipynb_checkpoints" not in file_path.parts
    return RulesFile.from_parent(parent, path=file_path) if wanted else None


def pytest_configure(config):
    """nbval drops a sanitize rule with an empty `replace:`, and reports a missing file in each cell: say it once."""
    name = getattr(config.option, "nbval_sanitize_with", None)
    if not name:
        return
    if not Path(name).exists():
        raise pytest.UsageError(f"{name} does not exist: run pytest from the repository root.")
    from nbval.plugin import get_sanitize_patterns

    text = Path(name).read_text("utf-8")
    wanted = sum(line.startswith("regex:") for line in text.splitlines())
    read = [pattern for pattern, _ in get_sanitize_patterns(text)]
    if len(read) != wanted:
        raise pytest.UsageError(f"{name}: nbval reads {len(read)} of {wanted} rules; give each `replace:` a word.")
    for pattern in read:
        re.compile(pattern)
