"""Read the games of a tournament from files: the QLoRA authors' judgments, counts of them, or your own.

    read_games("qlora/eval/ratings-gpt4/vicuna/pairwise")   -> a folder as it lies in the authors' repository
    read_games("guanaco_vicuna_pairs.csv")                  -> counts: first,second,first_wins,second_wins,ties,unparsed
    read_games("games.jsonl")                               -> a line a game: question, first, second, verdict

Source of the folder's form: github.com/artidoro/qlora, folder eval/ratings-gpt4: a file for each ordered pair of
systems, a line for each question. `score` is 1 (first), 2 (second), 3 (tie) or -1 (the judge's text has no verdict).
The file's name gives the order in which the judge read the answers: each answer's id stands under the same system in
every file that holds it. (In the folder relative-gpt-3.5 it does not give the order of the scores.)
Not here: the judges (judges.py).
"""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_lab.data.records import records
from qlora_lab.files.home import expanded
from qlora_lab.files.strict_json import TEXT, check_keys, check_regular, read_regular
from qlora_lab.measure.games import VERDICTS, Games, Row, once

COUNTS = ("first_wins", "second_wins", "ties", "unparsed")  # in the order of VERDICTS
COLUMNS = ("first", "second", *COUNTS)
MOST_GAMES = 1_000_000  # of counts. Elo in 10,000 orders would take hours, and a slip of a key asks for any number
SCORES = {1: "first", 2: "second", 3: "tie", -1: "unread"}  # of the authors' files
PAIR = re.compile(r"(?P<first>.+)-vs-(?P<second>.+?)-gpt-?4-reviewer(-threeclass)?")
ANSWERS = re.compile(r"-(vicuna|oa)-generations.*")  # how a system's answers were sampled, behind its name
# The authors' file names -> the paper's. LLaMA's "30b" has 32.5 billion parameters, and the paper writes 33B.
RENAMED = {"gpt4": "gpt-4", "gpt35": "gpt-3.5"}


def read_games(path: str | Path, *, progress: bool = True) -> Games:
    """Read games: a folder of the authors' JSONL files, a CSV file of counts, or a JSONL file of one's own.

    Verdicts that the judge did not give are kept as "unread". Counts have no questions, so Games.questions is empty.
    Raises FileNotFoundError for a path with nothing there; ValueError, with file and line, for what cannot be read, for
    a game that is there twice, and for counts of more than a million games.
    """
    path = expanded(path)
    if path.is_dir():
        return _made(path, lambda: Games.of(once(_of_folder(path, progress))))
    if not path.exists():
        raise FileNotFoundError(f"no games at {path}: give a folder of judgments, a CSV file of counts or a JSONL file")
    check_regular(path)  # a FIFO would wait, and a device may never end
    if path.suffix.lower() == ".csv":
        try:
            return _made(path, lambda: Games.of_counts(_counts(path)))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}): save it as one") from None
    return _made(path, lambda: Games.of(once((place, _own(place, read())) for place, read in records(path))))


def _made(path: Path, make: Callable[[], Games]) -> Games:
    games = make()
    if not len(games):
        raise ValueError(f"{path} holds no game: put judgments there, or name another file or folder")
    return games


def _own(place: str, row: Any) -> Row:
    """Check a line of one's own; other keys than the four are allowed."""
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object: write question, first, second and verdict")
    row = row | {"question": _question(place, row, "question")}
    check_keys(row, dict.fromkeys(("first", "second", "verdict"), TEXT), place, ("first", "second", "verdict"))
    if row["verdict"] not in VERDICTS:
        raise ValueError(f"{place}: the verdict is {row['verdict']!r}; allowed are {', '.join(VERDICTS)}")
    return row["question"], *_two(place, row["first"], row["second"]), row["verdict"]


def _two(place: str, first: str, second: str) -> tuple[str, str]:
    if not (first and second) or first == second:
        raise ValueError(f"{place}: {first!r} against {second!r}: a game needs two systems with different names")
    return first, second


