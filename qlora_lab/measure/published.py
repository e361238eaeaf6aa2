"""Read figures that others have published, each with its source and what is wrong with it, and figures of our benches.

    data/published/*.csv -> records: figures are texts, as printed, so that their decimal places are known

Each row names its table or section, and `erratum` says what does not hold; it is empty if we found nothing. The counted
judgments (guanaco_*.csv) name their source in comment lines at the top of the file.
Source: QLoRA (arXiv 2305.14314) and its public repository; slides on QLoRA; a weekly report on scaling LLaVA.
Not here: what follows from these figures (replay.py), published memory figures (memory/published.py).
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NewType, TypeVar

import numpy as np
import torch

from qlora_lab.files.course import course_path
from qlora_lab.measure.games import Games

Printed = NewType("Printed", str)  # a number as printed: "53.0" has one decimal place, and a float forgets that
Row = TypeVar("Row")
QUESTIONS = {"vicuna": 80, "oa": 953}  # paper, section 5.2: the prompts of each benchmark


def published_nf4() -> torch.Tensor:
    """Return the 16 NF4 levels of bitsandbytes: (16,) float32, ascending."""
    return torch.tensor(read_data("nf4.json")["levels"], dtype=torch.float32)


def published_af4() -> torch.Tensor:
    """Return bitsandbytes' 16 levels of AbnormalFloat for blocks of 64. Shape and dtype as in published_nf4."""
    return torch.tensor(read_data("af4.json")["levels"], dtype=torch.float32)


# ------------------------------------------------------------------------------------------------- rows of the tables


@dataclass(frozen=True)
class Perplexity:
    """A row of table 2: mean perplexity on Pile Common Crawl of OPT, BLOOM, LLaMA and Pythia, 125M to 13B."""

    data_type: str
    codebook: str | None  # the nearest name in this library; no run of it made the figure
    double_quant: bool
    perplexity: Printed
    source: str
    erratum: str


@dataclass(frozen=True)
class Mmlu:
    """A figure of table 4 or 5: 5-shot accuracy on MMLU, in %, of LLaMA tuned with an adapter."""

    table: int
    data_type: str
    codebook: str | None  # None for weights of 16 bits
    double_quant: bool
    data: str  # what it was tuned on; "none", or "all" for a mean
    size: str  # "7B" to "65B", or "mean"
    accuracy: Printed
    source: str
    erratum: str


@dataclass(frozen=True)
class Glue:
    """A figure of table 3: accuracy on GLUE (%) or ROUGE-L on Super-NaturalInstructions (times 100)."""

    method: str  # "full", "LoRA" or "QLoRA"
    data_type: str
    replication: bool  # the authors' own run of full fine-tuning, beside the figure they cite
    model: str
    benchmark: str
    metric: str
    value: Printed
    source: str
    erratum: str


@dataclass(frozen=True)
class Elo:
    """A figure of table 1 or 7. The judge "median" has no rating, only the median of the ranks."""

    table: int
    benchmark: str
    judge: str  # "GPT-4", "people" or "median"
    system: str
    elo: Printed | None
    interval: Printed | None  # half-width, 95 %
    rank: Printed | None
    memory_gb: Printed | None
    source: str
    erratum: str


@dataclass(frozen=True)
class Chatbot:
    """A row of table 6: GPT-4's scores of a system in % of those of ChatGPT, on 80 questions."""

    system: str
    size: str
    bits: Printed | None
    memory_gb: Printed | None
    chatgpt_first: Printed  # headed "ChatGPT vs Sys"
    system_first: Printed  # headed "Sys vs ChatGPT"
    mean: Printed
    interval: Printed  # half-width, 95 %
    counted: str  # its name in the counted judgments
    source: str
    erratum: str


@dataclass(frozen=True)
class Claim:
    """A number in a sentence, not in a table."""

    key: str
    claim: str
    value: Printed
    unit: str
    source: str
    erratum: str


@dataclass(frozen=True)
class LlavaFinding:
    """What the weekly report says about scaling LLaVA; `primary` is the study that it summarises."""

    topic: str
    before: str
    after: str
    value: str  # as stated, often in words
    finding: str
    unit: str
    source: str
    primary: str
    erratum: str


@dataclass(frozen=True)
class PairCount:
    """Verdicts on one ordered pair of systems, counted over the questions of a benchmark."""

    first: str  # the judge read its answer first
    second: str
    first_wins: int
    second_wins: int
    ties: int
    unparsed: int  # no verdict could be read


@dataclass(frozen=True)
class RelativeTotals:
    """Scores of one file, summed over its questions, as stored. `scores` puts them in order."""

    name_1_in_file: str
    name_2_in_file: str
    rated: int  # questions of 80 with two scores
    total_score_1: float
    total_score_2: float

    def scores(self) -> dict[str, float]:
        """Return the total of each system, the one that the judge read first in front.

        Where a name begins with a size ("65b-guanaco"), the file stores answers and scores in the reverse order of its
        own name.
        """
        names = [self.name_1_in_file, self.name_2_in_file]
        if any(name[0].isdigit() for name in names):
            names.reverse()
        return dict(zip(names, (self.total_score_1, self.total_score_2), strict=True))


@dataclass(frozen=True)
class RelativeQuestions:
    """Sums over questions, for one system beside ChatGPT. A question's score: the mean of its orders that were read."""

    system: str
    questions: int
    total_system: float
    total_chatgpt: float
    squares_system: float
    squares_chatgpt: float
    products: float


