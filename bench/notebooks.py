"""Measure the memory of each notebook's kernel: bench/notebooks.json, which `qlora-lab doctor --machine` reads.

    python bench/notebooks.py                      all, in an hour or more on one core
    python bench/notebooks.py 01_codebook          only these; the other rows stay

In: the notebooks, which are copied. Out: for each, the largest resident set of its kernel or of a process that the
kernel started, in bytes, the seconds of the whole, and when and where that was: rows are measured on different days.
Memory depends little on what else the machine does; seconds do.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qlora_lab.files.replace import replace_text  # noqa: E402 - the script stands beside its folder

RESULT = ROOT / "bench" / "notebooks.json"
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss: macOS counts bytes, Linux KiB
# A process of its own for each: a maximum never falls. The kernel is its child, whose maximum it inherits at the end.
# Guards of the prose are left out: students see none, and one that compares times fails on a busy machine.
RUN = """import sys, nbformat
from pathlib import Path
from tools.notebooks import execute
path = Path(sys.argv[1])
notebook = nbformat.read(path, 4)
notebook.cells = [cell for cell in notebook.cells if "guard" not in cell.metadata.get("tags", [])]
execute(notebook, path.parent)"""


def measured(path: Path) -> dict[str, float | str]:
    """Run a notebook; bytes at the peak, seconds, date and machine. Raises RuntimeError if a cell raises."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", RUN, str(path)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen would look for the process again
    if process.returncode:
        raise RuntimeError(f"{path.name} ended with {process.returncode}: run it with tools/notebooks.py")
    # no name of the kernel: it can tell whose machine it was
    system = f"{platform.system()} {platform.machine()}"
    machine = {"system": system, "python": platform.python_version(), "cores": os.cpu_count()}
    seconds = round(time.monotonic() - begin, 1)
    return {"peak_bytes": usage.ru_maxrss * UNIT, "seconds": seconds, "date": str(datetime.date.today())} | machine


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of each notebook's kernel.")
    parser.add_argument("names", nargs="*", help="such as 01_codebook; none: all")
    parser.add_argument("--out", type=Path, default=RESULT, help="(%(default)s)")
    a = parser.parse_args(argv)
    known = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    if unknown := sorted({*a.names} - {*known}):
        parser.error(f"there is no notebook {unknown[0]!r}: name some of {', '.join(known)}")
    rows = json.loads(a.out.read_text("utf-8"))["notebooks"] if a.names and a.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(ROOT / "notebooks", Path(folder) / "notebooks")  # a notebook may write beside itself
        for name in a.names or known:
            rows[name] = measured(copy / f"{name}.ipynb")
            print(f"{name}: {rows[name]['peak_bytes'] / 2**20:,.0f} MiB, {rows[name]['seconds']} s", flush=True)
            content = {"notebooks": dict(sorted(rows.items()))}
            replace_text(a.out, json.dumps(content, indent=1) + "\n")  # after each: an interruption loses one


if __name__ == "__main__":
    main(sys.argv[1:])
