"""A copy for a hosted service differs from the course in one cell, which installs what is missing there."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from qlora_lab import cli
from qlora_lab.files import course, hosted
from qlora_lab.files.hosted import PARTS_OF_SERVICE, install_unmet, wheel_beside, with_setup
from qlora_lab.files.requirements import Unmet, required

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ADDRESS = "https://example.org/qlora_lab-0.1.0-py3-none-any.whl"


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "dist" / "qlora_lab-0.1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a wheel", "")
    return path


def sources(notebook: bytes) -> list[str]:
    return [cell.source for cell in nbformat.reads(notebook.decode(), 4).cells]


@pytest.fixture
def runs(monkeypatch):
    """The commands that would have been run."""
    made = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: made.append(command))
    return made


def run_cell(source: str, found: object, monkeypatch) -> None:
    """Run the cell where `find_spec` finds this."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    exec(compile(source, "cell", "exec"), {})


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_copy_differs_in_its_first_cell_alone(path):
    before = path.read_bytes()
    made = nbformat.reads(with_setup(before, ADDRESS).decode(), 4)
    nbformat.validate(made)
    assert made.cells[0].id == "setup" and f'wheel = "{ADDRESS}"\n' in made.cells[0].source
    lines = made.cells[0].source.splitlines()
    assert len(lines) <= 10 and all(len(line) <= 88 for line in lines if not line.startswith("wheel ="))
    del made.cells[0]
    assert (nbformat.writes(made) + "\n").encode() == before  # byte for byte


def test_the_cell_does_nothing_where_the_library_is(runs, monkeypatch):
    (cell, *_) = sources(with_setup((NOTEBOOKS / "01_codebook.ipynb").read_bytes(), ADDRESS))
    run_cell(cell, object(), monkeypatch)
    assert runs == []


def test_the_cell_installs_the_wheel_and_then_what_is_missing(runs, monkeypatch):
    there = [Unmet("safetensors", "safetensors>=0.5", None), Unmet("ipykernel", "ipykernel>=7.4", "6.17.1")]
    monkeypatch.setattr(hosted, "unmet", lambda: [*there, Unmet("jupyterlab", "jupyterlab>=4.4", None)])
    (cell, *_) = sources(with_setup((NOTEBOOKS / "01_codebook.ipynb").read_bytes(), ADDRESS))
    with pytest.warns(UserWarning, match=r"^ipykernel 6.17.1 \(tested: ipykernel>=7.4\): they belong to this service"):
        run_cell(cell, None, monkeypatch)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert runs == [[*pip, "--no-deps", ADDRESS], [*pip, "safetensors>=0.5"]]


def test_a_part_of_the_service_that_is_absent_is_installed(runs, monkeypatch, recwarn):
    """Without ipywidgets no explorer shows, and there is no version that the service's page could fit."""
    absent = [Unmet("ipywidgets", "ipywidgets>=8.1.5", None), Unmet("jupyterlab", "jupyterlab>=4.4", None)]
    monkeypatch.setattr(hosted, "unmet", lambda: absent)
    install_unmet()
    assert runs == [[sys.executable, "-m", "pip", "install", "--quiet", "ipywidgets>=8.1.5"]] and not recwarn.list


def test_nothing_is_installed_or_said_where_nothing_is_missing(runs, monkeypatch, recwarn):
    monkeypatch.setattr(hosted, "unmet", list)
    install_unmet()
    assert runs == [] and not recwarn.list


def test_the_parts_of_a_service_are_requirements():
    assert {name for name, _ in required()} >= PARTS_OF_SERVICE


@pytest.mark.parametrize("where", [ADDRESS, "git+https://example.org/us/qlora-lab@v0.1.0", f"{ADDRESS}?token=a%20b"])
def test_an_address_is_no_file(where):
    assert wheel_beside(where) is None


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("http://example.org/qlora_lab-0.1.0-py3-none-any.whl", ValueError, "begins with https:// or git"),
        ("qlora-lab", ValueError, "is neither an https address nor a wheel of this library.*: build one"),
        ("", ValueError, "is neither an https address nor a wheel"),
        ("other-1.0-py3-none-any.whl", ValueError, "is neither an https address nor a wheel"),
        ('https://example.org/a" b.whl', ValueError, "begins with https"),
        ("https://example.org/\udcff.whl", ValueError, "begins with https"),
        ("qlora_lab-9.9-py3-none-any.whl", FileNotFoundError, "there is no wheel qlora_lab-9.9.*: build it"),
    ],
)
def test_what_is_no_wheel(where, error, message):
    with pytest.raises(error, match=message):
        wheel_beside(where)


