"""`qlora-lab xray`: what it prints, and its exit codes."""

import json
import pickle

import pytest
import torch

from qlora_lab import cli
from tests.export.test_xray import WEIGHT, saved, sharded, stored


@pytest.fixture
def xray(capsys):
    """The exit code and both streams of the command."""

    def run(*words):
        code = cli.main(["xray", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def file(tmp_path):
    return saved(stored("nf4", 64, True) | {"norm.weight": torch.ones(3)}, tmp_path)


def test_a_table_of_the_tensors(xray, file):
    code, out, err = xray(file)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split() == [
        "w",
        "37",
        "x",
        "29",
        "nf4",
        "64",
        "yes",
        "4.1901",
        "float32",
    ]  # 8 * (537 + 17 + 4 + 4) / 1073
    assert out.splitlines()[2:] == ["1 quantised, 1 not"]


def test_every_key_as_json(xray, file):
    code, out, _ = xray(file, "--json")
    (found,) = json.loads(out)["tensors"]
    assert (code, found["name"], found["blocks"], found["shape"]) == (0, "w", 17, [37, 29])
    raw = file.read_bytes()
    parts = {name.removeprefix("w"): part for name, part in found["parts"].items()}
    assert len(parts) == 6 and parts[""]["bytes"] == 537
    tensors = stored("nf4", 64, True)
    for name, part in found["parts"].items():
        content = raw[part["start"] : part["start"] + part["bytes"]]
        assert content == tensors[name].flatten().view(torch.uint8).numpy().tobytes()
    assert json.loads(out)["not_quantised"] == ["norm.weight"] and json.loads(out)["faults"] == {str(file): []}


def test_faults_are_listed_and_end_with_2(xray, tmp_path):
    tensors = stored("nf4", 64, False)
    tensors["w.absmax"][3] = torch.nan
    path = saved(tensors | {"v.absmax": torch.ones(3)}, tmp_path)
    code, out, err = xray(path)
    assert (code, err) == (2, "")
    faults = [line for line in out.splitlines() if line.startswith("fault: ")]
    assert len(faults) == 2 and "w.absmax holds" in faults[1] and "v: expected one key" in faults[0]
    code, out, _ = xray(path, "--json")
    assert code == 2 and len(json.loads(out)["faults"][str(path)]) == 2


def test_two_files(xray, file, tmp_path):
    assert xray(file, file) == (0, "2 equal, 0 different\n", "")
    tensors = stored("nf4", 64, True) | {"norm.weight": torch.ones(3), "more": WEIGHT}
    tensors["w"][100] ^= 0x10
    other = saved(tensors, tmp_path, "other")
    code, out, err = xray(file, other)
    assert (code, err) == (1, "")
    assert out.splitlines()[1].split()[:6] == ["w", "1", "0.09", "%", "0", "1"]
    assert out.splitlines()[1].endswith("1 of 17: 3") and out.splitlines()[2].endswith("only in the second")
    assert out.splitlines()[3] == "1 equal, 2 different"
    found = json.loads(xray(file, other, "--json")[1])["differences"]
    assert [one["name"] for one in found] == ["w", "more"] and found[0]["first_blocks"] == [3]


def test_what_cannot_be_compared_is_said(xray, file, tmp_path):
    """Zero constants differ, it would say otherwise, where one file has blocks of 64 and the other of 32."""
    other = saved(stored("int3", 32, True) | {"norm.weight": torch.zeros(3)}, tmp_path, "other.safetensors")
    code, out, _ = xray(file, other)
    rows = [line.split("  ") for line in out.splitlines()]
    (w,) = ([cell.strip() for cell in row if cell.strip()] for row in rows if row[0].strip() == "w")
    assert code == 1 and w[1:4] == ["not comparable"] * 3 and w[4].replace(",", "").isdigit()
    (norm,) = (line for line in out.splitlines() if line.startswith("norm.weight"))
    assert "not comparable" not in norm
    found = {one["name"]: one for one in json.loads(xray(file, other, "--json")[1])["differences"]}
    assert found["w"]["constants_differ"] is None and found["norm.weight"]["values_differ"] == 3


def test_mistakes_are_one_line_and_2(xray, tmp_path):
    bad = tmp_path / "bad"
    bad.write_bytes(pickle.dumps([1.0] * 99))
    (tmp_path / "folder").mkdir()
    sharded(tmp_path / "folder", "../climbs.safetensors")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (bad, "is a pickle, which can run any program"),
        (tmp_path / "folder", "it must be a *.safetensors file beside the index"),
        (tmp_path / "empty", "has no *.safetensors"),
        (tmp_path / "nothing", "No such file"),
    ):
        code, out, err = xray(path)
        assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1
        assert str(path) in err
