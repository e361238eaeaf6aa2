"""`qlora-lab sweep`: a table sorted by perplexity or the rows as JSON; a mistake is one line and code 2."""

import json
from hashlib import sha256

import pytest

from qlora_lab import cli
from qlora_lab.measure import sweep as module

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(folder, monkeypatch):
    monkeypatch.setattr(module, "topics_text", lambda: "the sum of the two numbers is a number. " * 4)
    return folder


def run(capsys, *argv):
    capsys.readouterr()  # what saving the model said
    code = cli.main(["sweep", *(str(a) for a in argv)])
    out, err = capsys.readouterr()
    return code, out, err


SMALL = ["--windows", 2, "--length", 10, "--quiet"]


def test_rows_and_table(capsys, tmp_path, model):
    out = tmp_path / "rows.jsonl"
    grid = ["--codebooks", "nf4", "nf2", "--block-sizes", 32, 64, "--double-quant", "both", "--out", out, *SMALL]
    code, text, _ = run(capsys, model, *grid, "--json")
    rows = json.loads(text)
    assert code == 0 and rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["codebook"] for row in rows] == [None] + ["nf4"] * 4 + ["nf2"] * 4
    before = out.read_bytes()
    code, text, _ = run(capsys, model, *grid)  # nothing is run again
    head, *lines = text.splitlines()
    assert code == 0 and out.read_bytes() == before and len(lines) == 9
    assert " ".join(head.split()) == "codebook block size double quant bits perplexity more squared error entropy"
    column = head.index("perplexity") + len("perplexity")
    shown = [float(line[:column].split()[-1]) for line in lines]
    assert shown == sorted(shown) and shown == pytest.approx(sorted(row["perplexity"] for row in rows), abs=1e-3)


@pytest.mark.long
def test_a_text_and_a_codebook_of_ones_own(capsys, tmp_path, model):
    text = tmp_path / "mein Text é.txt"
    text.write_bytes("\ufeffthe sum of the two numbers is a number, é. \r\n".encode() * 4)
    tables = ["--levels", "mine=-1,-0.3,0,0.3,1", "--levels", "other=-1,1"]
    options = [
        "--codebooks",
        "nf4",
        "mine",
        *tables,
        "--text",
        text,
        "--out",
        tmp_path / "rows.jsonl",
        *SMALL,
        "--json",
    ]
    code, out, _ = run(capsys, model, *options)
    rows = json.loads(out)
    assert code == 0 and [row["codebook"] for row in rows] == [None, "nf4", "mine", "other"]
    assert rows[2]["levels"] == pytest.approx([-1, -0.3, 0, 0.3, 1]) and rows[1]["levels"] is None
    data = rows[0]["data"]
    assert data["name"] == "text of the caller"
    assert data["text_sha256"] == sha256(text.read_text(encoding="utf-8-sig").encode()).hexdigest()


@pytest.mark.long
@pytest.mark.filterwarnings("always")
def test_a_torn_line_is_told_in_one_line(capsys, tmp_path, model):
    out = tmp_path / "rows.jsonl"
    options = [model, "--codebooks", "nf4", "--out", out, *SMALL]
    run(capsys, *options)
    out.write_bytes(out.read_bytes()[:-20])
    code, _, err = run(capsys, *options)
    assert code == 0 and len(out.read_text().splitlines()) == 2
    assert err.startswith("qlora-lab sweep: ") and "line 2 was torn off and is left out" in err and err.count("\n") == 1


def test_an_interrupt_says_what_is_kept(capsys, tmp_path, model, monkeypatch):
    real, calls = module.window_losses, []

    def losses(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "window_losses", losses)
    code, _, err = run(capsys, model, "--codebooks", "nf4", "--out", tmp_path / "rows.jsonl", *SMALL)
    assert code == 130 and "1 of 2 settings are in" in err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--codebooks", "nf5"], "codebook 'nf5' is not known"),
        (["--block-sizes", "8"], "block_size=8 is not allowed"),
        (["--windows", "99"], "fewer than 99 windows of 10: take windows="),
        (["--out", "."], "is a folder or a device"),
        (["--seed", str(2**64)], "is not allowed: it is a whole number"),
        (["--text", "nowhere.txt"], "No such file or directory: 'nowhere.txt'"),
        (["--text", ""], "is a folder, but must be a regular file"),
        (["--text", "EMPTY"], "the text has 0 tokens, fewer than 2 windows of 10"),
        (["--text", "LATIN"], "is not UTF-8 text (unexpected end of data at byte 3): save it as UTF-8"),
        (["--levels", "mine=-1,0,0,1"], "mine: level 2, 0, is repeated: sort the levels"),
        (["--levels", "mine=1"], "mine: 1 levels are given: a codebook has 2 to 256"),
        (["--levels", "nf4=-1,0,1"], "under the name 'nf4', which stands for others"),
        (["--levels", "a=-1,1", "--levels", "a=-1,0"], "two codebooks have the same name"),
        ([], "line 1 is not a row of a sweep"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(capsys, tmp_path, model, options, message):
    out = tmp_path / "rows.jsonl"
    (tmp_path / "EMPTY").touch()
    (tmp_path / "LATIN").write_bytes(b"caf\xe9")
    options = [str(tmp_path / one) if one in ("EMPTY", "LATIN") else one for one in options]
    if not options:
        out.write_text("nothing\n")
    code, text, err = run(capsys, model, "--out", out, *SMALL, *options)
    assert (code, text) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("levels", ["", "mine", "mine=", " =-1,1", "mine=-1,one", "mine=-1,,1"])
def test_levels_that_cannot_be_read(capsys, levels):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "model", "--out", "rows.jsonl", "--levels", levels])
    assert stop.value.code == 2 and "is not a codebook: give NAME=V1,V2,... such as mine=" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sweep", "--help"])
    assert stop.value.code == 0 and "example: qlora-lab sweep" in " ".join(capsys.readouterr().out.split())
