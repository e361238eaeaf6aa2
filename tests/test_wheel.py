"""The wheel holds the course: built, installed into a folder of its own, and used from outside of the checkout."""

import json
import os
import re
import site
import subprocess
import sys
import time
import venv
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from nbclient import NotebookClient

from tools import from_wheel

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed() -> dict[str, str]:
    """The environment of a process that imports the library from the wheel; the stages of notebooks use it again."""
    return from_wheel.install() | {"QLORA_LAB_SITE": str(from_wheel.SITE)}


def python(code: str, installed, where) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=where, env=installed, check=True, capture_output=True, text=True).stdout


def test_nothing_but_the_library_and_the_course_is_in_it(installed):
    site = Path(installed["QLORA_LAB_SITE"])
    course = site / "qlora_lab" / "course"
    files = {path for path in course.rglob("*") if path.is_file() and path.suffix != ".pyc"}  # pip compiles scripts
    names = {path.relative_to(course).as_posix() for path in files}
    data = [path for path in ROOT.glob("data/**/*.*") if "__pycache__" not in path.parts]
    kept = [*ROOT.glob("notebooks/**/*.ipynb"), *ROOT.glob("notebooks/*.md"), *data, *ROOT.glob("bench/*.json")]
    assert names == {path.relative_to(ROOT).as_posix() for path in kept if ".ipynb_checkpoints" not in path.parts}
    jupyter = [home / "qlora_lab" / "cli" / "jupyter" for home in (site, ROOT)]
    inside, kept = ({file.relative_to(home) for file in home.rglob("*") if file.is_file()} for home in jupyter)
    assert inside == kept
    assert {path.name.split("-")[0] for path in site.iterdir()} <= {"qlora_lab", "qlora_lab-0.1.0.dist-info", "bin"}


def test_figures_are_read_from_it(installed, tmp_path):
    code = "import qlora_lab as ql; print(ql.__file__, len(ql.published_nf4()), len(ql.replay_published()))"
    file, levels, figures = python(code, installed, tmp_path).split()
    assert file.startswith(installed["QLORA_LAB_SITE"]) and levels == "16" and int(figures) > 0


def test_conformance_has_its_vectors(installed, tmp_path):
    code = "from qlora_lab import cli; cli.main(['conformance', '--backend', 'reference', '--quiet'])"
    assert "Bytes equal: 71, values equal: 1, refused: 4." in python(code, installed, tmp_path)


def _when_it_listens(address: str):
    """The address is printed before the server listens to it."""
    for _ in range(60):
        try:
            return urlopen(address, timeout=60)
        except URLError:
            time.sleep(1)
    raise TimeoutError(address)


def test_open_makes_the_course_and_serves_it_with_a_token(installed, tmp_path):
    command = [sys.executable, "-m", "qlora_lab.cli", "open", "mine", "--no-browser"]
    with subprocess.Popen(command, cwd=tmp_path, env=installed, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(match[0] for line in server.stderr if (match := re.search(r"http://\S+token=\w{16,}", line)))
            with _when_it_listens(address.replace("/lab?", "/api/contents?")) as answer:
                names = {file["name"] for file in json.load(answer)["content"]}
        finally:
            server.terminate()
            server.stderr.read()
    assert {"00_start_here.ipynb", "10_finetune_llama.ipynb", "solutions"} <= names


def test_a_notebook_of_the_copy_runs(installed, tmp_path):
    """All notebooks run from the wheel in `make test` (tools/from_wheel.py), so here one is enough."""
    name = "01_codebook.ipynb"
    code = "from qlora_lab.files.course import copy_course; copy_course('mine')"
    python(code, installed, tmp_path)
    for copied in ("00_start_here.ipynb", "03_block_size.ipynb", name):
        assert (tmp_path / "mine" / copied).read_bytes() == (ROOT / "notebooks" / copied).read_bytes()
    notebook = nbformat.read(tmp_path / "mine" / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("import qlora_lab; qlora_lab.__file__"))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path / "mine"}}).execute(env=installed)
    assert installed["QLORA_LAB_SITE"] in notebook.cells[-1].outputs[0]["data"]["text/plain"]


def test_grade_gives_the_students_copy_nothing_and_the_solution_everything(installed, tmp_path):
    code = """
from qlora_lab import cli
cli.main(['open', 'mine', '--copy-only', '--without-solutions'])
cli.main(['grade', 'mine/01_codebook.ipynb', 'SOLVED', '--json', '--quiet'])"""
    solved = str(ROOT / "notebooks" / "solutions" / "01_codebook.ipynb")
    scores = json.loads(python(code.replace("SOLVED", solved), installed, tmp_path))
    assert [(row["passed"], row["out_of"]) for row in scores["notebooks"]] == [(0, 2), (2, 2)]
    assert {exercise["result"] for exercise in scores["notebooks"][0]["exercises"].values()} == {"not attempted"}
    assert not (tmp_path / "mine" / "solutions").exists()


def test_a_hosted_copy_installs_the_wheel_beside_it(installed, tmp_path):
    """In an environment that has all packages but this library. Once it is there, the cell needs no wheel any more."""
    (wheel,) = Path(installed["QLORA_LAB_SITE"]).parent.glob("*.whl")
    words = ["open", "mine", "--copy-only", "--hosted", str(wheel)]
    python(f"from qlora_lab import cli; cli.main({words})", installed, tmp_path)
    venv.create(tmp_path / "service", with_pip=False)
    (inside,) = (tmp_path / "service").glob("lib/python*/site-packages")
    (tmp_path / "others").mkdir()
    for path in Path(site.getsitepackages()[0]).iterdir():
        if "qlora_lab" not in path.name:  # an editable install has a file that leads to the checkout, too
            (tmp_path / "others" / path.name).symlink_to(path)
    (inside / "others.pth").write_text(str(tmp_path / "others"))
    cell = nbformat.read(tmp_path / "mine" / "01_codebook.ipynb", 4).cells[0].source
    code = f"{cell}\nimport qlora_lab\nprint(qlora_lab.__file__)"
    command = [tmp_path / "service" / "bin" / "python", "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path / "mine", env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str(inside / "qlora_lab" / "__init__.py"), done.stderr
        (tmp_path / "mine" / wheel.name).unlink(missing_ok=True)
