"""The golden vectors: made from nothing of ours, read by numpy alone, and what each implementation makes of them."""

import ast
import importlib.util
import json
import shutil
import sys
import types
import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_lab import cli, kernels
from qlora_lab.cli import conformance as command
from qlora_lab.export import backends
from qlora_lab.export.backends import BACKENDS, OURS, Backend, running
from qlora_lab.export.conformance import (
    BYTES_EQUAL,
    CRASHED,
    DIFFERS,
    REFUSED,
    VALUES_EQUAL,
    Verdict,
    _verdict,
    _why,
    conformance,
    judge,
    read_cases,
    read_divergences,
)
from qlora_lab.kernels import vector
from qlora_lab.quant.codebook import evenly_spaced
from tools.conformance_page import PAGE, page, section

FOLDER = Path(__file__).parents[2] / "data" / "conformance"
ALIKE = {BYTES_EQUAL: 71, VALUES_EQUAL: 1, REFUSED: 4}


def script(name: str):
    """A file of data/conformance, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"conformance_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def report(name: str):
    """All cases, through one backend; several tests look at it."""
    return conformance(name, progress=False)


@pytest.fixture(scope="module")
def cases():
    return {case.name: case for case in read_cases(FOLDER)}


@pytest.fixture
def few(cases, monkeypatch):
    """Three cases for a command, one of each kind."""
    some = [cases[name] for name in ("ties_nf4", "signed_zeros_fp4", "refused_nan")]
    monkeypatch.setattr("qlora_lab.export.conformance.read_cases", lambda folder: some)


@pytest.fixture
def readable(monkeypatch):
    """Functions of ours outside of conformance(): no kernel is loaded for them."""
    monkeypatch.setenv(kernels.OVERRIDE, "reference")


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "vectors"))


# ------------------------------------------------------------------------------------------------------------- vectors


@pytest.mark.slow  # three seconds of fractions
def test_the_files_are_what_the_generator_makes():
    for name, content in script("make").files().items():
        assert (FOLDER / name).read_bytes() == content, "renew it: python data/conformance/make.py"


@pytest.mark.parametrize("name, allowed", [("make", set()), ("reader", {"numpy"})])
def test_they_need_nothing_of_ours(name, allowed):
    tree = ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules - set(sys.stdlib_module_names) == allowed


def test_bytes_that_can_be_worked_out_by_hand(cases):
    def packed(name):
        return bytes(cases[name].tensors["weight"].view(torch.uint8).reshape(-1).tolist())

    assert packed("levels_nf4") == bytes.fromhex("0123456789abcdef") * 4  # each level is its own nearest
    assert packed("zeros") == b"\x77" * 64 and packed("zeros_fp4") == bytes(64)
    assert packed("constant_block") == b"\xff" * 32 + b"\x00" * 32
    assert packed("one_outlier")[0] == 0xF7 and set(packed("one_outlier")[1:]) == {0x77}
    # 1, then each bound with its neighbours: the one below and the bound go down, the one above goes up
    ties = [15] + [code for low in range(15) for code in (low, low, low + 1)] + [7] * 18
    codes = [half for byte in packed("ties_nf4") for half in (byte >> 4, byte & 15)]
    assert sorted(codes) == sorted(ties) and codes[0] == 15


def test_every_edge_of_the_issue_is_there(cases):
    assert {case.dtype for case in cases.values()} == {"float32", "bfloat16", "float16"}
    assert {case.storage for case in cases.values()} == {"uint8", "bfloat16", "float16", "float32"}
    assert {case.block for case in cases.values()} == {32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert {(case.kind, case.nested) for case in cases.values()} == {(k, n) for k in ("nf4", "fp4") for n in (0, 1)}
    assert {case.input.numel() % 2 for case in cases.values()} == {0, 1}
    assert sum(file.stat().st_size for file in FOLDER.glob("*.*")) <= 300 * 1024


def test_the_reader_reads_the_same(cases):
    reader = script("reader")
    read = reader.read(FOLDER)
    assert [case["name"] for case in read] == list(cases)
    for case in read:
        ours = cases[case["name"]]
        assert (reader.as_float32(case["input"]) == ours.input.float().numpy()).all() or ours.refused
        assert case["tensors"].keys() == ours.tensors.keys()
        for name, array in case["tensors"].items():
            assert array.tobytes() == ours.tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert (case["decoded"] is None) == ours.refused
        assert ours.refused or np.array_equal(reader.as_float32(case["decoded"]), ours.decoded.float().numpy())


def test_damaged_vectors_are_named(copied):
    raw = (copied / "vectors.safetensors").read_bytes()
    (copied / "vectors.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"vectors.safetensors is damaged, its checksum is not the one in cases.json"):
        conformance("reference", copied, progress=False)
    with pytest.raises(ValueError, match="vectors.safetensors is damaged"):
        script("reader").read(copied)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda index: index.pop("cases"), "cases.json has no 'cases'"),
        (lambda index: index["cases"][3].pop("kind"), r"cases.json does not describe vectors.safetensors \(TypeError"),
        (lambda index: index["cases"][3].update(name="other"), r"cases.json does not describe .* 'input'\): take it"),
        (lambda index: index["cases"].append(7), "cases.json does not describe vectors.safetensors"),
    ],
)
def test_a_damaged_index_is_named(copied, damage, message):
    index = json.loads((copied / "cases.json").read_text())
    damage(index)
    (copied / "cases.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read_cases(copied)


@pytest.mark.parametrize(
    "text", ["{}", "[1]", '[{"backends": ["cpu"]}]', '[{"backends": 1, "cases": [], "verdict": 1}]']
)
def test_damaged_reasons_are_named(copied, text):
    (copied / "divergences.json").write_text(text)
    with pytest.raises(ValueError, match="divergences.json is damaged: each divergence has"):
        read_divergences(copied)


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.long
@pytest.mark.parametrize("name", ["reference", *(pytest.param(name, marks=pytest.mark.slow) for name in OURS[1:])])
def test_ours_has_the_expected_bytes(name):
    found = report(name)
    assert found.counts == ALIKE and found.findings == []
    assert [verdict.case for verdict in found.verdicts if not verdict.is_right] == ["signed_zeros_fp4"]


@pytest.mark.slow  # imports bitsandbytes
@pytest.mark.skipif(
    not torch.equal(evenly_spaced(0.1, 1, 129), torch.linspace(0.1, 1, 129)),
    reason="bitsandbytes makes its tables with torch.linspace, whose last bits differ on a CPU without AVX2",
)
def test_bitsandbytes_has_them_but_for_known_reasons():
    found = report("bitsandbytes")
    assert found.findings == [] and found.counts[BYTES_EQUAL] >= 64
    if "avx512bf16" in vector.host_features():
        assert section([found]) in PAGE.read_text("utf-8"), "renew it: python -m tools.conformance_page"


@pytest.mark.slow  # Triton's interpreter
def test_the_page_is_what_the_commands_find():
    """For ours; the test above does it for bitsandbytes."""
    found = page([report(name) for name in OURS])
    shared, tail = found.split("\n## bitsandbytes on a GPU")
    text = PAGE.read_text("utf-8")
    assert text.startswith(shared) and text.endswith(tail), "renew it: python -m tools.conformance_page"


def wrong(change):
    """The readable functions, with a fault in what they encode."""

    def encode(case):
        tensors, values = backends._our_encode(case)
        return change(tensors, values)

    return Backend("wrong", "1", backends.NOT_FINITE, encode, backends._our_read)


@pytest.mark.parametrize(
    "change, verdict, detail",
    [
        (lambda t, v: (t, v), BYTES_EQUAL, ""),
        (lambda t, v: (t | {"weight": t["weight"] >> 4 | t["weight"] << 4}, v), VALUES_EQUAL, "64 of 64 codes"),
        (lambda t, v: (t | {"weight.absmax": t["weight.absmax"] * 2}, v), VALUES_EQUAL, "1 of 1 absmax"),
        (lambda t, v: (t, v * 2), DIFFERS, "60 of 64 decoded values"),
        (lambda t, v: (t, torch.full_like(v, torch.nan)), DIFFERS, "64 of 64 decoded values"),
        (lambda t, v: (t, v.half()), DIFFERS, "decoded values are 64 of float16 instead of 64 of float32"),
        (lambda t, v: (t, v[1:]), DIFFERS, "decoded values are 63 of float32 instead of 64 of float32"),
        (lambda t, v: ({"weight": t["weight"]}, v), VALUES_EQUAL, "constants of another form"),
        (lambda t, v: (t | {"weight.SCB": v}, v), VALUES_EQUAL, "a further part weight.SCB"),
        (lambda t, v: (t | {"weight": t["weight"][:, 0]}, v), VALUES_EQUAL, "weight of shape (32,) instead of (32, 1)"),
    ],
)
def test_a_fault_is_seen(cases, readable, change, verdict, detail):
    assert judge(cases["levels_nf4"], wrong(change)) == (verdict, detail)


def test_a_wrong_state_and_a_wrong_reading_are_seen(cases, readable):
    case = cases["levels_nf4"]
    key = "weight.quant_state.bitsandbytes__nf4"
    other = torch.tensor(list(b'{"blocksize": 32}'), dtype=torch.uint8)
    assert judge(case, wrong(lambda t, v: (t | {key: other}, v))) == (VALUES_EQUAL, "another quant_state")
    right = wrong(lambda t, v: (t, v))
    misread = replace(right, read=lambda case: -case.decoded)
    assert judge(case, misread) == (DIFFERS, "60 of 64 read values")
    assert judge(cases["refused_nan"], right)[0] == REFUSED
    accepting = wrong(lambda t, v: (t, v))
    accepting = replace(accepting, encode=lambda case: ({}, case.input))
    assert judge(cases["refused_nan"], accepting) == (DIFFERS, "it is quantised")


@pytest.mark.parametrize("error", [KeyError("absmax"), RuntimeError("no nan here"), ValueError("a wrong shape")])
@pytest.mark.parametrize("name", ["refused_nan", "levels_nf4"])
def test_a_crash_is_no_refusal(cases, error, name):
    """Nor is it right where a refusal is expected."""

    def encode(case):
        raise error

    crashing = replace(wrong(None), encode=encode)
    assert judge(cases[name], crashing)[0] == CRASHED
    said = f"{type(error).__name__}: {error}"
    assert _verdict(cases[name], crashing, []) == Verdict(name, CRASHED, said)


def test_a_reason_belongs_to_a_version():
    reasons = [{"backends": ["torchao 0.18"], "cases": ["*"], "verdict": DIFFERS, "why": "Because."}]
    for version, why in (("0.18.0", "Because."), ("0.18", "Because."), ("0.180", ""), ("0.19.0", ""), ("0", "")):
        backend = Backend("torchao", version, "", None, None)
        assert _why("zeros", backend, DIFFERS, reasons) == why


def test_no_reason_for_torchao_fits_every_case_or_version():
    for one in read_divergences(FOLDER):
        assert "torchao" not in one["backends"] and "*" not in one["cases"]


def test_each_reason_is_used_by_its_verdict_only():
    for one in read_divergences(FOLDER):
        names = {name.split()[0] for name in one["backends"]}
        assert names <= set(BACKENDS) and one["verdict"] in (VALUES_EQUAL, REFUSED, DIFFERS)
        assert one["why"].endswith(".")


def test_the_kernels_of_before_come_back():
    from qlora_lab.kernels import cpu

    before = kernels.choose, cpu.FAST
    with pytest.raises(KeyError), running("cpu-plain"):
        assert kernels.choose("cpu").name == "cpu-plain" and not cpu.FAST
        raise KeyError
    assert (kernels.choose, cpu.FAST) == before


# --------------------------------------------------------------------------------------------------------- the command


def test_the_help_names_the_backends(capsys):
    assert ", ".join(BACKENDS) == command.NAMES
    with pytest.raises(SystemExit):
        cli.main(["conformance", "--help"])
    assert "example: qlora-lab conformance --backend cpu" in capsys.readouterr().out


def test_it_prints_verdicts_with_their_reasons(capsys, few):
    assert cli.main(["conformance", "--backend", "reference", "--backend", "reference", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "ties_nf4          bytes equal" in out
    assert "signed_zeros_fp4: values equal (60 of 64 codes)" in out and "FP4 has two zeros" in out
    assert cli.main(["conformance", "--backend", "reference", "--quiet", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["backend"] == "reference" and len(found["verdicts"]) == 3


def test_a_difference_without_a_reason_ends_with_1(capsys, monkeypatch, few):
    monkeypatch.setattr("qlora_lab.export.conformance.read_divergences", lambda folder: [])
    assert cli.main(["conformance", "--backend", "reference", "--quiet"]) == 1
    assert "No reason is known; please report it." in capsys.readouterr().out


def test_what_is_missing_is_a_sentence(capsys, monkeypatch, few):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert cli.main(["conformance", "--backend", "torchao"]) == 2
    said = "torchao is not installed, so it cannot be judged: pip install --no-deps torchao==0.18.0"
    assert capsys.readouterr().err.splitlines()[-1] == f"qlora-lab conformance: {said}"
    monkeypatch.setattr(backends, "BACKENDS", ("reference", "torchao"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the command prints them
        assert cli.main(["conformance"]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("holds", [False, True])
def test_another_version_of_torchao_is_a_sentence(capsys, monkeypatch, few, holds):
    """It keeps NF4Tensor elsewhere: a package without that module, or a module without the function."""
    monkeypatch.setattr(backends, "find_spec", lambda name: True)
    monkeypatch.setattr(backends, "installed_version", lambda name: "0.19.0")
    monkeypatch.setattr(backends, "_quiet", nullcontext)  # imports the compiler, a second
    found = types.ModuleType("nf4_tensor")
    for name in ["torchao", *(backends.NF4.rsplit(".", n)[0] for n in range(1, 4))] if holds else ["torchao"]:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    if holds:
        monkeypatch.setitem(sys.modules, backends.NF4, found)
    assert cli.main(["conformance", "--backend", "torchao"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qlora-lab conformance: torchao 0.19.0 cannot be judged") and line.endswith(
        "torchao==0.18.0"
    )


@pytest.mark.parametrize("end, said", [("raise KeyError('tl')", "KeyError: 'tl'"), ("os._exit(9)", "it ended with 9")])
def test_a_crash_of_the_interpreter_is_a_failure(capsys, monkeypatch, few, end, said):
    """Not an absence, with which the command succeeds. What the other backends found is printed first."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("qlora_lab.export.conformance.CHILD", f"import os; {end}")
    wanted = f"the process that runs Triton's interpreter failed ({said}): please report it"
    for order in (("triton", "reference"), ("reference", "triton")):
        monkeypatch.setattr(backends, "BACKENDS", order)
        assert cli.main(["conformance", "--quiet", "--json"]) == 2
        out, err = capsys.readouterr()
        assert [found["backend"] for found in json.loads(out)] == ["reference"]
        assert err.splitlines()[-1] == f"qlora-lab conformance: {wanted}"
    for json_or_not in ([], ["--json"]):  # alone, there is nothing to print
        assert cli.main(["conformance", "--quiet", "--backend", "triton", *json_or_not]) == 2
        assert capsys.readouterr() == ("", f"qlora-lab conformance: {wanted}\n")
    monkeypatch.setattr("qlora_lab.export.conformance.CHILD", """print('{"not_here": "no Triton"}')""")
    assert cli.main(["conformance", "--quiet"]) == 0


def test_an_unknown_backend_names_the_known(capsys):
    assert cli.main(["conformance", "--backend", "cpu", "--backend", "nf5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"qlora-lab conformance: backend 'nf5' is not known: choose one of {', '.join(BACKENDS)}"


def test_damaged_vectors_end_the_command(capsys, monkeypatch, copied):
    monkeypatch.setattr("qlora_lab.export.conformance.course_path", lambda *names: copied)
    (copied / "cases.json").write_text("{")
    assert cli.main(["conformance", "--backend", "reference", "--quiet"]) == 2
    assert "cases.json" in capsys.readouterr().err
    (copied / "cases.json").unlink()
    assert cli.main(["conformance", "--backend", "reference", "--quiet"]) == 2
    assert "No such file or directory" in capsys.readouterr().err
