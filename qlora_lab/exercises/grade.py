"""Run the exercises of students' notebooks in fresh kernels, and count which of them pass the course's own checks.

In: notebooks, or folders of them. Out: a Grade for each, and a file of scores. A student's file is only read: the
kernel runs its answers, the course's checks and the cells that these need, in a scratch folder. An answer that does not
end, or that ends its kernel, costs its own exercise alone: the notebook runs once more without it.

But: answers are programs, and run with your own rights. Grade strangers' work in an account or a container
of its own.
"""

import asyncio
import json
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from qlora_lab.exercises.submission import ADDED, CHECK, NotOfCourseError, Piece, Submission, read_submission, without
from qlora_lab.exercises.verdicts import FAILED, OPEN, PASSED
from qlora_lab.files import disk
from qlora_lab.files.course import course_path, is_packaged
from qlora_lab.files.home import expanded
from qlora_lab.files.out_path import out_replacing
from qlora_lab.files.replace import replace_text
from qlora_lab.files.strict_json import LIST, SWITCH, TEXT, read_json, whole

ERROR = "error"  # no verdict: the answer raised an error, did not end, or ended its kernel
NOBODY = ""  # in the place of an exercise: a cell of the course that belongs to none
LONGEST = 200  # characters of a line that says why
SOLUTIONS, CHECKPOINTS = "solutions", ".ipynb_checkpoints"  # folders
TRIES = 3  # to start a kernel
START_SECONDS = 300  # for a kernel to answer; it takes two on a quiet machine, and many start at once in a class


class Result(NamedTuple):
    """What became of one exercise: "passed", "failed", "not attempted" or "error", and why, in one line."""

    exercise: str
    result: str
    line: str = ""


@dataclass(frozen=True)
class Grade:
    """What became of one notebook. seconds: from the start of its first kernel to the end of its last."""

    file: str
    notebook: str
    results: list[Result]
    seconds: float

    @property
    def passed(self) -> int:
        return sum(result.result == PASSED for result in self.results)

    @property
    def out_of(self) -> int:
        return len(self.results)


class _Run(NamedTuple):
    """What one kernel told. errors: exercise -> its first error. stopped: index of the piece that ended it, and how."""

    verdicts: dict[str, tuple[str, str]]
    errors: dict[str, str]
    stopped: tuple[int, str] | None


def find_notebooks(paths: Sequence[str | Path]) -> list[Submission]:
    """Read all notebooks that are named, and those of the course in folders, before any kernel starts.

    In a folder, JupyterLab's checkpoints are left out, and so are folders called solutions and other notebooks, both
    with a warning. Raises ValueError for a file that is damaged or not of the course, and for a folder without a
    notebook of the course; OSError for one that cannot be read.
    """
    found = []
    for path in paths:
        if not str(path):  # would be the current folder
            raise ValueError("a path is empty, perhaps because a shell variable is not set: name a notebook")
        path = expanded(path)
        if not path.is_dir():
            found.append(read_submission(path))
            continue
        files = [
            p for p in sorted(path.rglob("*.ipynb")) if p.is_file() and CHECKPOINTS not in p.relative_to(path).parts
        ]
        inside = [file for file in files if SOLUTIONS not in file.relative_to(path).parts[:-1]]
        for solved in sorted({file.parent for file in files} - {file.parent for file in inside}):
            # a copy of the course has one; a student may have handed in a folder of this name
            warnings.warn(f"left out: {solved}, as folders of this name hold the course's own answers", stacklevel=2)
        submissions = []
        for notebook in inside:
            try:
                submissions.append(read_submission(notebook))
            except NotOfCourseError as error:
                # a student's own experiment; a damaged file could be an answer, and ends it
                warnings.warn(f"left out: {error}", stacklevel=2)
        if not submissions:
            raise ValueError(f"{path} holds no notebook of this course: name a folder of students' notebooks")
        found += submissions
    return found