@dataclass(frozen=True)
class PublishedDataType:
    """One published figure of a data type."""

    data_type: str
    codebook: str | None  # its name here; None for weights of 16 bits
    double_quant: bool
    metric: str
    value: str  # as printed
    source: str
    erratum: str = ""  # an error in the figure, or in a conclusion from it; empty if we found none


# ------------------------------------------------------------------------------------------------------------ readers


def published_data_types() -> tuple[PublishedDataType, ...]:
    """Return the QLoRA paper's figures of data types: mean perplexity (table 2) and MMLU (table 4)."""
    words = "mean perplexity on Pile Common Crawl of OPT, BLOOM, LLaMA and Pythia, 125M to 13B; lower is better"
    found = [
        PublishedDataType(row.data_type, row.codebook, row.double_quant, words, row.perplexity, row.source, row.erratum)
        for row in published("perplexity.csv", Perplexity)
    ]
    for row in published("mmlu.csv", Mmlu):
        if row.table == 4:
            of = "mean of the eight" if row.size == "mean" else f"LLaMA-{row.size} on {row.data}"
            metric = f"MMLU 5-shot accuracy in %, {of}; higher is better"
            kind = row.data_type, row.codebook, row.double_quant
            found.append(PublishedDataType(*kind, metric, row.accuracy, row.source, row.erratum))
    return tuple(found)


def published_games(benchmark: str) -> Games:
    """Return the games of the paper's tournament as GPT-4 judged them. benchmark: "vicuna" (4,480 games) or "oa".

    The counts do not say which question a game was about: `questions` is empty and `question` all -1. Games stand pair
    by pair. Raises ValueError for another benchmark, and for a damaged file.
    """
    if benchmark not in QUESTIONS:
        raise ValueError(f"benchmark is {benchmark!r}; counted are {' and '.join(map(repr, QUESTIONS))}")
    name = f"guanaco_{benchmark}_pairs.csv"
    rows = published(name, PairCount)
    counts = [(row.first_wins, row.second_wins, row.ties, row.unparsed) for row in rows]  # as VERDICTS
    for row, count in zip(rows, counts, strict=True):
        if sum(count) != QUESTIONS[benchmark]:
            words = f"{row.first} and {row.second} have another number of games than {QUESTIONS[benchmark]}"
            raise ValueError(f"{name}: {words}: restore the file")
    return Games.of_counts((row.first, row.second, count) for row, count in zip(rows, counts, strict=True))


def relative_totals() -> tuple[RelativeTotals, ...]:
    """Return GPT-4's scores of systems beside ChatGPT, summed file by file: 72 files, some of which lack questions."""
    return published("guanaco_relative_totals.csv", RelativeTotals)


def published(name: str, kind: type[Row]) -> tuple[Row, ...]:
    """Read a table of data/published, such as published("elo.csv", Elo). Raises what read_rows raises."""
    return read_rows(course_path("data", "published", name), kind)


def read_rows(path: Path, kind: type[Row]) -> tuple[Row, ...]:
    """Read a CSV file whose columns are the fields of the dataclass `kind`; lines that begin with # are comments.

    Raises FileNotFoundError, and ValueError with file and line: for other columns, for a row that is too long or too
    short, and for a cell that is not what its column holds.
    """
    columns = {field.name: field.type for field in fields(kind)}
    numbered = [(number, line) for number, line in enumerate(_lines(path), 1) if line and not line.startswith("#")]
    found = []
    # Line by line: no cell of these tables holds a line break, and so each error knows its line.
    for row, (number, cells) in enumerate((number, next(csv.reader([line]))) for number, line in numbered):
        where = f"{path}, line {number}"
        if row == 0 and cells != list(columns):
            raise ValueError(f"{where}: the columns are {','.join(cells)}; they must be {','.join(columns)}")
        if len(cells) != len(columns):
            raise ValueError(f"{where}: {len(cells)} cells; there must be {len(columns)}")
        if row > 0:
            pairs = zip(columns.items(), cells, strict=True)
            found.append(kind(*(_cell(where, name, kind_of, text) for (name, kind_of), text in pairs)))
    if not found:
        raise ValueError(f"{path} has no rows: restore the file")
    return tuple(found)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: restore the file") from error


def _printed(text: str) -> str:
    if not np.isfinite(float(text)):
        raise ValueError(text)
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):  # no sign, no point, no digits of another script
        raise ValueError(text)
    return int(text)


# what a cell holds: how it is read, and its name in an error
CELLS: dict[object, tuple[Callable[[str], object], str]] = {
    str: (str, "a text"),
    str | None: (lambda text: text or None, "a text"),
    int: (_count, "a whole number of 0 or more"),
    float: (lambda text: float(_printed(text)), "a number"),
    bool: ({"true": True, "false": False}.__getitem__, "true or false"),
    Printed: (_printed, "a number"),
    Printed | None: (lambda text: _printed(text) if text else None, "a number, or nothing"),
}


def _cell(where: str, name: str, kind: object, text: str) -> object:
    read, words = CELLS[kind]
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{where}: {name} is {text!r}; it must be {words}") from None


def read_data(name: str) -> dict:
    """Read a JSON file of data/published."""
    return json.loads(course_path("data", "published", name).read_text(encoding="utf-8"))


def read_bench(name: str) -> dict | list:
    """Read figures that a command of bench/ has measured and stored, such as "paging.json"."""
    return json.loads(course_path("bench", name).read_text(encoding="utf-8"))
