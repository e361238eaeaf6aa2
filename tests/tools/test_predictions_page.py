"""docs/predictions.md has every question to predict, with its answer."""

import json
from pathlib import Path

from tools.predictions_page import COMMAND, PAGE, page

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_page_is_up_to_date():
    assert PAGE.read_text("utf-8") == page(), f"run: {COMMAND}"


def test_every_guess_of_the_course_has_an_answer():
    cells = [cell for path in NOTEBOOKS.glob("*.ipynb") for cell in json.loads(path.read_text("utf-8"))["cells"]]
    asked = sum("".join(cell["source"]).count("ql.guess(") for cell in cells if cell["cell_type"] == "code")
    rows = [line for line in page().splitlines() if line.startswith("- ")]
    assert len(rows) == asked > 50
    assert not [row for row in rows if not row.removesuffix(r" \*").endswith("**")]