def grade(submissions: Sequence[Submission], minutes: float = 10, *, progress: bool = True) -> Iterator[Grade]:
    """Yield the grade of each notebook. minutes: how long one kernel may run before its answer counts as endless.

    Raises OSError if no kernel starts.
    """
    for submission in tqdm(submissions, "grading", unit="notebook", disable=not progress):
        start = time.monotonic()
        results = _grade(submission, 60 * minutes)
        yield Grade(str(submission.path), submission.notebook, results, round(time.monotonic() - start, 1))


def _grade(submission: Submission, seconds: float) -> list[Result]:
    """Run a notebook, and once more without each answer that stops it."""
    final = {}  # exercise -> what stopped the kernel
    run = None
    # each run takes one answer out, so it ends
    for _ in range(len(submission.exercises) + 1):
        run = _run(submission, seconds)
        if run.stopped is None:
            break
        index, how = run.stopped
        if name := submission.pieces[index].exercise:
            final[name] = Result(name, ERROR, how)
        rest = without(submission, index)
        if rest is None:  # a cell of the course, perhaps on a machine that is too slow
            break
        submission = rest
    return [final.get(name) or _result(name, run) for name in submission.exercises]


def _result(name: str, run: _Run) -> Result:
    if name in run.verdicts:
        verdict, line = run.verdicts[name]
        # an answer that is open and raised an error is one that was begun: `def` without a body, say
        if verdict == OPEN and name in run.errors:
            return Result(name, ERROR, run.errors[name])
        return Result(name, verdict, _short(line))
    if run.stopped:
        return Result(name, ERROR, f"not reached: another cell {run.stopped[1]}")
    if NOBODY in run.errors:  # without a model, say; then names are missing, which would look like the student's fault
        return Result(name, ERROR, _short(f"a cell of the course failed: {run.errors[NOBODY]}"))
    return Result(name, ERROR, run.errors.get(name, "its check did not run"))


def _short(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 4]} ..."


# -------------------------------------------------------------------------------------------------------- the kernel


