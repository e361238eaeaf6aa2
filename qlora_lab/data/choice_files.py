"""Multiple-choice questions from files: MMLU's own folders of CSV, and the JSON of the QLoRA authors.

In: a folder with `dev/SUBJECT_dev.csv` (the examples of a few-shot prompt) and `test/SUBJECT_test.csv`, whose rows are
question, A, B, C, D, answer, without a header, as github.com/hendrycks/test has them; or a file with an object a line,
{"subject": ..., "input": the whole prompt, "output": "A" to "D"}, as in data/mmlu of github.com/artidoro/qlora.
Out: Questions.

Texts are taken as they stand. The original evaluation reads the CSV with pandas, which makes "nan" of an option "None"
and "1.0" of a 1 in a column that also has fractions, and it drops examples from prompts that are too long. So a few of
its prompts differ from ours.
Not here: prompts and scores (measure/multiple_choice.py), the generated set (docstring_choice.py).
"""

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qlora_lab.files import disk
from qlora_lab.files.home import expanded
from qlora_lab.files.out_path import out_path
from qlora_lab.files.replace import replace_text
from qlora_lab.files.strict_json import TEXT, Rule, check_keys, parse, read_regular
from qlora_lab.quant.numbers import check_whole

LETTERS = "ABCD"
COLUMNS = "question, A, B, C, D, answer"
LARGEST = 256 * 2**20  # bytes of a file; the authors' five-shot test questions have 44 MB
LETTER = Rule("A, B, C or D", lambda value: isinstance(value, str) and len(value) == 1 and value in LETTERS)
PROMPTED = {"subject": TEXT, "input": TEXT, "output": LETTER}  # a line of the authors' files
PROMPT_END = "\nAnswer:"


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with four options."""

    subject: str
    text: str  # empty if `prompt` holds everything
    options: tuple[str, ...]  # four texts; none if `prompt` holds them
    answer: int  # number of the right option, from 0
    prompt: str | None = None  # the whole prompt with its examples, where the file gives that
    # For messages. A copy of the file elsewhere holds the same questions and gives the same sample.
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class Questions:
    """A set of questions: those to answer, subject by subject, and examples for the prompts of each subject.

    Raises ValueError if the questions of a subject do not stand together.
    """

    name: str
    test: tuple[ChoiceQuestion, ...]
    dev: dict[str, tuple[ChoiceQuestion, ...]]  # subject -> examples; empty for a file of whole prompts

    def __post_init__(self) -> None:
        groups = group_by_subject(self.test)
        if self.test != tuple(question for group in groups.values() for question in group):
            raise ValueError(f"{self.name}: questions of one subject stand apart: sort them by subject")

    def sample(self, number: int) -> "Questions":
        """Return at most `number` of the questions to answer, in their order: a fair sample of all subjects.

        It is the same on every machine: the questions whose checksums come first. Raises ValueError for less than one.
        """
        check_whole("questions", number)
        # By checksum, not by a random generator: a larger sample contains the smaller one.
        ranked = sorted(range(len(self.test)), key=lambda i: hashlib.sha256(repr(self.test[i]).encode()).digest())
        return replace(self, test=tuple(self.test[i] for i in sorted(ranked[:number])))


def read_questions(path: str | Path) -> Questions:
    """Read a folder of CSV files or a file of JSON lines; see the module's docstring.

    Raises FileNotFoundError for a path that is not there, and ValueError, with file and line, for a wrong number of
    columns, an answer outside A to D, a line of another form, a folder or file without questions, or a subject twice.
    """
    if not str(path):  # Path("") would be the current folder
        raise ValueError("the path is empty, perhaps because a shell variable is not set: name a folder or a file")
    path = expanded(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name a folder with dev/ and test/, or a file of JSON lines")
    return _read_folder(path) if path.is_dir() else _read_prompts(path)


def write_questions(questions: Questions, folder: str | Path) -> None:
    """Write questions as a folder of CSV files that read_questions reads. Files of the same names are replaced.

    Raises ValueError for questions that are whole prompts, for a subject that cannot be part of a file's name, and for
    a folder with questions of other subjects.
    """
    if any(question.prompt is not None for question in questions.test):
        raise ValueError(f"{questions.name} holds whole prompts, which the CSV form has no column for")
    folder = out_path(folder)
    by_subject = {"test": group_by_subject(questions.test), "dev": questions.dev}
    check_file_names({**by_subject["test"], **questions.dev}, questions.name)
    for split, subjects in by_subject.items():  # before anything is written
        # A reader takes all files of a folder, so one that is left over would mix its questions with these.
        if others := _subjects(folder, split).keys() - subjects.keys():
            raise ValueError(f"{folder} holds {split} questions of {', '.join(sorted(others))} too: name a new folder")
    for split, subjects in by_subject.items():
        for subject, rows in subjects.items():
            path = folder / split / f"{subject}_{split}.csv"
            disk.make_folder(path.parent)
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows((q.text, *q.options, LETTERS[q.answer]) for q in rows)
            replace_text(path, text.getvalue())


def check_file_names(subjects: Iterable[str], where: str) -> None:
    """Raise ValueError for a subject that cannot be part of a file's name, or is there in two spellings."""
    subjects = list(subjects)
    for subject in subjects:
        # A separator would lead to another folder; files that begin with a dot are not read again.
        if not subject or subject.startswith(".") or any(sign in subject for sign in "/\\\0"):
            words = "it names a file, so it has no / or \\ and does not begin with a dot"
            raise ValueError(f"{where}: the subject {subject!r} is not allowed: {words}")
    _check_subjects(subjects, where)


