"""A tournament that is played: every game once, in both orders, whatever the judge does and whenever it is stopped."""

import json
import os
import re
from itertools import permutations

import pytest

from qlora_lab import cli
from qlora_lab.files.checksums import DIFFERS, OK
from qlora_lab.files.results_file import START, STARTS, append_result, read_results, verify_rows
from qlora_lab.measure.diagnosis import diagnose_judge
from qlora_lab.measure.judges import Question, ReferenceJudge, always_first
from qlora_lab.measure.judgments import read_games
from qlora_lab.measure.play import GAMES, check_tournament, games_of, play

QUESTIONS = [Question(f"q{i}", f"Describe {i}.", f"Return the number {i}.") for i in range(3)]
ANSWERS = {
    "good": {f"q{i}": f"Return the number {i}." for i in range(3)},
    "half": {f"q{i}": "Return it." for i in range(3)},
    "bad": {f"q{i}": "Plot." for i in range(3)},
}
ALL = 3 * 3 * 2  # games


class Judge:
    """One by length, which counts how often it is asked; `at` is the call at which `error` is raised."""

    name = "length"

    def __init__(self, at=None, error=KeyboardInterrupt):
        self.calls = []
        self.at = at
        self.error = error

    def __call__(self, question, a, b):
        self.calls.append((question.id, a, b))
        if len(self.calls) == self.at:
            raise self.error
        return "first" if len(a) > len(b) else "second"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "there" / "games.jsonl"


def quiet(out, judge, questions=QUESTIONS, answers=ANSWERS):
    return play(questions, answers, judge, out, progress=False)


# --------------------------------------------------------------------------------------------------------------- games


def test_every_two_systems_meet_on_every_question_in_both_orders(out):
    rows = quiet(out, judge := Judge())
    want = [(q.id, *pair) for q in QUESTIONS for pair in permutations(ANSWERS, 2)]
    assert [(row["question"], row["first"], row["second"]) for row in rows] == want and len(want) == ALL
    assert judge.calls == [(q, ANSWERS[first][q], ANSWERS[second][q]) for q, first, second in want]
    assert all(row["verdict"] == judge_of(row) and row["reason"] is None for row in rows)
    assert rows == [json.loads(line) for line in out.read_text().splitlines()] == read_results(out, GAMES)
    games = games_of(rows)
    assert len(games) == ALL and games.systems == tuple(ANSWERS) and not diagnose_judge(games).contradictions


def judge_of(row):
    a, b = (len(ANSWERS[row[side]][row["question"]]) for side in ("first", "second"))
    return "first" if a > b else "second"


def test_a_second_call_asks_nothing_and_changes_nothing(out):
    rows = quiet(out, Judge())
    before = out.read_bytes()
    assert quiet(out, judge := Judge()) == rows
    assert judge.calls == [] and out.read_bytes() == before


@pytest.mark.parametrize("at", range(1, ALL + 1))
def test_an_interrupted_tournament_asks_nobody_twice(out, tmp_path, at):
    with pytest.raises(KeyboardInterrupt, match=rf"{at - 1} of {ALL} games are in .*; the same call goes on"):
        quiet(out, before := Judge(at))
    rows = quiet(out, after := Judge())
    assert before.calls[:-1] + after.calls == quiet_calls(tmp_path)  # the interrupted call gave no verdict
    alone = quiet(tmp_path / "alone.jsonl", Judge())
    assert [strip(row) for row in rows] == [strip(row) for row in alone]


def quiet_calls(tmp_path):
    quiet(tmp_path / "calls.jsonl", judge := Judge())
    return judge.calls


def strip(row):
    return {name: value for name, value in row.items() if name not in ("date", "sha256")}


@pytest.mark.filterwarnings("ignore:.*was torn off:UserWarning")
@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_row_is_asked_again_and_no_other(out, cut):
    quiet(out, Judge())
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    rows = quiet(out, judge := Judge())
    # without its new line alone, the last row is whole
    assert len(judge.calls) == (cut > 1) and len(rows) == ALL == len(out.read_text().splitlines())


def test_a_process_that_dies_between_rows_loses_none(out):
    """os._exit, as a kill: no `finally`, no flush."""
    child = os.fork()
    if not child:
        quiet(out, Dies())
    os.waitpid(child, 0)
    assert len(out.read_text().splitlines()) == 6
    quiet(out, judge := Judge())
    assert len(judge.calls) == ALL - 6


class Dies(Judge):
    def __call__(self, *given):
        if len(self.calls) == 6:
            os._exit(9)
        return super().__call__(*given)


