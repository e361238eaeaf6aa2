"""Run all checks in stages, and list at the end which of them failed.

    python tools/stages.py              all of them, as `make test` does
    python tools/stages.py fast slow    these

A failed stage does not stop the others; Ctrl-C does. Exit code 1: a stage failed. 2: a name is unknown. 130: Ctrl-C.

Two workers of pytest with one thread each are faster than one worker with two threads. Tests that need several threads
set their number themselves. Five stages run the fast tests as on another machine: three with a given winner of the
race of products (qlora_lab/kernels/product.py), "old" on a CPU without AVX2, and "readable" without kernels.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest"]
WORKERS = ["-n", "2"]
TESTS = ["-p", "no:nbval", "--ignore=tests/browser", "tests"]  # nbval takes a second to import
FAST = [*PYTEST, *WORKERS, "--dist", "worksteal", *TESTS, "-m", "not slow"]
# slow tests that are the same on every machine: the interpreter of GPU kernels, faults of disks and files
SAME = ["kernels/triton", "gpu_code", "test_bench_gpu_day.py", "test_faults.py", "test_fuzz.py", "test_readers.py"]
SAME += ["test_strangers.py", "cli/test_cli_absurd.py", "cli/test_cli_streams.py", "tools/test_trust.py"]
ELSEWHERE = [*FAST, *(f"--ignore=tests/{name}" for name in SAME)]
ARITHMETIC = [
    *ELSEWHERE,
    *(f"--ignore=tests/{room}" for room in ("files", "quant", "show", "tools")),
]  # rooms without products
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}  # six stages compile the same tests: keep what the first one compiled
INTERRUPTED = 130  # a shell's exit code after Ctrl-C
NBVAL = [*PYTEST, *WORKERS, "--dist", "loadfile", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=1200"]
NBVAL += ["--nbval-sanitize-with=nbval_sanitize.cfg"]


class Stage(NamedTuple):
    """A command, and the variables that it adds to the environment."""

    command: list[str]
    environment: dict[str, str] = {}


STAGES = {
    "normalised": Stage([sys.executable, "tools/notebooks.py", "--check"]),
    "fast": Stage([*FAST, "qlora_lab"]),
    "float32": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "float32"}),
    "onednn": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "onednn"}),
    "bfloat16": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "bfloat16"}),
    "old": Stage(ELSEWHERE, {"NUMBA_CPU_NAME": "generic", "ATEN_CPU_CAPABILITY": "default"}),
    "readable": Stage(ELSEWHERE, {"QLORA_LAB_KERNELS": "reference"}),
    "model": Stage([sys.executable, "-m", "qlora_lab.cli", "fetch", "smollm2-135m"]),
    "slow": Stage([*PYTEST, *WORKERS, *TESTS, "-m", "slow"]),
    "browser": Stage([*PYTEST, "tests/browser"]),
    # one after the other: a notebook and its solution share results in the temporary folder
    "notebooks": Stage([*NBVAL, "--ignore=notebooks/solutions", "notebooks"]),
    "solutions": Stage([*NBVAL, "notebooks/solutions"]),
}


def run(names: list[str]) -> dict[str, tuple[int, float]]:
    """Name -> (exit code, seconds) of each stage, in this order."""
    results = {}
    for name in names:
        print(f"\n=== {name}", flush=True)
        stage = STAGES[name]
        start = time.monotonic()
        threads = {"OMP_NUM_THREADS": "1"} if "-n" in stage.command else {}
        environment = os.environ | BYTECODE | threads | stage.environment
        process = subprocess.Popen(stage.command, cwd=ROOT, env=environment)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sends it to the stage as well, which reports before it ends
            process.wait()
            code = INTERRUPTED
        results[name] = code, time.monotonic() - start
        if code == INTERRUPTED:
            break
    return results


def summary(results: dict[str, tuple[int, float]]) -> str:
    """A line for each stage: whether it passed, and how long it took."""
    words = {0: "passed", INTERRUPTED: "interrupted"}
    lines = [
        f"{name:<12}{words.get(code, f'FAILED (exit code {code})'):<24}{seconds:6.0f} s"
        for name, (code, seconds) in results.items()
    ]
    return "\n".join(["", "=== all stages", *lines])


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in STAGES]:
        print(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}", file=sys.stderr)
        return 2
    results = run(names or list(STAGES))
    print(summary(results))
    codes = {code for code, _ in results.values()}
    return INTERRUPTED if INTERRUPTED in codes else int(codes != {0})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
