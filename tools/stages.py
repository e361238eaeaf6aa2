"""Run the whole check in stages, and say at the end which of them failed.

    python tools/stages.py              all of them, as `make test` does
    python tools/stages.py fast slow    these

A stage that fails does not stop the others. Exit code 1: at least one failed; 2: a name is unknown.
Two workers of pytest with a thread each are faster than one with two; tests of several threads set their number
themselves, and the stage "onednn" has two. Five stages run what touches arithmetic as on another machine: three by the
winner of the race of products (qlora_lab/kernels/product.py), "old" on a CPU without AVX2, "readable" without kernels.
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
TESTS = ["--ignore=tests/browser", "tests"]
ARITHMETIC = [*PYTEST, *WORKERS, "-m", "not slow", "tests/kernels", "tests/finetune", "tests/measure"]
ARITHMETIC += ["--ignore=tests/kernels/triton"]  # the interpreter has no race, and takes as long as all else
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout=1200", "--nbval-sanitize-with=nbval_sanitize.cfg"]


class Stage(NamedTuple):
    """A command, and what it adds to the environment."""

    command: list[str]
    environment: dict[str, str] = {}


STAGES = {
    "normalised": Stage([sys.executable, "tools/notebooks.py", "--check"]),
    "fast": Stage([*PYTEST, *WORKERS, *TESTS, "qlora_lab", "-m", "not slow"]),
    "float32": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "float32"}),
    "onednn": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "onednn", "OMP_NUM_THREADS": "2"}),
    "bfloat16": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "bfloat16"}),
    "old": Stage(ARITHMETIC, {"NUMBA_CPU_NAME": "generic", "ATEN_CPU_CAPABILITY": "default"}),
    "readable": Stage(ARITHMETIC, {"QLORA_LAB_KERNELS": "reference"}),
    "model": Stage([sys.executable, "-m", "qlora_lab.cli", "fetch", "smollm2-135m"]),
    "slow": Stage([*PYTEST, *WORKERS, *TESTS, "-m", "slow"]),
    "browser": Stage([*PYTEST, "tests/browser", "--browser-runs", "2"]),
    # a notebook and its solution share results, so one worker runs both (conftest.py)
    "notebooks": Stage([*PYTEST, *WORKERS, "--dist", "loadgroup", *NBVAL, "notebooks"]),
}


def run(names: list[str]) -> dict[str, tuple[int, float]]:
    """Name -> (exit code, seconds) of each stage, in this order."""
    results = {}
    for name in names:
        print(f"\n=== {name}", flush=True)
        stage, start = STAGES[name], time.monotonic()
        threads = {"OMP_NUM_THREADS": "1"} if "-n" in stage.command else {}
        environment = os.environ | threads | stage.environment
        code = subprocess.run(stage.command, cwd=ROOT, env=environment, check=False).returncode
        results[name] = code, time.monotonic() - start
    return results


def summary(results: dict[str, tuple[int, float]]) -> str:
    """A line for each stage: whether it passed, and how long it took."""
    lines = [
        f"{name:<12}{'passed' if code == 0 else f'FAILED (exit code {code})':<24}{seconds:6.0f} s"
        for name, (code, seconds) in results.items()
    ]
    return "\n".join(["", "=== all stages", *lines])


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in STAGES]:
        print(f"unknown stage {unknown[0]!r}: choose from {', '.join(STAGES)}", file=sys.stderr)
        return 2
    results = run(names or list(STAGES))
    print(summary(results))
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
