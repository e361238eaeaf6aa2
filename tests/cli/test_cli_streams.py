"""Streams that are closed, full or of ASCII only, and signals: they end no run and change no exit code of one that
worked; only a result that was asked for and could not be printed is a failure, in one line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_lab import cli
from qlora_lab.cli.streams import patient_streams
from qlora_lab.train import interrupt
from tests import warm
from tests.cli.test_cli import TRAIN
from tests.cli.test_cli_quiet import COMMANDS, adapter
from tests.data.test_choice_files import small_questions

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's"),
]
PRINTED = {"generate", "doctor", "memory", "xray"}  # what they print is all that they do
OTHERS = [name for name in COMMANDS if name not in PRINTED]


@pytest.fixture
def argv(tmp_path, folder):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(TRAIN % (i, 2 * i) for i in range(12)))

    def made(command, *more, out="out"):
        places = {"MODEL": folder, "OUT": tmp_path / out, "DATA": data}
        if "QUESTIONS" in COMMANDS[command]:
            places["QUESTIONS"] = small_questions(tmp_path / "questions")
        if "ADAPTER" in COMMANDS[command]:
            places["ADAPTER"] = adapter(folder, tmp_path)
        words = [str(places.get(word, word)) for word in COMMANDS[command]]
        if command in ("finetune", "generate", "doctor"):
            words += ["--model", str(folder)]
        return [command, *words, *more]

    return made


def run(monkeypatch, argv, stdout, stderr):
    """Its exit code, and what could be read of the two streams."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        try:
            code = cli.main(argv)
        finally:
            for stream in (stdout, stderr):
                if stream is not None and not isinstance(stream, io.StringIO):
                    stream.close()  # which succeeds: what was left to write went nowhere
    return code, *(stream.getvalue() if isinstance(stream, io.StringIO) else None for stream in (stdout, stderr))


def full():
    return open("/dev/full", "w")  # noqa: SIM115 - `run` closes it


def left():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")  # noqa: SIM115


BROKEN = {"full": full, "left": left, "closed": lambda: None}


def pairs(commands):
    """Each command with each broken stream; fast: the one that needs no model, with all."""
    every = [(command, name) for command in commands for name in BROKEN]
    marks = {command: () if command == "memory" else pytest.mark.slow for command in commands}
    return [pytest.param(c, BROKEN[name], id=f"{c}-{name}", marks=marks[c]) for c, name in every]


@pytest.mark.parametrize("command, broken", pairs(COMMANDS))
def test_a_broken_stderr_changes_nothing(monkeypatch, argv, command, broken):
    code, out, _ = run(monkeypatch, argv(command, "--json"), io.StringIO(), broken())
    assert code in ((0, 1) if command == "doctor" else (0,)) and json.loads(out)


@pytest.mark.parametrize("command, broken", pairs(OTHERS))
def test_a_summary_that_cannot_be_printed_changes_nothing(monkeypatch, argv, tmp_path, command, broken):
    code, _, err = run(monkeypatch, argv(command, "--quiet"), broken(), io.StringIO())
    assert code == 0 and (tmp_path / "out").exists() and "could not be printed" not in err


@pytest.mark.parametrize("command, broken", pairs(COMMANDS))
def test_a_result_that_cannot_be_printed_is_one_line(monkeypatch, argv, command, broken):
    more = ["--quiet"] if command in PRINTED else ["--quiet", "--json"]
    code, _, err = run(monkeypatch, argv(command, *more), broken(), io.StringIO())
    line = [line for line in err.splitlines() if "could not" in line]
    assert code == 2 and line == [err.splitlines()[-1]]
    assert err.startswith(f"qlora-lab {command}: the result could not be printed (") or len(err.splitlines()) > 1


def test_help_that_cannot_be_printed(monkeypatch):
    for words in (["--help"], ["memory", "--help"], ["--version"]):
        err = io.StringIO()
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, words, full(), err)
        assert end.value.code == 2
        assert err.getvalue() == "qlora-lab: the result could not be printed (No space left on device)\n"


def test_a_letter_that_the_terminal_lacks_is_spelled(monkeypatch):
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    with patient_streams() as stdout:
        print("größer →")
    assert stdout.error is None and raw.getvalue() == b"gr\\xf6\\xdfer \\u2192\n"


def test_a_bug_still_gives_a_traceback(monkeypatch, argv):
    """Only what is a user's mistake, disk or memory is one line."""
    monkeypatch.setattr(cli.ql, "Decoding", lambda *_, **__: None.attribute)
    with pytest.raises(AttributeError, match="has no attribute 'attribute'"):
        run(monkeypatch, argv("generate"), io.StringIO(), io.StringIO())