def group_by_subject(questions: Iterable[ChoiceQuestion]) -> dict[str, tuple[ChoiceQuestion, ...]]:
    """Return subject -> its questions, in the order in which subjects first appear."""
    groups: dict[str, list[ChoiceQuestion]] = {}
    for question in questions:
        groups.setdefault(question.subject, []).append(question)
    return {subject: tuple(group) for subject, group in groups.items()}


def _read_folder(folder: Path) -> Questions:
    found = _subjects(folder, "test")
    if not found:
        raise ValueError(f"{folder} has no test/SUBJECT_test.csv: name the folder that contains dev/ and test/")
    test = tuple(question for subject, path in found.items() for question in _read_csv(subject, path))
    if not test:
        raise ValueError(f"the files in {folder / 'test'} hold no question: put one into each line ({COLUMNS})")
    dev = {subject: _read_csv(subject, path) for subject, path in _subjects(folder, "dev").items() if subject in found}
    return Questions(folder.resolve().name, test, dev)


def _subjects(folder: Path, split: str) -> dict[str, Path]:
    """Return subject -> file, sorted by subject as the original evaluation does."""
    end = f"_{split}.csv"
    # macOS leaves files that begin with a dot in archives
    paths = [path for path in Path(folder, split).glob(f"*{end}") if not path.name.startswith(".")]
    subjects = {path.name.removesuffix(end): path for path in paths}
    _check_subjects(subjects, f"{folder / split}")
    return {subject: subjects[subject] for subject in sorted(subjects)}


def _check_subjects(subjects: Iterable[str], where: str) -> None:
    """Raise ValueError for two spellings of one subject: its questions would count as two subjects in every mean."""
    spelled: dict[str, str] = {}
    for subject in subjects:
        plain = subject.strip().casefold().replace(" ", "_").replace("-", "_")
        if (other := spelled.setdefault(plain, subject)) != subject:
            raise ValueError(f"{where} has the subject {subject!r} twice, also as {other!r}: merge them into one")


def _read_csv(subject: str, path: Path) -> tuple[ChoiceQuestion, ...]:
    try:
        text = read_regular(path, LARGEST).decode("utf-8-sig")  # an editor may have put a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    questions = []
    line = 1  # where a record begins; it may span several
    try:
        for row in reader:
            if row:  # pandas skips empty lines as well
                questions.append(_question(subject, row, f"{path}, line {line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}: write a record as {COLUMNS}") from None
    return tuple(questions)


def _question(subject: str, row: list[str], where: str) -> ChoiceQuestion:
    if len(row) != 6:
        columns = "1 column" if len(row) == 1 else f"{len(row)} columns"
        raise ValueError(f"{where} has {columns}, but needs 6 ({COLUMNS}): put texts with a comma into double quotes")
    # Outer spaces of a text stay: they are part of the original prompt. Those of the letter mean nothing.
    text, *options, letter = row
    if not LETTER.allows(letter.strip()):
        raise ValueError(f"{where} has the answer {letter[:40]!r}: it must be {LETTER.what}")
    return ChoiceQuestion(subject, text, tuple(options), LETTERS.index(letter.strip()), where=where)


def _read_prompts(path: Path) -> Questions:
    try:
        lines = read_regular(path, LARGEST).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    test = tuple(_prompted(line, path, number) for number, line in enumerate(lines, 1) if line.strip())
    if not test:
        raise ValueError(f"{path} holds no question: put one into each line, as subject, input and output")
    groups = group_by_subject(test)
    # Subjects may be mixed in the file; together they share the beginning of their prompts.
    _check_subjects(groups, str(path))
    return Questions(path.stem, tuple(question for group in groups.values() for question in group), {})


def _prompted(line: str, path: Path, number: int) -> ChoiceQuestion:
    where = f"{path}, line {number}"
    record = parse(line, str(path), line=number, expected='{"subject": ..., "input": ..., "output": "A"}')
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object with subject, input and output: each line must be one question")
    check_keys(record, PROMPTED, where, PROMPTED)
    if not record["input"].endswith(PROMPT_END):
        raise ValueError(f"{where} has an input that does not end in {PROMPT_END!r}: it must be the whole prompt")
    return ChoiceQuestion(record["subject"], "", (), LETTERS.index(record["output"]), record["input"], where)