def test_an_early_check_leaves_the_warning_of_a_torn_line_to_play(out):
    quiet(out, Judge())
    out.write_bytes(out.read_bytes()[:-40])
    check_tournament(out, "length", list(ANSWERS), QUESTIONS)  # warnings are errors in these tests
    with pytest.warns(UserWarning, match="line 18 was torn off"):
        quiet(out, Judge())


# -------------------------------------------------------------------------------------------------- judges that fail


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "verdict", [None, "A", "First", "", 1, ["first"], "first " * 99, "\ud800", Unprintable(), float("nan"), b"first"]
)
def test_nonsense_is_kept_as_unread_with_its_reason(out, verdict):
    rows = quiet(out, lambda *_: verdict)
    assert len(rows) == ALL == games_of(rows).verdicts.tolist().count(3)
    assert all(row["verdict"] == "unread" and row["reason"].startswith("the judge returned ") for row in rows)
    assert all(len(row["reason"]) < 400 and "not one of first, second, tie, unread" in row["reason"] for row in rows)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("it\nis down"),
        TimeoutError(),
        KeyError("x"),
        RuntimeError("y" * 9999),
        MemoryError(),
        UnprintableError(),
    ],
)
def test_an_error_is_kept_and_the_tournament_goes_on(out, error):
    rows = quiet(out, judge := Judge(2, error))
    assert [row["verdict"] == "unread" for row in rows] == [i == 1 for i in range(ALL)] and len(judge.calls) == ALL
    reason = rows[1]["reason"]
    named = "<UnprintableError instance at" if isinstance(error, UnprintableError) else f"{type(error).__name__}("
    assert reason.startswith(f"the judge raised {named}") and len(reason) < 300 and "\n" not in reason
    quiet(out, again := Judge())
    assert again.calls == []  # an unread verdict is a verdict


def test_a_judge_may_say_himself_that_he_cannot_tell(out):
    rows = quiet(out, lambda *_: "unread")
    assert {row["reason"] for row in rows} == {"the judge said so"}


def test_an_unread_game_whose_line_is_deleted_is_asked_again(out):
    quiet(out, Judge(2, ValueError))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:1] + lines[2:]))
    rows = quiet(out, judge := Judge())
    assert len(judge.calls) == 1 and [row["verdict"] for row in rows].count("unread") == 0


@pytest.mark.parametrize("verdict", ["first", "second"])
def test_a_game_that_is_there_twice_is_refused_with_both_lines(out, verdict):
    """The same for whoever goes on with the tournament, and for whoever reads its games."""
    quiet(out, Judge())
    lines = out.read_text().splitlines(keepends=True)
    lines[6] = re.sub('"verdict": "[a-z]+"', f'"verdict": "{verdict}"', lines[0])
    out.write_text("".join(lines))
    before = out.read_bytes()
    said = r"games.jsonl, line 7 holds the game of 'good' against 'half' on question 'q0' again, .*, line 1: keep"
    with pytest.raises(ValueError, match=said):
        quiet(out, judge := Judge())
    with pytest.raises(ValueError, match=said):
        check_tournament(out, "length", list(ANSWERS), QUESTIONS)
    with pytest.raises(ValueError, match=said):
        read_games(out, progress=False)
    assert judge.calls == [] and out.read_bytes() == before


