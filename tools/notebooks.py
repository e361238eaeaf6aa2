"""Run every notebook and store it so that a second run leaves no diff: `make notebooks`.

In: notebooks/NN_*.ipynb and notebooks/solutions/NN_*.ipynb. Out: the same files, executed top to bottom and
normalised: fixed cell ids, counts 1, 2, 3, ..., no timestamps, no widget state, one kernel name. A file is replaced
as a whole or not at all.

Seconds differ from run to run, and losses from machine to machine. A cell that shows them is tagged
`nbval-ignore-output`. If all that changed in a notebook is numbers in such cells, and pictures drawn from them, the
stored file stays as it is, and the cells are named. `--figures` stores them.

If a notebook has a solution, the student's notebook is generated from it. In a cell tagged `exercise`, the lines

    # solution
    levels = torch.cat([negative, positive])
    # end solution

become `levels = ...`. If the region's last line is an assignment, its target is kept, so that the name exists. If it
returns, `return ...` stands there. Otherwise `...` stands alone. A link to `../10_finetune_llama.ipynb` becomes one to
`10_finetune_llama.ipynb`, because the student's notebook lies one folder higher.

    python tools/notebooks.py                                run all
    python tools/notebooks.py notebooks/01_codebook.ipynb    run one (and its solution)
    python tools/notebooks.py --check                        run nothing: exit code 1 if anything would change

Not here: what a good notebook looks like (notebook_rules.py), and comparing outputs (nbval).
"""

import argparse
import ast
import os
import re
import sys
import textwrap
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from qlora_lab.files.replace import replace_text