def _run(submission: Submission, seconds: float) -> _Run:
    """Run all pieces in a fresh kernel, which ends with them. seconds: for all of them together."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    verdicts, errors, stopped = {}, {}, None
    with disk.scratch(Path(tempfile.gettempdir()), "qlora-lab-grade-") as scratch, ExitStack() as stack:
        disk.make_folder(scratch / "work")  # where the kernel runs; verdicts lie beside it
        cells = [(index, source) for index, piece in enumerate(submission.pieces) for source in _cells(piece, scratch)]
        client = _client([source for _, source in cells])
        _start(client, scratch, stack)
        end = time.monotonic() + seconds  # a kernel that starts slowly is not the student's fault
        client.timeout_func = lambda cell: max(1, end - time.monotonic())  # 0 would be no limit
        # not client.execute(), which takes Ctrl-C for itself, and does not say that it came
        for place, (index, _) in enumerate(cells):
            try:
                _execute(client, place)
            except CellTimeoutError:
                stopped = index, f"did not end within {seconds / 60:g} min"
                break
            except DeadKernelError:
                stopped = index, "ended its kernel"
                break
            piece = submission.pieces[index]
            for output in client.nb.cells[place].outputs[:1] if piece.kind != ADDED else ():
                errors.setdefault(piece.exercise, _short(f"{output.ename}: {output.evalue}").rstrip(": "))
        verdicts = {name: found for name in submission.exercises if (found := _verdict(scratch / f"{name}.json", name))}
    return _Run(verdicts, errors, stopped)


def _start(client, scratch: Path, stack: ExitStack) -> None:
    """Start the kernel; it ends with `stack`.

    Jupyter looks for free ports first and takes them later. Where several kernels start at once, one may be gone.
    """
    for tries_left in reversed(range(TRIES)):
        try:
            stack.enter_context(client.setup_kernel(**_options(scratch)))
            return
        except RuntimeError as error:
            if not tries_left:
                advice = "`python -m ipykernel --version` says whether it is installed"
                raise OSError(f"Jupyter's kernel does not start ({_short(str(error))}): {advice}") from error


def _verdict(file: Path, name: str) -> tuple[str, str] | None:
    """Read what a check has saved; None where it saved nothing, or where a student wrote over it."""
    try:
        verdict, line = read_json(file, {name: LIST}, [name])[name]
    except (FileNotFoundError, ValueError):
        return None
    # a student's program may write here, too
    return (verdict, line) if verdict in (PASSED, FAILED, OPEN) and isinstance(line, str) else None


def _execute(client, place: int) -> None:
    """Run one cell. Ctrl-C leaves a task behind that will find its kernel dead, and complain to nobody."""
    try:
        client.execute_cell(client.nb.cells[place], place)
    except KeyboardInterrupt:
        waiting = client.task_poll_for_reply
        for task in asyncio.all_tasks(waiting.get_loop()) if waiting else ():
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # heard, so not reported
        raise


def _cells(piece: Piece, scratch: Path) -> list[str]:
    """A check is surrounded by two cells: what was checked before is forgotten, and what it finds is saved."""
    if piece.kind != CHECK:
        return [piece.source]
    start = "from qlora_lab.exercises import verdicts as _verdicts"
    file = str(scratch / f"{piece.exercise}.json")
    return [f"{start}; _verdicts.clear()", piece.source, f"{start}; _verdicts.save({file!r})"]


def _client(sources: list[str]):
    """Make a client that keeps errors and no other output: an endless `print` would fill the memory."""
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        def output(self, outs, msg, display_id, cell_index):
            return super().output(outs, msg, display_id, cell_index) if msg["msg_type"] == "error" else None

    return Client(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]),
        kernel_name="python3",  # not the one that the student's machine had
        allow_errors=True,  # the other exercises still count
        startup_timeout=START_SECONDS,
        shutdown_kernel="immediate",  # a grader keeps nothing of it
        store_widget_state=False,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )


def _options(scratch: Path) -> dict:
    """How the kernel starts: in scratch, silent, and without your own profile."""
    environment = os.environ | {"IPYTHONDIR": str(scratch / "ipython")}
    if not is_packaged():  # the library that checks is the one that grades, whichever is installed beside a checkout
        earlier = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(course_path()), earlier]))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return {"cwd": str(scratch / "work"), "env": environment, **silent}


# ---------------------------------------------------------------------------------------------------- the score file


def scores(grades: Sequence[Grade], version: str, complete: bool = True) -> dict:
    """Return what the score file holds: a row for each notebook, and the totals.

    version: of the library, whose checks decided. complete: no notebook is missing.
    """
    rows = []
    for one in grades:
        exercises = {result.exercise: {"result": result.result, "line": result.line} for result in one.results}
        row = {"file": one.file, "notebook": one.notebook, "passed": one.passed, "out_of": one.out_of}
        rows.append(row | {"seconds": one.seconds, "exercises": exercises})
    totals = {"passed": sum(one.passed for one in grades), "out_of": sum(one.out_of for one in grades)}
    return {"qlora_lab": version, "complete": complete, **totals, "notebooks": rows}


def save_scores(path: str | Path, grades: Sequence[Grade], version: str, complete: bool = True) -> Path:
    """Write the scores as JSON, one line for each notebook, and return the path. Raises as check_scores_path does."""
    path = check_scores_path(path)
    content = scores(grades, version, complete)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in content.pop("notebooks"))
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items())
    replace_text(path, f'{{\n{head} "notebooks": [\n{rows}\n ]\n}}\n')
    return path


def check_scores_path(path: str | Path) -> Path:
    """Return the path if scores may be written there.

    Raises FileExistsError for a path that holds anything but scores, FileNotFoundError for a folder that is not there,
    and ValueError for an empty path.
    """
    return out_replacing(path, "a file of scores", lambda path: read_json(path, _SCORES, _SCORES))


_SCORES = {"qlora_lab": TEXT, "complete": SWITCH, "passed": whole(0), "out_of": whole(0), "notebooks": LIST}
