"""Play a tournament: every two systems on every question, in both orders, before one judge.

    rows = play(questions, answers, judge, "games.jsonl")     answers: system -> question's id -> text
    games_of(rows)                                            -> Games, for the ratings

Both orders, because judges favour a position: in the counted judgments of QLoRA's authors GPT-4 preferred the
answer that it read first in 56 % of the games (2,512 of 4,480), and the second in 30 %.
n systems and q questions are q * n * (n - 1) games. Each is a row of the file as soon as it is decided, so the same
call continues a stopped tournament and asks no judge twice. A judge that raises, or returns anything but a verdict,
loses no game: its row says "unread", and why.
Not here: ratings (tournament.py, bradley_terry.py), judges (judges.py), answers (answers.py).
"""

import hashlib
import json
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from reprlib import Repr

from tqdm.auto import tqdm

from qlora_lab.files.out_path import out_path
from qlora_lab.files.results_file import Kind, append_result, open_results, read_results, with_checksum
from qlora_lab.files.strict_json import OBJECT, TEXT, Rule, or_null
from qlora_lab.measure.games import VERDICTS, Games, Row, once, quoted
from qlora_lab.measure.judges import Judge, Question, check_name, judge_name

VERDICT = Rule(f"one of {', '.join(VERDICTS)}", lambda value: value in VERDICTS)
RULES = {"tournament": OBJECT, "question": TEXT, "first": TEXT, "second": TEXT}
RULES |= {"verdict": VERDICT, "reason": or_null(TEXT)}
GAMES = Kind("tournament", "a tournament", RULES, ("tournament", "question", "first", "second"), "tournament")
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = 200  # characters of a reason: an error may quote a whole answer

Answers = Mapping[str, Mapping[str, str]]  # system -> question's id -> answer


def play(
    questions: Iterable[Question], answers: Answers, judge: Judge, out: str | Path, *, progress: bool = True
) -> list[dict]:
    """Return a row for each game; ask `judge` for those that the file `out` lacks, and append them.

    answers: system -> question's id -> text; answers to other questions are ignored.
    A row has tournament (judge, systems with a checksum of their answers, questions), question, first, second, verdict,
    reason (why the verdict is unread; else null), date and sha256 (of all fields before it).
    An interrupt says how much is done. An unread verdict counts as played: delete its line to ask again.
    Raises ValueError for fewer than two systems or a name that is no text, no question, a missing answer, a file that
    holds a game twice, and a file of another tournament (it says what differs); otherwise what open_results raises.
    """
    out = out_path(out)
    questions = list(questions)
    _check(questions, answers)
    ids = [question.id for question in questions]
    systems = {system: _digest([texts[id] for id in ids]) for system, texts in answers.items()}
    tournament = {"judge": judge_name(judge), "systems": systems, "questions": _listed(questions)}
    with open_results(out, GAMES) as (rows, file):
        _check_rows(rows, tournament, out)
        done = {(row["question"], row["first"], row["second"]): row for row in rows}
        games = [(question, *pair) for question in questions for pair in permutations(systems, 2)]
        played = []
        try:
            for question, first, second in tqdm(games, "games", unit="game", disable=not progress):
                same = question.id, first, second
                if same not in done:
                    texts = answers[first][question.id], answers[second][question.id]
                    verdict, reason = _asked(judge, question, *texts)
                    row = {"tournament": tournament, "question": question.id, "first": first, "second": second}
                    row |= {"verdict": verdict, "reason": reason}
                    row = with_checksum(row | {"date": datetime.now(UTC).isoformat(timespec="seconds")})
                    append_result(file, row)  # on the disk before the next game
                    done[same] = row
                played.append(done[same])
        except KeyboardInterrupt:
            said = f"{len(played)} of {len(games)} games are in {out}; the same call goes on from there"
            raise KeyboardInterrupt(said) from None
    return played