def test_a_wheel_lies_beside_the_notebooks_and_solutions_look_one_folder_up(wheel, tmp_path):
    mine = tmp_path / "mine"
    assert cli.main(["open", str(mine), "--copy-only", "--hosted", str(wheel)]) == 0
    assert (mine / wheel.name).read_bytes() == wheel.read_bytes()
    for name, seen in {course.FIRST: wheel.name, f"solutions/{course.FIRST}": f"../{wheel.name}"}.items():
        assert f'wheel = "{seen}"\n' in sources((mine / name).read_bytes())[0]
    before = (mine / course.FIRST).stat().st_mtime_ns
    assert course.copy_course(mine, hosted=str(wheel)) == []  # a second copy writes nothing
    assert (mine / course.FIRST).stat().st_mtime_ns == before


@pytest.mark.parametrize("hosted", [ADDRESS, None])
def test_a_copy_for_a_hosted_service_stays_one_when_it_is_opened(wheel, tmp_path, hosted, monkeypatch, capsys):
    mine = tmp_path / "mine"
    hand_out = ["open", str(mine), "--copy-only", "--without-solutions"]
    made_with = ["--hosted", hosted or str(wheel)]
    assert cli.main([*hand_out, *made_with]) == 0
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    became = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "before")
    assert cli.main(["open", str(mine)]) == 0 and str(mine / course.FIRST) in became[0]
    assert "is opened as it is; to update it, copy it again with --copy-only --hosted" in capsys.readouterr().err
    assert cli.main(["open", str(mine), "--copy-only"]) == 2
    assert cli.main(hand_out) == 2
    assert "name its wheel again (--hosted WHEEL)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    (mine / course.FIRST).unlink()
    assert cli.main(["open", str(mine)]) == 0 and str(mine) in became[1]  # the folder, where a notebook is missing
    assert cli.main([*hand_out, *made_with]) == 0
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("saved", ["without its cell", "by another editor", "without ids"])
def test_a_copy_for_a_hosted_service_is_known_whichever_notebook_was_saved(tmp_path, saved):
    mine = tmp_path / "mine"
    course.copy_course(mine, solutions=False, hosted=ADDRESS)
    for file in [mine / course.FIRST] if saved == "without its cell" else mine.glob("*.ipynb"):
        notebook = json.loads(file.read_text("utf-8"))
        if saved == "without its cell":
            del notebook["cells"][0]
        for cell in notebook["cells"] if saved == "without ids" else ():
            del cell["id"]
        file.write_text(json.dumps(notebook, separators=(",", ":"), ensure_ascii=True), "utf-8")
    with pytest.raises(ValueError, match="was copied for a hosted service"):
        course.copy_course(mine)


def test_an_empty_file_is_no_wheel(tmp_path):
    file = tmp_path / "qlora_lab-1-py3-none-any.whl"
    file.touch()
    with pytest.raises(ValueError, match="is damaged, or no wheel: build it again"):
        course.copy_course(tmp_path / "mine", hosted=str(file))
    assert not (tmp_path / "mine").exists()


def test_hosted_is_for_copies(tmp_path, capsys):
    assert cli.main(["open", str(tmp_path / "mine"), "--hosted", ADDRESS]) == 2
    assert "add --copy-only" in capsys.readouterr().err and not (tmp_path / "mine").exists()
    assert cli.main(["open", str(tmp_path / "mine"), "--copy-only", "--hosted", "nothing"]) == 2
    assert "nothing' is neither" in capsys.readouterr().err and not (tmp_path / "mine").exists()


def test_letters_of_a_path_stay_letters():
    where = f"Übung-𠀀/{Path(ADDRESS).name}"
    (cell, *_) = sources(with_setup((NOTEBOOKS / "01_codebook.ipynb").read_bytes(), where))
    assert f'wheel = "{where}"\n' in cell


def test_grade_reads_a_copy_as_it_reads_the_course(tmp_path):
    """The cell is one that a student could have added: it is not needed, and does not run."""
    from qlora_lab.exercises.submission import read_submission

    path = tmp_path / "01_codebook.ipynb"
    path.write_bytes((NOTEBOOKS / path.name).read_bytes())
    before = read_submission(path)
    path.write_bytes(with_setup(path.read_bytes(), ADDRESS))
    assert read_submission(path) == before
    assert json.loads(path.read_bytes())["cells"][0]["execution_count"] is None