@pytest.mark.parametrize("id", ["", "  ", 1, None, ["q"]])
def test_a_question_needs_a_name(id):
    with pytest.raises(ValueError, match="a question's id is .*: give a text that is not empty"):
        Question(id, "Why?")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_program_is_no_verdict(out, error):
    with pytest.raises(error):
        quiet(out, Judge(3, error))
    assert len(out.read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- other tournaments


def changed(system):
    return ANSWERS | {system: ANSWERS[system] | {"q1": "other"}}


OTHERS = {
    "judge": ({"judge": always_first}, "its judge is 'length', not 'always-first'"),
    "questions": ({"questions": QUESTIONS[:2]}, "its questions are 3, with checksum [0-9a-f]{16}, not 2, with"),
    "reference": ({"questions": [*QUESTIONS[:2], Question("q2", "Describe 2.")]}, "its questions are 3, .*, not 3"),
    "fewer": ({"answers": {name: ANSWERS[name] for name in ("good", "bad")}}, "it has the systems 'half' too"),
    "more": ({"answers": ANSWERS | {"new": ANSWERS["bad"]}}, "it lacks the systems 'new'"),
    "answers": ({"answers": changed("bad")}, "the answers of 'bad' have changed"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tournament_is_refused_with_the_difference(out, name):
    quiet(out, Judge())
    before = out.read_bytes()
    other, said = OTHERS[name]
    with pytest.raises(ValueError, match=f"games.jsonl holds another tournament: .*{said}.*: name another file"):
        quiet(out, **{"judge": Judge()} | other)
    assert out.read_bytes() == before


def test_it_is_refused_before_anybody_answers(out):
    check_tournament(out, "length", list(ANSWERS), QUESTIONS)  # no file yet
    quiet(out, Judge())
    check_tournament(out, "length", list(ANSWERS), QUESTIONS)
    with pytest.raises(ValueError, match="its judge is 'length', not 'rouge'; it has the systems 'half', 'bad' too"):
        check_tournament(out, "rouge", ["good"], QUESTIONS)


def test_the_order_of_the_systems_makes_no_other_tournament(out):
    quiet(out, Judge())
    rows = quiet(out, judge := Judge(), answers=dict(reversed(ANSWERS.items())))
    assert judge.calls == [] and rows[0]["first"] == "bad"


def test_a_file_of_something_else_is_kept(out):
    out.parent.mkdir()
    for content in ("notes\n", '{"model": {"name": 1}}\n', '{"tournament": {"judge": 1}, "question": "q"}\n', "{}"):
        out.write_text(content)
        with pytest.raises(ValueError, match=r"games.jsonl: line 1 is not a row of a tournament"):
            quiet(out, Judge())
        assert out.read_text() == content


def test_a_row_with_a_verdict_of_ones_own_is_refused(out):
    quiet(out, Judge())
    out.write_text(re.sub('"verdict": "first"', '"verdict": "A"', out.read_text(), count=1))
    with pytest.raises(ValueError, match="it has verdict='A': it must be one of first, second, tie, unread"):
        quiet(out, Judge())


# --------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    "given, said",
    [
        ({"answers": ANSWERS | {"": ANSWERS["bad"]}}, "a system's name is '': give a text that is not empty"),
        ({"answers": ANSWERS | {7: ANSWERS["bad"]}}, "a system's name is 7"),
        ({"questions": []}, "there are 0 questions: a tournament needs at least one"),
        ({"questions": [*QUESTIONS, QUESTIONS[1]]}, "question 'q1' is there twice"),
        ({"answers": {}}, "no system; a tournament needs two or more"),
        ({"answers": {"good": ANSWERS["good"]}}, "only one system: 'good'; a tournament needs two or more"),
        ({"answers": ANSWERS | {"new": {"q0": "a"}}}, "system 'new' has no answer to question 'q1'"),
        ({"answers": ANSWERS | {"new": dict.fromkeys(ANSWERS["bad"])}}, "system 'new' has no answer to question 'q0'"),
    ],
)
def test_what_cannot_be_played_is_refused_before_a_file_is_made(out, given, said):
    with pytest.raises(ValueError, match=said):
        quiet(out, **{"judge": Judge()} | given)
    assert not out.parent.exists()


def test_an_empty_path_is_refused():
    with pytest.raises(ValueError, match="the path is empty"):
        quiet("", Judge())


def test_a_judge_by_reference_ranks_them(out):
    rows = quiet(out, ReferenceJudge())
    wins = [row[row["verdict"]] for row in rows if row["verdict"] in ("first", "second")]
    assert [wins.count(name) for name in ANSWERS] == [12, 6, 0]


# ----------------------------------------------------------------------------------------------------------- checksums


def test_every_row_has_a_checksum_that_verify_compares(out, capsys):
    quiet(out, Judge())
    assert [part.state for part in verify_rows(out)] == [OK] * ALL
    assert cli.main(["verify", str(out)]) == 0
    out.write_bytes(out.read_bytes().replace(b'"verdict": "first"', b'"verdict": "tie"', 1))
    assert [part.state for part in verify_rows(out)].count(DIFFERS) == 1
    assert cli.main(["verify", str(out)]) == 1


def test_rows_begin_as_verify_expects(out):
    quiet(out, Judge())
    assert GAMES.start in STARTS and START in STARTS and out.read_bytes().startswith(GAMES.start)


def test_a_full_disk_says_that_earlier_rows_are_safe(out, monkeypatch):
    real, calls = append_result, []

    def full(file, row):
        calls.append(row)
        if len(calls) == 4:
            raise OSError("a row cannot be written (No space left on device); earlier rows are safe")
        real(file, row)

    monkeypatch.setattr("qlora_lab.measure.play.append_result", full)
    with pytest.raises(OSError, match="earlier rows are safe"):
        quiet(out, Judge())
    monkeypatch.undo()
    quiet(out, judge := Judge())
    assert len(judge.calls) == ALL - 3