def _question(place: str, row: dict, *names: str) -> str:
    """Return the question's id as text. The authors number Vicuna's questions, and name OA's by message."""
    for name in names:
        if isinstance(row.get(name), str) or type(row.get(name)) is int:
            return str(row[name])
    raise ValueError(f"{place} has no {' or '.join(names)} that is a text or a whole number: every game has a question")


def _of_folder(folder: Path, progress: bool) -> Iterator[tuple[str, Row]]:
    from tqdm.auto import tqdm

    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"{folder} holds no .jsonl file: name the folder that holds FIRST-vs-SECOND-...jsonl")
    for path in tqdm(paths, "judgments", unit="file", leave=False, delay=2, disable=not progress):
        pair = PAIR.fullmatch(path.stem)
        if not pair:
            raise ValueError(f"{path} is not named FIRST-vs-SECOND-gpt-4-reviewer-threeclass.jsonl: whose answers?")
        first, second = _two(str(path), _system(pair["first"]), _system(pair["second"]))
        check_regular(path)  # a FIFO among them would wait, too
        for place, read in records(path):
            row = read()
            question = _question(place, row if isinstance(row, dict) else {}, "question_id", "message_id")
            yield place, (question, first, second, _verdict(place, row.get("score")))


def _system(name: str) -> str:
    name = ANSWERS.sub("", name).removeprefix("answer-")
    return RENAMED.get(name, re.sub("^30b-", "33b-", name))


def _verdict(place: str, score: Any) -> str:
    if isinstance(score, list):
        words = "two scores, no verdict, and which is whose differs from file to file"
        raise ValueError(f"{place} holds {words}: name a folder of pairwise judgments")
    if type(score) is not int or score not in SCORES:
        raise ValueError(f"{place}: the score is {score!r}; allowed are 1, 2, 3 (a tie) and -1 (no verdict)")
    return SCORES[score]


def _counts(path: Path) -> Iterator[tuple[str, str, list[int]]]:
    text = io.StringIO(read_regular(path).decode("utf-8-sig"), newline="")
    lines = [(number, line) for number, line in enumerate(text, 1) if not line.startswith("#")]  # # is a comment
    rows = csv.DictReader(line for _, line in lines)
    names = list(rows.fieldnames or ())
    place = f"{path}, line {lines[0][0] if lines else 1}"
    if missing := [name for name in COLUMNS if name not in names]:
        raise ValueError(f"{place} lacks {', '.join(missing)}: the columns are {','.join(COLUMNS)}")
    if repeated := [name for name in COLUMNS if names.count(name) > 1]:
        raise ValueError(f"{place} has the column {repeated[0]} twice: keep one of them")  # DictReader takes the last
    total = 0
    for row in rows:
        place = f"{path}, line {lines[rows.line_num - 1][0]}"
        if None in row or None in row.values():  # where DictReader puts cells too many, and what it puts for too few
            raise ValueError(f"{place} has another number of cells than the {len(names)} columns")
        counts = [row[name] for name in COUNTS]
        # The length first: int() of a million digits takes seconds.
        if not all(count.isascii() and count.isdigit() and len(count) < 8 for count in counts):
            words = f"they are whole numbers, {MOST_GAMES:,} at most"
            raise ValueError(f"{place} has the counts {', '.join(counts)}: {words}")
        numbers = [int(count) for count in counts]
        if (total := total + sum(numbers)) > MOST_GAMES:
            raise ValueError(f"{place} brings the games to {total:,}, but at most {MOST_GAMES:,} are read: count fewer")
        for name in (row["first"], row["second"]):
            if name != name.strip():  # behind a comma, a space would make another system that looks the same
                raise ValueError(f"{place}: the name {name!r} begins or ends with a space: remove it")
        yield *_two(place, row["first"], row["second"]), numbers