@pytest.mark.parametrize("number", interrupt.ENDING, ids=lambda number: number.name)
def test_each_signal_ends_a_command_in_one_line(monkeypatch, argv, number):
    monkeypatch.setattr(cli.ql, "Decoding", lambda *_, **__: signal.raise_signal(number))
    code, _, err = run(monkeypatch, argv("generate", "--quiet"), io.StringIO(), io.StringIO())
    assert (code, err) == (130, "qlora-lab generate: interrupted\n")
    assert signal.getsignal(number) is (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.mark.long
@pytest.mark.parametrize("number", interrupt.ENDING, ids=lambda number: number.name)
def test_each_signal_lets_a_step_end_and_saves(monkeypatch, argv, number):
    from qlora_lab.train import trainer

    make = trainer.accumulate

    def signalled(*args):
        signal.raise_signal(number)
        return make(*args)

    monkeypatch.setattr(trainer, "accumulate", signalled)
    code, _, err = run(monkeypatch, argv("finetune", "--quiet"), io.StringIO(), io.StringIO())
    assert code == 130 and "qlora-lab finetune: stopped after step 1 of 2, all of it saved in " in err


@pytest.mark.long
@pytest.mark.skipif(not interrupt.HANGUP, reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_ends_nothing(monkeypatch, argv):
    from qlora_lab.train import trainer

    make = trainer.accumulate

    def signalled(*args):
        signal.raise_signal(signal.SIGHUP)
        return make(*args)

    monkeypatch.setattr(trainer, "accumulate", signalled)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        code, out, _ = run(monkeypatch, argv("finetune", "--quiet", "--json"), io.StringIO(), io.StringIO())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0 and json.loads(out)["steps"] == 2


def test_signals_are_described_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "SIGTERM" in (text := " ".join(capsys.readouterr().out.split())) and "nohup" in text


# ------------------------------------------------------------------------------------------------------------ true ones

MEMORY = f"{sys.executable} -m qlora_lab.cli memory llama-7b"


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line, **environment):
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | environment, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.slow
def test_a_process_without_stderr_prints_the_same():
    usual = shell(f"{MEMORY} --json")
    for closed in ("2>&-", "2>/dev/full", "2> >(true)"):
        assert shell(f"{MEMORY} --json {closed}") == usual, closed


@pytest.mark.slow
@pytest.mark.parametrize("closed, reason", [(">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")])
def test_a_process_without_stdout_says_so_once(closed, reason):
    line = f"qlora-lab memory: the result could not be printed ({reason})\n"
    assert shell(f"{MEMORY} {closed}") == shell(f"{MEMORY} --json {closed}") == (2, b"", line)


@pytest.mark.slow
def test_a_reader_that_leaves_gets_no_traceback():
    code, out, err = shell(f"set -o pipefail; {MEMORY} 2>&1 | head -1")
    assert out.count(b"\n") == 1 and b"Traceback" not in out and err == "" and code in (0, 2)


@pytest.mark.slow
def test_all_streams_closed_is_an_exit_code():
    assert shell(f"{MEMORY} <&- >&- 2>&-") == (2, b"", "")


@pytest.mark.slow
def test_what_a_library_prints_lands_in_no_file_of_ours(folder, tmp_path):
    """With number 2 closed, the next file that is opened would have it."""
    out = tmp_path / "small"
    script = (
        "import os, sys; from qlora_lab import cli; import qlora_lab.files.disk as disk; write = disk.write_text\n"
        "def noisy(path, text):\n    write(path, text)\n    os.write(2, b'a warning of C')\n"
        "disk.write_text = noisy\n"
        f"sys.exit(cli.main(['quantize', {str(folder)!r}, '--out', {str(out)!r}, '--quiet']))"
    )
    (tmp_path / "script.py").write_text(script)
    assert shell(f"{sys.executable} {tmp_path / 'script.py'} 2>&- >/dev/null")[0] == 0
    assert not any(b"a warning of C" in path.read_bytes() for path in out.iterdir())


# One process for all commands: its start takes longer than any of them.
EACH = """
import json, sys
from qlora_lab import cli
for argv in json.loads(sys.argv[1]):
    print(f"{argv[0]} begins", flush=True)
    print(f"{argv[0]} ends with {cli.main(argv)}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands, environment", [(["finetune"], {"PYTHONIOENCODING": "ascii"}), (list(COMMANDS), C_LOCALE)]
)
def test_an_ascii_terminal_serves_every_command(argv, commands, environment):
    each = json.dumps([argv(command, out=command) for command in commands])
    done = subprocess.run([sys.executable, "-c", EACH, each], capture_output=True, env=os.environ | environment)
    out, err = done.stdout.decode("ascii"), done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in err, err
    for command in commands:
        said, code = re.search(rf"^{command} begins\n(.+)^{command} ends with (\d)$", out, re.M | re.S).groups()
        assert said and code in (("0", "1") if command == "doctor" else ("0",)), err


@pytest.mark.slow
@pytest.mark.parametrize("number", interrupt.ENDING, ids=lambda number: number.name)
def test_a_process_that_is_told_to_end_leaves_a_run_to_resume(argv, tmp_path, number):
    words = [sys.executable, "-m", "qlora_lab.cli", *argv("finetune"), "--steps", "10000", "--save-every", "0"]
    log = tmp_path / "out" / "log.jsonl"
    child = warm.program(words, err=tmp_path / "said")
    while not (log.exists() and log.read_bytes().count(b"\n") > 3):
        assert child.is_alive()
        time.sleep(0.01)  # the other process needs the core
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == 130
    said = (tmp_path / "said").read_text("utf-8").splitlines()[-1]
    assert "qlora-lab finetune: stopped after step " in said and "(--resume on the command line)" in said
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 1