def games_of(rows: Iterable[Mapping]) -> Games:
    """Make Games of rows."""
    return Games.of(map(_game, rows))


def _game(row: Mapping) -> Row:
    return row["question"], row["first"], row["second"], row["verdict"]


def check_tournament(
    out: str | Path, judge: str | None, systems: Collection[str], questions: Collection[Question]
) -> None:
    """Raise ValueError if the file `out` holds games of another judge, other systems or other questions, or one twice.

    judge: its name, or None if that is not known yet. For callers whose systems take minutes to answer: `play` also
    compares what they answered.
    """
    tournament = {"judge": judge, "systems": dict.fromkeys(systems), "questions": _listed(questions)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a torn last line: `play` says it when it cuts the line off
        rows = read_results(out, GAMES)
    _check_rows(rows, tournament, out_path(out))


def _asked(judge: Judge, question: Question, answer_a: str, answer_b: str) -> tuple[str, str | None]:
    """Ask a judge. Returns its verdict and None, or "unread" and the reason."""
    try:
        verdict = judge(question, answer_a, answer_b)
    except Exception as error:  # a judge may be anybody's code, or a server that is down; Ctrl-C is no Exception
        return "unread", f"the judge raised {SHORT.repr(error)}"
    if not (isinstance(verdict, str) and verdict in VERDICTS):
        return "unread", f"the judge returned {SHORT.repr(verdict)}, not one of {', '.join(VERDICTS)}"
    return verdict, "the judge said so" if verdict == "unread" else None


def _check(questions: list[Question], answers: Answers) -> None:
    if not questions:
        raise ValueError("there are 0 questions: a tournament needs at least one")
    repeated = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if repeated:
        raise ValueError(f"question {repeated[0]!r} is there twice: leave one out, or give it another id")
    if len(answers) < 2:
        words = f"only one system: {quoted(answers)}" if answers else "no system"
        raise ValueError(f"{words}; a tournament needs two or more")
    for system, texts in answers.items():
        check_name("a system's name", system)
        for question in questions:
            if not isinstance(texts.get(question.id), str):
                raise ValueError(f"system {system!r} has no answer to question {question.id!r}: give a text for each")


def _check_rows(rows: Collection[Mapping], tournament: dict, out: Path) -> None:
    """Compare every row's tournament with this one (None: not known yet), and its game with those before it."""
    for row in rows:
        if differences := _differences(row["tournament"], tournament):
            raise ValueError(f"{out} holds another tournament: {'; '.join(differences)}: name another file for this")
    # Which copy of a game counts would depend on who reads the file, so none is chosen. A row is a line.
    deque(once((f"{out}, line {number}", _game(row)) for number, row in enumerate(rows, 1)), maxlen=0)


def _differences(theirs: Mapping, ours: Mapping) -> list[str]:
    """Say what differs: in the file, and now."""
    found = []
    if ours["judge"] and theirs.get("judge") != ours["judge"]:
        found.append(f"its judge is {theirs.get('judge')!r}, not {ours['judge']!r}")
    if theirs.get("questions") != ours["questions"]:
        found.append(f"its questions are {theirs.get('questions')}, not {ours['questions']}")
    before = theirs.get("systems")
    before = before if isinstance(before, dict) else {}  # a file that was edited by hand may hold anything
    if more := [name for name in before if name not in ours["systems"]]:
        found.append(f"it has the systems {quoted(more)} too")
    if lacking := [name for name in ours["systems"] if name not in before]:
        found.append(f"it lacks the systems {quoted(lacking)}")
    changed = [name for name, sum_ in ours["systems"].items() if sum_ and name in before and before[name] != sum_]
    if changed:
        found.append(f"the answers of {quoted(changed)} have changed")
    return found


def _listed(questions: Collection[Question]) -> str:
    texts = [[question.id, question.prompt, question.reference] for question in questions]
    return f"{len(questions)}, with checksum {_digest(texts)}"


def _digest(texts: list) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
