"""The GPU bench runs end to end under the interpreter, and stops where a rung is wrong. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).parent.parent
RUNGS = {
    "quantize_nf4", "dequantize_nf4", "dequantize_double", "double_quantize", "double_dequantize", "gemv_nf4",
    "matmul_nf4", "matmul_nf4_backward", "adamw_8bit",
}  # fmt: skip


def python(*arguments: str, interpret: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[str, dict, list[str]]:
    folder = tmp_path_factory.mktemp("gpu")
    done = python("bench/gpu.py", "--quick", "--out", str(folder / "quick.json"))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "quick.json").read_text()), [path.name for path in folder.iterdir()]


@pytest.mark.slow
def test_it_runs_from_end_to_end(quick):
    _, result, files = quick
    assert files == ["quick.json"] and result["interpreted"] is True and result["half"] == "bfloat16"
    assert result.keys() >= {"device", "driver", "cuda", "capability", "date", "versions", "bandwidth", "rate"}
    assert result["versions"].keys() >= {"triton", "torch", "bitsandbytes", "torchao"}
    assert {row["work"] for row in result["rows"]} == RUNGS | {"layer forward", "layer forward and backward"}
    for row in result["rows"]:
        assert "median" in row["seconds"]["ours"] and "median" in row["seconds"]["readable"], row
        for one in row["seconds"].values():
            assert "error" in one or (one["low"] <= one["median"] <= one["high"] and one["share"] > 0), row
        assert "median" in row["seconds"]["bitsandbytes"], row["seconds"]["bitsandbytes"]


@pytest.mark.slow
def test_floors_are_bytes_and_operations(quick):
    row = next(row for row in quick[1]["rows"] if row["work"] == "matmul_nf4" and row["tokens"] == 20)
    packed = 64 * 128 // 2 + 64 * 128 // 64 + 4 + 4  # codes, codes of constants, one scale, one offset
    assert row["moved"] == packed + 2 * 20 * (64 + 128) and row["operations"] == 2 * 64 * 128 * 20
    both = next(r for r in quick[1]["rows"] if r["work"] == "layer forward and backward" and r["tokens"] == 20)
    assert (both["moved"], both["operations"]) == (2 * row["moved"], 2 * row["operations"])


@pytest.mark.slow
def test_one_table_has_every_row(quick):
    text, result, _ = quick
    assert text.strip() == gpu.table(result) and text.count("ours ") == len(result["rows"])


BROKEN = """
import sys
sys.path.insert(0, ".")
from bench import gpu, gpu_check
right = gpu_check.{rung}
def {rung}(*arguments):
    {body}
gpu_check.{rung} = {rung}
sys.argv = ["gpu.py", "--quick", "--out", sys.argv[1]]
gpu.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rung", "body", "message"),
    [
        ("dequantize_nf4", "right(*arguments); arguments[-1][-1:] += 1", "dequantize_nf4 differs from its twin, 1 wei"),
        ("gemv_nf4", "return right(*arguments) * 1.02", "gemv_nf4 differs from its twin, 3 x 64, 1 tokens, float32"),
        ("adamw_8bit", "raise RuntimeError('no shared memory')", "adamw_8bit did not run, 1 parameters, float32, step"),
    ],
)
def test_a_broken_rung_stops_it(rung, body, message, tmp_path):
    done = python("-c", BROKEN.format(rung=rung, body=body), str(tmp_path / "out.json"))
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr and "Nothing was measured" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_a_gpu_and_the_interpreter_it_says_so():
    done = python("bench/gpu.py", interpret=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("torch finds no CUDA device here") and done.stderr.count("\n") == 1


def test_what_a_peer_does_not_take_is_recorded(monkeypatch):
    def refuses():
        raise ValueError("not this shape\nand more")

    bench = object.__new__(gpu.Bench)
    bench.on_gpu, bench.quick, bench.rounds = False, True, 3
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "torchao" else True)
    found = bench.measure({"ours": lambda: lambda: None, "bitsandbytes": refuses, "torchao": refuses})
    assert found["bitsandbytes"] == {"error": "ValueError: not this shape"}
    assert found["torchao"] == {"error": "not installed"} and found["ours"]["rounds"] == 3


def result(ours: dict, theirs: dict) -> dict:
    key = {"work": "dequantize_double", "shape": [4096, 4096], "dtype": "bfloat16"}
    row = key | {"seconds": {"ours": ours, "bitsandbytes": theirs}}
    facts = {"device": "Imagined 1", "date": "2000-01-01", "half": "bfloat16", "bandwidth": 1e12, "rate": 2e13}
    return facts | {"rows": [row]}


def test_the_readme_lists_what_was_measured():
    text = f"a\n{gpu.BEGIN}\nold\n{gpu.END}\nb"
    assert gpu.in_readme(text, []) == f"a\n{gpu.BEGIN}\n{gpu.END}\nb"
    ours = {"median": 2e-3, "share": 0.5}
    shown = gpu.in_readme(text, [result(ours, {"median": 3e-3}), result({"error": "E: x"}, {"error": "not installed"})])
    assert "| Imagined 1 | 2000-01-01 | 1000 | 20 | 2 ms, 0.50, bitsandbytes x 1.50 |  |  |" in shown
    assert "| Imagined 1 | 2000-01-01 | 1000 | 20 | E: x |  |  |" in shown
    with pytest.raises(ValueError, match="bench/README.md needs one line"):
        gpu.in_readme("", [])


def test_the_readme_is_made_from_the_files():
    readme = (ROOT / "bench" / "README.md").read_text("utf-8")
    assert gpu.in_readme(readme, gpu.stored()) == readme, "run: python bench/gpu.py --render"
    assert not any(one["interpreted"] for one in gpu.stored())
