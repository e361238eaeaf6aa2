"""A copy of the course belongs to its reader: what they have changed stays."""

import json
import os
from pathlib import Path

import pytest

from qlora_lab import cli
from qlora_lab.files import course
from qlora_lab.files.checksums import SUMS
from qlora_lab.files.replace import replace_bytes
from tests.faults import disk_faults

CHANGED = "solutions/01_codebook.ipynb"


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A course of three notebooks and a syllabus."""
    notebooks = tmp_path / "packaged" / "notebooks"
    (notebooks / "solutions").mkdir(parents=True)
    for name in (course.FIRST, "01_codebook.ipynb", CHANGED, "README.md"):
        (notebooks / name).write_text(f"the first edition of {name}")
    monkeypatch.setattr(course, "PACKAGED", tmp_path / "packaged")
    return notebooks


def names_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_has_the_course_in_it(source, tmp_path):
    assert course.copy_course(tmp_path / "mine") == []
    assert names_in(tmp_path / "mine") == names_in(source) | {SUMS}
    assert (tmp_path / "mine" / CHANGED).read_bytes() == (source / CHANGED).read_bytes()


def test_solutions_can_be_left_out(source, tmp_path):
    course.copy_course(tmp_path / "mine", solutions=False)
    assert names_in(tmp_path / "mine") == {course.FIRST, "01_codebook.ipynb", "README.md", SUMS}


def test_a_page_that_is_not_copied_is_named_without_a_link(source, tmp_path):
    page = (
        "see the [glossary](glossary.md), the [capstone](../docs/capstone.md) and [a rubric](../docs/a-b.md#the-rubric)"
    )
    (source / "README.md").write_text(page)
    for _ in range(2):
        assert course.copy_course(tmp_path / "mine") == []
        text = (tmp_path / "mine" / "README.md").read_text("utf-8")
        assert text == (
            "see the [glossary](glossary.md), the capstone (`docs/capstone.md` in the repository) "
            "and a rubric (`docs/a-b.md` in the repository)"
        )


def test_no_page_of_a_copy_links_out_of_it(tmp_path):
    course.copy_course(tmp_path / "mine")
    pages = {path.name: path.read_text("utf-8") for path in (tmp_path / "mine").glob("*.md")}
    assert len(pages) > 1
    assert [name for name, text in pages.items() if "](../" in text] == []


def test_a_copy_without_solutions_stays_so_until_they_are_asked_for(source, tmp_path):
    mine = tmp_path / "mine"
    without = {course.FIRST, "01_codebook.ipynb", "README.md", SUMS}
    course.copy_course(mine, solutions=False)
    (mine / course.FIRST).unlink()  # one file that the reader wants back
    for _ in range(2):
        assert course.copy_course(mine) == []
        assert names_in(mine) == without
    assert course.copy_course(mine, solutions=True) == []
    assert names_in(mine) == without | {CHANGED}
    (mine / CHANGED).unlink()
    course.copy_course(mine)
    assert names_in(mine) == without | {CHANGED}  # a copy with solutions keeps them
    (mine / CHANGED).write_text("my own")
    with pytest.raises(FileExistsError, match="holds solved exercises from an earlier copy: delete it, or name a new"):
        course.copy_course(mine, solutions=False)
    assert (mine / CHANGED).read_text() == "my own"
    (mine / CHANGED).unlink()
    assert course.copy_course(mine, solutions=False) == []
    assert names_in(mine) == without


def test_a_readers_own_folder_of_solutions_brings_none(source, tmp_path):
    mine = tmp_path / "mine"
    course.copy_course(mine, solutions=False)
    (mine / "solutions").mkdir()
    (mine / "solutions" / "my_own.ipynb").write_text("my own")
    for solutions in (None, False):
        assert course.copy_course(mine, solutions) == []
        assert names_in(mine / "solutions") == {"my_own.ipynb"}


def test_solutions_that_were_deleted_for_a_copy_without_them_do_not_come_back(source, tmp_path):
    mine = tmp_path / "mine"
    course.copy_course(mine)
    (mine / CHANGED).unlink()  # the folder stays
    assert course.copy_course(mine, solutions=False) == []
    assert course.copy_course(mine) == []
    assert names_in(mine) == {course.FIRST, "01_codebook.ipynb", "README.md", SUMS}
    (mine / CHANGED).write_text("a student's own")
    for solutions in (None, False):
        assert course.copy_course(mine, solutions) == []
        assert (mine / CHANGED).read_text() == "a student's own"


@pytest.mark.parametrize("option", ["--with-solutions", "--without-solutions"])
def test_a_checkout_is_not_copied_without_a_folder(option, monkeypatch, capsys):
    monkeypatch.setattr(course, "is_packaged", lambda: False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("JupyterLab starts"))
    assert cli.main(["open", option]) == 2
    assert "name a folder to copy them with or without solutions" in capsys.readouterr().err


def test_a_newer_edition_replaces_what_the_reader_has_not_changed(source, tmp_path):
    mine = tmp_path / "mine"
    course.copy_course(mine)
    (mine / CHANGED).write_text("my own")
    (mine / "notes.txt").write_text("my notes")
    (mine / "01_codebook.ipynb").unlink()
    (source / course.FIRST).write_text("the second edition")
    (source / CHANGED).write_text("the second edition")
    for _ in range(2):
        assert course.copy_course(mine) == [CHANGED]
        assert (mine / CHANGED).read_text() == "my own" and (mine / "notes.txt").read_text() == "my notes"
        assert (mine / course.FIRST).read_text() == "the second edition"
        assert (mine / "01_codebook.ipynb").exists()  # the reader deleted it to have it back


def test_a_copy_that_did_not_change_is_not_written_again(source, tmp_path):
    course.copy_course(tmp_path / "mine")
    before = (tmp_path / "mine" / course.FIRST).stat()
    course.copy_course(tmp_path / "mine")
    assert (tmp_path / "mine" / course.FIRST).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("name", ["thesis.tex", course.FIRST, SUMS])
def test_a_folder_of_somebody_else_is_refused(source, tmp_path, name):
    content = "" if name == SUMS else "mine"  # a list of checksums without the course, as a run writes it
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(content)
    with pytest.raises(FileExistsError, match="holds other files than the course: name a new folder"):
        course.copy_course(tmp_path / "mine")
    assert names_in(tmp_path / "mine") == {name} and (tmp_path / "mine" / name).read_text() == content


@pytest.mark.long
@pytest.mark.parametrize("lasting", [False, True])
def test_every_fault_leaves_the_readers_files_and_the_next_call_completes_them(source, tmp_path, lasting):
    number = 0
    while True:
        number += 1
        mine = tmp_path / f"mine-{number}"
        course.copy_course(mine)
        (mine / CHANGED).write_text("my own")
        for name in (course.FIRST, "01_codebook.ipynb"):
            (source / name).write_text(f"edition {number} of {name}")
        with disk_faults(mine, at=number, lasting=lasting) as seen:
            try:
                course.copy_course(mine)
            except OSError:
                assert (mine / CHANGED).read_text() == "my own"
        if number > len(seen.operations):
            break
        assert course.copy_course(mine) == [CHANGED]
        assert (mine / CHANGED).read_text() == "my own"
        for name in (course.FIRST, "01_codebook.ipynb"):
            assert (mine / name).read_text() == f"edition {number} of {name}"
    assert number > 10


def test_open_names_what_stays_and_becomes_jupyterlab(source, tmp_path, monkeypatch, capsys):
    became = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "before")
    mine = tmp_path / "mine"
    assert cli.main(["open", str(mine), "--no-browser"]) == 0
    assert str(mine / course.FIRST) in became[0] and "--no-browser" in became[0]
    assert capsys.readouterr().err == ""
    folder, before = os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    overrides = json.loads((Path(folder) / "labconfig" / "default_setting_overrides.json").read_text("utf-8"))
    assert before == "before" and overrides["@jupyterlab/filebrowser-extension:browser"]["sortNotebooksFirst"] is True
    assert f"--LabServerApp.extra_labextensions_path={Path(folder) / 'labextensions'}" in became[0]
    (mine / CHANGED).write_text("my own")
    assert cli.main(["open", str(mine)]) == 0
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith(f"{mine / CHANGED} stays as you changed it; delete it to get the course's own again")
    )
    assert "--no-browser" not in became[1]


def test_a_copy_to_hand_out_starts_nothing_and_students_open_it_without_solutions(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("JupyterLab starts"))
    mine, without = tmp_path / "mine", {course.FIRST, "01_codebook.ipynb", "README.md", SUMS}
    assert cli.main(["open", str(mine), "--copy-only", "--without-solutions"]) == 0
    assert names_in(mine) == without
    assert cli.main(["open", str(mine), "--copy-only"]) == 0
    assert names_in(mine) == without
    became = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "before")
    assert cli.main(["open", str(mine)]) == 0
    assert names_in(mine) == without and len(became) == 1
    assert cli.main(["open", str(mine), "--copy-only", "--with-solutions"]) == 0
    assert names_in(mine) == without | {CHANGED}


def test_no_folders_name_begins_like_an_option_of_jupyterlab(source, tmp_path, monkeypatch):
    became = []
    monkeypatch.setattr(os, "execv", lambda _, command: became.append(command))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "before")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["open", "--", "-x"]) == 0
    assert became[0][3] == str(tmp_path / "-x" / course.FIRST)


def killed(root, number, *args, **options) -> bool:
    """Copy the course in another process, which ends at its operation of this number. Tells whether it came so far."""
    if not (child := os.fork()):
        with disk_faults(root, at=number, fail=lambda *_: os._exit(9)):
            course.copy_course(*args, **options)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.mark.long
def test_after_a_kill_a_newer_edition_knows_all_files_that_are_ours(source, tmp_path):
    def edition(number):
        for name in (course.FIRST, "01_codebook.ipynb", CHANGED):
            (source / name).write_text(f"edition {number} of {name}")

    for number in range(1, 1000):
        mine = tmp_path / f"mine-{number}"
        edition(1)
        course.copy_course(mine, solutions=False)
        (mine / "01_codebook.ipynb").write_text("my own")
        edition(2)
        alive = not killed(mine, number, mine, solutions=True)
        if (mine / CHANGED).exists():
            with pytest.raises(FileExistsError, match="holds solved exercises from an earlier copy"):
                course.copy_course(mine, solutions=False)
        edition(3)
        assert course.copy_course(mine) == ["01_codebook.ipynb"]
        assert (mine / course.FIRST).read_text() == f"edition 3 of {course.FIRST}"
        assert (mine / "01_codebook.ipynb").read_text() == "my own"
        assert names_in(mine) <= names_in(source) | {SUMS}
        if alive:
            break
    assert 10 < number < 999


@pytest.mark.long
def test_after_a_kill_of_the_first_copy_the_next_call_completes_it(source, tmp_path):
    for number in range(1, 1000):
        mine = tmp_path / f"mine-{number}"
        if not killed(tmp_path, number, mine, solutions=False):
            break
        assert course.copy_course(mine, solutions=False) == []
        assert names_in(mine) == {course.FIRST, "01_codebook.ipynb", "README.md", SUMS}
    assert 10 < number < 999


def test_a_folder_is_filled_in_place(source, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o750)
    before = mine.stat()
    monkeypatch.chdir(mine)
    monkeypatch.setattr(course, "replace_bytes", saving_beside(mine / "thesis.tex"))
    assert course.copy_course(".") == []
    assert (mine.stat().st_ino, mine.stat().st_mode) == (before.st_ino, before.st_mode)
    assert Path.cwd() == mine and names_in(mine) == names_in(source) | {SUMS, "thesis.tex"}


def saving_beside(file):
    """A writer for the course while somebody saves another file there."""

    def write(target, data):
        file.write_text("mine")
        replace_bytes(target, data)

    return write


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "file instead of solutions"])
def test_what_no_file_of_ours_can_replace_is_named_before_anything_is_written(source, tmp_path, kind):
    mine = tmp_path / "mine"
    course.copy_course(mine, solutions=False)
    odd = mine / "01_codebook.ipynb"
    odd.unlink()
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    elif kind == "dangling link":
        odd.symlink_to("nowhere")
    else:
        odd = mine / "solutions"
        odd.write_text("mine")
    (source / course.FIRST).write_text("the second edition")
    with pytest.raises(OSError, match=f"{odd} is not a f.*: .*move it away"):
        course.copy_course(mine, solutions=True)
    assert (mine / course.FIRST).read_text() == f"the first edition of {course.FIRST}"


@pytest.mark.parametrize("inside", ["", "course"])
def test_a_file_is_no_folder(source, tmp_path, inside, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert cli.main(["open", str(tmp_path / "thesis.tex" / inside), "--copy-only"]) == 2
    assert f"{tmp_path / 'thesis.tex'} is not a folder: name another one" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"no list", None])
def test_a_damaged_list_says_where_the_notebooks_can_go(source, tmp_path, content):
    mine = tmp_path / "mine"
    course.copy_course(mine)
    (mine / SUMS).unlink()
    (mine / SUMS).mkdir() if content is None else (mine / SUMS).write_bytes(content)
    (mine / CHANGED).write_text("my own")
    with pytest.raises(ValueError, match="is damaged.*: name a new folder, and move your notebooks there"):
        course.copy_course(mine)
    course.copy_course(tmp_path / "new")
    (mine / CHANGED).replace(tmp_path / "new" / CHANGED)
    assert course.copy_course(tmp_path / "new") == [CHANGED]


def test_nothing_is_written_where_all_is_up_to_date(source, tmp_path, monkeypatch):
    course.copy_course(tmp_path / "mine")
    monkeypatch.setattr(course, "replace_bytes", lambda *_: pytest.fail("a read-only copy can be opened"))
    assert course.copy_course(tmp_path / "mine") == []


def test_an_empty_name_is_no_folder(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["open", "", "--copy-only"]) == 2
    assert "the path is empty" in capsys.readouterr().err and not (tmp_path / course.FIRST).exists()
