"""`qlora-lab doctor`: what is found decides the exit code, and a mistake in what was asked is one line."""

import json

import pytest

from qlora_lab import cli
from qlora_lab.doctor import machine
from qlora_lab.doctor.checks import THREADS
from qlora_lab.model import fetch


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"instruction": "double {i}", "output": "{2 * i}"}}\n' for i in range(12)))
    return path


def run(capsys, *argv):
    code = cli.main(["doctor", "--r", "2", "--quiet", *(str(a) for a in argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_sound_run_is_code_0(capsys, folder, data):
    code, out, _ = run(capsys, "--model", folder, "--data", data)
    assert code == 0 and out.startswith("ok       end token in labels: <|im_end|> in 12 of 12 examples")
    assert "\n\nwhat  " in out and "computed in " in out


def test_a_problem_is_code_1(capsys, tmp_path, folder, data, tiny_llama):
    """The tokenizer has tokens that the model has no embedding for."""
    tiny_llama.resize_token_embeddings(100)
    tiny_llama.save_pretrained(folder)
    code, out, _ = run(capsys, "--model", folder, "--data", data, "--json")
    report = json.loads(out)
    (new,) = [one for one in report["findings"] if one["name"] == "new tokens"]
    assert code == 1 and report["ok"] is False and new["status"] == "problem" and "memory" in report["skipped"]
    code, out, _ = run(capsys, "--model", folder, "--data", data)
    assert (
        code == 1 and "problem  new tokens: " in out and "         https://github.com/artidoro/qlora/issues/214" in out
    )


@pytest.mark.long
def test_json_is_one_line(capsys, folder, data):
    code, out, _ = run(
        capsys, "--model", folder, "--data", data, "--json", "--optimizer-bits", 8, "--targets", "q_proj"
    )
    report = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and report["ok"] is True
    assert {one["name"] for one in report["findings"]} == set(THREADS)
    assert report["dtypes"]["rows"][-1]["dtype"] == "8-bit codes, blocks of 256"
    assert report["dtypes"]["trained"] == 2 * 2 * (16 + 16)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--data", "no.jsonl"], "no data file at no.jsonl"),
        (["--data", "DATA", "--model", "nowhere"], "unknown model 'nowhere'"),
        (["--data", "DATA", "--max-length", "0"], "max_length=0 is not allowed"),
        (["--data", "DATA", "--model", "MODEL", "--max-length", "2"], "no example has at most 2 tokens"),
        (["--data", "DATA", "--model", "MODEL", "--optimizer-bits", "4"], "optimizer_bits=4 is not allowed"),
        (["--data", "DATA", "--model", "MODEL", "--targets", "qq"], "match no linear layer"),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, folder, data, argv, message):
    names = {"DATA": data, "MODEL": folder}
    code, out, err = run(capsys, *(names.get(a, a) for a in argv))
    assert code == 2 and message in err and not out
    assert len([line for line in err.splitlines() if line.startswith("qlora-lab doctor: ")]) == 1


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--help"])
    assert stop.value.code == 0 and "example: qlora-lab doctor" in " ".join(capsys.readouterr().out.split())


# ---------------------------------------------------------------------------------------------------------- --machine


@pytest.fixture
def checked(monkeypatch):
    """The machine's report is given, not made."""

    def make(*statuses):
        checks = tuple(machine.Check(f"check {i}", status, "said") for i, status in enumerate(statuses))
        report = machine.MachineReport(checks)
        monkeypatch.setattr(machine, "check_machine", lambda expected_version, progress: report)

    return make


def test_a_machine_with_a_problem_is_code_1_and_with_a_warning_0(capsys, checked, tmp_path):
    out = tmp_path / "room.json"
    checked("ok", "warning")
    code, said, err = run(capsys, "--machine", "--out", out)
    assert (code, said, err) == (0, "ok        check 0: said\nwarning   check 1: said\n", "")
    assert json.loads(out.read_text())["ok"] is True
    checked("ok", "problem")
    code, said, _ = run(capsys, "--machine", "--out", out, "--json")
    assert code == 1 and said.count("\n") == 1 and json.loads(said) == json.loads(out.read_text())


def test_a_place_for_the_report_is_judged_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "check_machine", lambda expected_version, progress: pytest.fail("too late"))
    (tmp_path / "thesis.json").write_text("{}")
    code, _, err = run(capsys, "--machine", "--out", tmp_path / "thesis.json")
    assert code == 2 and "is not a report" in err
    code, _, err = run(capsys, "--out", tmp_path / "room.json")
    assert code == 2 and "add --machine" in err


@pytest.mark.slow
def test_all_checks_of_this_machine(capsys, monkeypatch):
    """Whatever this machine has, each check reports in one line, and none fails by itself."""
    monkeypatch.setattr(fetch, "ask_hub", lambda hub_id: None)  # no network in tests
    code, out, _ = run(capsys, "--machine", "--json")
    report = json.loads(out)
    names = [check["name"] for check in report["checks"]]
    # where JupyterLab has a password of the user's, widgets and kernel are not asked
    assert code == (0 if report["ok"] else 1) and len(names) == len({*names}) in (11, 13)
    assert not [check for check in report["checks"] if "the check itself failed" in check["message"]]
    assert not [check for check in report["checks"] if "\n" in check["message"]]
