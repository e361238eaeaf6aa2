"""The README: short, and its Python prints what it says."""

import contextlib
import io
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_it_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 120


def test_its_five_lines_print_what_it_says():
    code, said = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.S).groups()
    assert len([line for line in code.splitlines() if line]) == 5
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == said


def test_the_map_has_every_room_and_every_file_that_it_names():
    lines = re.findall(r"^  (\w+)/ +(.*)$", README, re.M)
    rooms = {path.name for path in (ROOT / "qlora_lab").iterdir() if (path / "__init__.py").exists()}
    assert {room for room, _ in lines} == rooms
    for room, words in lines:
        for name in re.findall(r"\w+\.py", words):
            assert (ROOT / "qlora_lab" / room / name).is_file(), f"{room}/{name}"


def test_its_figure_for_peft_is_that_of_the_installed_one():
    source = Path(find_spec("peft").origin).parent / "tuners" / "lora" / "layer.py"
    lines = len(source.read_text("utf-8").splitlines())
    assert f"{lines:,} lines (version {version('peft')})" in README


def test_every_notebook_is_in_the_course():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"](notebooks/{notebook.name})" in README


def test_the_picture_is_small():
    assert (ROOT / "docs" / "drag.gif").stat().st_size < 300_000
