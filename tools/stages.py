"""Run all checks in stages, and list at the end which of them failed.

    python tools/stages.py              all of them, as `make test` does
    python tools/stages.py fast slow    these

A failed stage does not stop the others; Ctrl-C does. Exit code 1: a stage failed. 2: a name is unknown. 130: Ctrl-C.

Two workers of pytest with one thread each are faster than one worker with two threads. Tests that need several threads
set their number themselves. "fast" runs what takes less than a tenth of a second, "long" what takes more and is not
marked slow. Both fix the winner of the race of products (qlora_lab/kernels/product.py) at float32. Four stages repeat
some of these as on another machine: two with another winner, "old" on a CPU without AVX2, and "readable" without
kernels; "onednn" and "readable" repeat none of "long". They repeat the tests that the first two noted: a test that has
not asked who won, or which kernels run, cannot tell. "old" also repeats the rooms of TORCH_ALONE, which is a choice. In
all other stages products race.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTEST = [sys.executable, "-m", "pytest"]
WORKERS = ["-n", "2"]
TESTS = ["-p", "no:nbval", "--ignore=tests/browser", "tests"]  # nbval takes a second to import
STEALING = [*PYTEST, *WORKERS, "--dist", "worksteal", *TESTS]
BY_FILE = [*PYTEST, *WORKERS, "--dist", "loadfile", "--no-loadscope-reorder"]
# tests that are the same on every machine: the interpreter of GPU kernels, faults of disks and files
SAME = ["kernels/triton", "gpu_code", "test_bench_gpu_day.py", "test_faults.py", "test_fuzz.py", "test_readers.py"]
SAME += ["test_strangers.py", "test_home_folder.py", "cli/test_cli_absurd.py", "cli/test_cli_streams.py"]
SAME += ["tools/test_trust.py", "test_default_dtype.py"]
# Text, files, pictures and plans: rooms and files of tests/. Nothing in these asks which kernels or products run: a
# test that does fails in the fast stage (own_race in tests/conftest.py), and its file has to leave the list. A new file
# is in no list and runs in each stage.
WITHOUT_NUMBERS = ["data", "exercises", "files", "tools", "test_architecture.py", "test_bench.py", "test_bench_gpu.py"]
WITHOUT_NUMBERS += [
    "test_notebook_06.py",
    "cli/test_cli_memory.py",
    "cli/test_cli_options.py",
    "cli/test_cli_grade.py",
    "model/test_fetch.py",
]
WITHOUT_NUMBERS += [f"memory/test_{name}.py" for name in ("fit", "published", "shape")]
PICTURES = ["block_size", "escape", "explorer", "figure", "labels", "memory", "page_table", "slider", "source"]
PICTURES += ["adapter_places", "results", "tournament", "tournament_page", "zoo"]
WITHOUT_NUMBERS += [f"show/test_{name}.py" for name in PICTURES]

# Without AVX2 torch itself has other last bits: linspace does. Chosen are two rooms that compare bits of what torch
# computes alone. Others could differ as well (train, adapters, model), but of these "old" repeats only what asked.
TORCH_ALONE = ["quant", "optim"]


def again(*options: str) -> list[str]:
    """Command of the fast and long tests but those that are the same everywhere."""
    ignored = (f"--ignore=tests/{name}" for name in [*SAME, *WITHOUT_NUMBERS])
    return [*STEALING, "-m", "not slow", *ignored, *options]


def computes_with_torch(path: Path) -> bool:
    return any(ROOT / "tests" / room in path.parents for room in TORCH_ALONE)


def unexpected(calls: set[str], path: Path) -> str | None:
    """Name the choice that a test in this file has asked for, although the list says that none of its tests does."""
    asked = next((call for call in ("_choose", "race", "run") if call in calls), None)
    # Few tests ask, so few paths are compared.
    listed = asked and any(ROOT / "tests" / name in (path, *path.parents) for name in WITHOUT_NUMBERS)
    return asked if listed else None


# --without: tests that set themselves, each in its turn, what the stage sets for all
# --asking: after "fast" and "long", only the tests that asked for what the stage sets; alone, all of them
# --marked: only files that hold this mark
ARITHMETIC = again("--without=outcome", "--asking=race")
# For oneDNN, whose products are float32 as those of "long" are and differ in the order of sums, and for the readable
# functions, which kernels are compared with everywhere: the last -m counts.
FAST = ["-m", "not slow and not long"]
NOTES = "QLORA_LAB_TEST_NOTES"  # names the folder in which tests/conftest.py notes what each test has asked for
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}  # six stages compile the same tests: keep what the first one compiled
INTERRUPTED = 130  # a shell's exit code after Ctrl-C
# The installed wheel runs the course. A notebook and its solution are a pair for one worker and one kernel: they
# share results in the temporary folder, and nearly all of their cells.
COURSE = [sys.executable, "tools/from_wheel.py", *PYTEST, "-p", "tools.pairs", "--no-loadscope-reorder"]
COURSE += ["--nbval-current-env", "--nbval-cell-timeout=1200", "--nbval-sanitize-with=nbval_sanitize.cfg"]
# files with more than 20 s of slow tests, the longest first: begun late, they would leave one worker without work, too
LONG = ["test_trust.py", "test_lm_eval.py", "test_cli_streams.py", "test_machines.py", "test_distributed.py"]
LONG += ["test_killed_overwrite.py", "test_strangers.py", "test_site.py", "test_checkpoint.py", "test_bench_gpu_day.py"]
LONG += ["test_aot.py", "test_predict.py", "test_diagnose.py", "test_families.py", "test_live.py", "test_bench.py"]
LONG += ["test_mixtures.py", "test_default_model.py", "test_expert_parallel.py", "test_cpu.py", "test_paged_adamw.py"]
LONG += ["test_simulated_games.py", "test_kills.py", "test_perplexity.py", "test_wheel.py"]
# Longer than all others on one worker: a stage of its own, where it has both cores
LONGEST = ROOT / "notebooks" / "10_finetune_llama.ipynb"
OTHERS = sorted(path for path in (ROOT / "notebooks").glob("*.ipynb") if path != LONGEST)


class Stage(NamedTuple):
    """A command, and the variables that it adds to the environment."""

    command: list[str]
    environment: dict[str, str] = {}


STAGES = {
    "normalised": Stage([sys.executable, "tools/notebooks.py", "--check"]),
    # before "fast": it compiles the kernels, which a machine does once
    "long": Stage([*STEALING, "--marked=long", "-m", "long and not slow"], {"QLORA_LAB_PRODUCTS": "float32"}),
    "fast": Stage([*STEALING, "qlora_lab", *FAST], {"QLORA_LAB_PRODUCTS": "float32"}),
    "onednn": Stage([*ARITHMETIC, *FAST], {"QLORA_LAB_PRODUCTS": "onednn"}),
    "bfloat16": Stage(ARITHMETIC, {"QLORA_LAB_PRODUCTS": "bfloat16"}),
    "old": Stage(
        again("--asking=_choose,race,run,torch"), {"NUMBA_CPU_NAME": "generic", "ATEN_CPU_CAPABILITY": "default"}
    ),
    "readable": Stage(again("--without=with_kernels", "--asking=_choose", *FAST), {"QLORA_LAB_KERNELS": "reference"}),
    "model": Stage([sys.executable, "-m", "qlora_lab.cli", "fetch", "smollm2-135m"]),
    # one worker runs a file's tests, which share what is slow: all kernels compiled, a wheel, a bench's rows
    "slow": Stage([*BY_FILE, *TESTS, "--marked=slow", "-m", "slow"]),
    # halves of the list, each with a JupyterLab and a Chromium of its own: tests of one notebook stay together
    "browser": Stage([*PYTEST, *WORKERS, "--dist", "worksteal", "tests/browser"]),
    "fine-tune": Stage([*COURSE, str(LONGEST)]),
    # the second path adds the rules of solutions
    "notebooks": Stage([*COURSE, *WORKERS, "--dist", "loadfile", *map(str, OTHERS), "notebooks/solutions"]),
}


def run(names: list[str], notes: str) -> dict[str, tuple[int, float]]:
    """Name -> (exit code, seconds) of each stage, in this order."""
    results = {}
    for name in names:
        print(f"\n=== {name}", flush=True)
        stage = STAGES[name]
        start = time.monotonic()
        threads = {"OMP_NUM_THREADS": "1"} if "-n" in stage.command else {}
        environment = os.environ | BYTECODE | threads | {NOTES: notes} | stage.environment
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
    with tempfile.TemporaryDirectory() as notes:
        results = run(names or list(STAGES), notes)
    print(summary(results))
    codes = {code for code, _ in results.values()}
    return INTERRUPTED if INTERRUPTED in codes else int(codes != {0})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