START, END = "# solution", "# end solution"
UNCOMPARED = "nbval-ignore-output"  # the tag of a cell whose figures may differ from run to run
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
_PICTURE = re.compile(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+")
_FIGURE = re.compile(r" *(?<![A-Za-z\d#])[-+]?\d+([.,]\d+)*(e[-+]?\d+)?")  # a number, and no part of a name
_STYLE = re.compile(r'style="[^"]*"')
_VIEW = "application/vnd.jupyter.widget-view+json"
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def normalise(notebook):
    """Remove, in place, everything that differs between two runs. Returns the notebook."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    notebook.nbformat = 4
    notebook.nbformat_minor = 5
    count = 0
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{cell.cell_type}-{i:03d}"
        kept = {key: value for key, value in cell.metadata.items() if key in ("tags", "jupyter")}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            count += cell.execution_count is not None
            _normalise_outputs(cell, count)
    nbformat.validate(notebook)
    return notebook


def _normalise_outputs(cell, count):
    if cell.execution_count is not None:
        cell.execution_count = count
    cell.outputs = [output for output in cell.outputs if list(output.get("data", {})) != [_VIEW]]  # over its still
    for output in cell.outputs:
        if "execution_count" in output:
            output.execution_count = cell.execution_count
        if len(output.get("data", {})) > 1:  # a widget's id is random; an empty output is invalid
            output.data.pop(_VIEW, None)
        if "metadata" in output:
            output.metadata.pop(_VIEW, None)


def student_version(solution):
    """Replace each solution region by its stub, drop the outputs, shorten links. ValueError names a bad cell."""
    student = nbformat.from_dict(solution)
    for i, cell in enumerate(student.cells):
        tagged = "exercise" in cell.metadata.get("tags", [])
        marked = any(line.strip() in (START, END) for line in cell.source.splitlines())
        if tagged != marked:
            rule = f"a cell tagged 'exercise' holds '{START}' ... '{END}', and no other cell does"
            raise ValueError(f"cell {i}: {rule}; {'add the region' if tagged else 'add the tag'}.")
        if marked:
            cell.source = _stub(cell.source, i)
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
        else:
            cell.source = cell.source.replace("](../", "](")
    return student


def _stub(source, i):
    out = []
    region = None
    for line in source.splitlines():
        mark = line.strip()
        if mark == (END if region is None else START):
            raise ValueError(f"cell {i}: '{mark}' does not pair up; write '{START}', the answer, '{END}'.")
        if mark == START:
            region = []
            indent = line[: len(line) - len(line.lstrip())]
        elif mark == END:
            out.append(indent + _left_open(region))
            region = None
        else:
            (out if region is None else region).append(line)
    if region is not None:
        raise ValueError(f"cell {i}: '{START}' has no '{END}'; add it after the answer.")
    return "\n".join(out)


def _left_open(region):
    """The one line that stands for an answer: `name = ...`, `return ...` or `...`."""
    body = textwrap.indent(textwrap.dedent("\n".join(region)), " ")  # inside a function, where `return` parses
    last = [None, *ast.parse(f"def answer():\n{body}\n pass").body[0].body[:-1]][-1]
    if isinstance(last, ast.Return):
        return "return ..."
    if not isinstance(last, ast.Assign):
        return "..."
    target = last.targets[0]
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    return " = ".join(ast.unparse(name) for name in names) + " = ..."


def execute(notebook, folder):
    """Run all cells in a fresh kernel started in `folder`; outputs land in the notebook."""
    client = NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # or each kernel warns about local sockets
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return notebook


def text_of(notebook):
    return nbformat.writes(notebook) + "\n"


def solution_of(path):
    """The path of a student's notebook's solution, whether or not there is one."""
    return path.parent / "solutions" / path.name


def check(path):
    """What `make notebooks` would change about one notebook without running it: a list of sentences."""
    if not path.exists():
        return ["is missing, though it has a solution"]
    text = path.read_text("utf-8")
    notebook = nbformat.reads(text, 4)
    problems = [] if text_of(normalise(nbformat.reads(text, 4))) == text else ["is not normalised"]
    if solution_of(path).exists():
        wanted = student_version(normalise(nbformat.read(solution_of(path), 4)))
        if _sources(notebook) != _sources(wanted):
            problems.append(f"differs from what solutions/{path.name} generates; edit the solution, not this file")
    elif path.parent.name != "solutions" and any("exercise" in c.metadata.get("tags", []) for c in notebook.cells):
        problems.append(f"has exercises but no solutions/{path.name}")
    return problems


def _sources(notebook):
    return [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in notebook.cells]


def run(path, figures=False):
    """Generate one notebook from its solution if it has one, run it, and store it if it changed. Returns the news.

    figures: store new numbers of cells that may show others in each run, too.
    """
    source = solution_of(path) if solution_of(path).exists() else path
    notebook = nbformat.read(source, 4)
    if source != path:
        notebook = student_version(notebook)
    new = normalise(execute(notebook, path.parent))
    old, text = path.read_text("utf-8") if path.exists() else "", text_of(new)
    if old == text:
        return "unchanged"
    if not figures and (left := _left(old, new)):
        return f"unchanged but for figures in cells {', '.join(map(str, left))}, which --figures stores"
    replace_text(path, text)
    return "changed"


def _left(old, new):
    """The cells whose figures alone are new, if nothing else in the notebook is. old: its text as it is stored."""
    try:
        stored = nbformat.reads(old, 4)
        nbformat.validate(stored)
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError):  # JSON that is no notebook
        return []
    compared = nbformat.from_dict(new)
    pairs = enumerate(zip(stored.cells, compared.cells, strict=False))
    left = [i for i, (before, cell) in pairs if before.source == cell.source and _says_the_same(before, cell)]
    for i in left:
        compared.cells[i].outputs = stored.cells[i].outputs
    return left if old == text_of(compared) else []


def _says_the_same(before, cell):
    """Whether a cell that may do so shows new figures in the same words. A picture that alone is new is drawn anew."""
    if {before.cell_type, cell.cell_type} != {"code"} or UNCOMPARED not in cell.metadata.get("tags", []):
        return False
    texts = [_PICTURE.sub("", "\n".join(_said(c))) for c in (before, cell)]
    words = [(_FIGURE.sub(" 0", _STYLE.sub("", text)), _STYLE.findall(text)) for text in texts]
    return words[0] == words[1] and _plain(before) != _plain(cell)


def _said(cell):
    """All texts of a cell's outputs, with what kind of output each is."""
    for output in cell.outputs:
        yield from (output.output_type, output.get("name", ""), output.get("text", ""), output.get("evalue", ""))
        yield str(output.get("metadata", ""))
        yield from (f"{kind}: {text}" for kind, text in sorted(output.get("data", {}).items()))


def _plain(cell):
    return [output.get("text") or output.get("data", {}).get("text/plain") for output in cell.outputs]


def find(paths):
    """The notebooks meant by `paths` (all of them if none), each solution before its student's notebook."""
    paths = paths or [*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("solutions/*.ipynb")]
    students = sorted({p.parent.parent / p.name if p.parent.name == "solutions" else p for p in paths})
    return [p for s in students for p in (solution_of(s), s) if p.exists() or solution_of(p).exists()]


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Run and store the notebooks so that a second run leaves no diff.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all in notebooks/)")
    parser.add_argument("--figures", action="store_true", help="store new figures of cells that may differ, too")
    parser.add_argument("--check", action="store_true", help="start no kernel; exit 1 if anything would change")
    args = parser.parse_args(arguments)
    for path in args.paths:
        if not (path.exists() or solution_of(path).exists()):
            parser.error(f"{path} does not exist.")
    paths = find(args.paths)
    failed = sum(
        _report(path, f"[{n}/{len(paths)}] {os.path.relpath(path)}", args.check, args.figures)
        for n, path in enumerate(paths, 1)
    )
    return 1 if failed else 0


def _report(path, label, check_only, figures):
    """Check or run one notebook, print one line, and say whether it failed."""
    print(label, end=" ", flush=True)
    start = time.monotonic()
    try:
        problems = check(path) if check_only else []
        news = "" if check_only else run(path, figures)
    except (CellExecutionError, nbformat.ValidationError, ValueError) as err:
        problems = [f"failed, the file is untouched:\n{err}"]
    print("; ".join(problems) or f"{news or 'ok'} ({time.monotonic() - start:.0f} s)")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
