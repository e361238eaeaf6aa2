"""Measure multiple choice by data type, with intervals of the differences; if interrupted, run it again to continue.

The questions are generated from held-out docstrings, or read from a copy of MMLU.
"""

import argparse
import json
from pathlib import Path

from qlora_lab.cli.loading import add_measured
from qlora_lab.cli.options import common, whole
from qlora_lab.cli.printing import table

EXAMPLE = "qlora-lab multiple-choice smollm2-135m --codebooks none nf4 fp4 --answers texts --out rows.jsonl"
LESS_MEMORY = "use fewer --shots; the rows that are in --out are kept"
NAMES = {"acc": "by sum", "acc_norm": "by character"}  # lm-evaluation-harness' metrics, in words


def add_options(parser: argparse.ArgumentParser) -> None:
    add = add_measured(parser).add_argument
    add("--adapter", metavar="FOLDER", help="an adapter in PEFT's format, put on each of the models")
    kinds = "none (not quantised), nf4, fp4, int4, ...; the first is what the others are compared with"
    add("--codebooks", nargs="+", default=["none", "nf4"], metavar="NAME", help=kinds)
    add("--block-size", type=whole, default=64, metavar="N", help="weights in a block, 16 to 4096")
    add("--double-quant", default="off", choices=("off", "on", "both"), help="quantise the scaling constants too")
    add = parser.add_argument_group("questions").add_argument
    kept = "a folder in MMLU's form (dev/ and test/), or a file of whole prompts (default: generated from docstrings)"
    add("--data", metavar="PATH", help=kept)
    add("--questions", type=whole, default=500, metavar="N", help="number of questions; of a file, a fair sample")
    add("--shots", type=whole, metavar="N", help="worked examples in each prompt (default: 5)")
    ways = "choose among A, B, C and D, or among the options' texts"
    add("--answers", default="letters", choices=("letters", "texts"), help=ways)
    add("--seed", type=whole, default=0, metavar="N", help="seed of the generated questions")
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="FILE", help="file for the results; existing rows are kept")
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.measure.choice_rows import choice_rows
    from qlora_lab.measure.multiple_choice import Task
    from qlora_lab.quant.numbers import check_seed, check_whole
    from qlora_lab.train.run_folder import find_adapter

    check_whole("questions", a.questions)
    check_seed(a.seed)
    if a.adapter is not None:  # a missing adapter should cost no time
        find_adapter(Path(a.adapter))
    task = Task(_questions(a), a.shots, a.answers)
    rows = choice_rows(a.model, _settings(a), task, a.out, adapter=a.adapter, progress=not a.quiet)
    if a.json:
        print(json.dumps([_record(row, rows[0]) for row in rows]))
        return
    print("\n".join(_lines(rows)))


def _questions(a: argparse.Namespace):
    if a.data is None:
        from qlora_lab.data.docstring_choice import docstring_choice

        return docstring_choice(a.questions, seed=a.seed, progress=not a.quiet)
    from qlora_lab.data.choice_files import read_questions

    return read_questions(a.data).sample(a.questions)


def _settings(a: argparse.Namespace) -> list[tuple]:
    """Return the variants to measure, each once."""
    # "none" has no constants to quantise, so --double-quant both makes one variant of it, not two.
    switches = {"off": [False], "on": [True], "both": [False, True]}[a.double_quant]
    settings = []
    for name in a.codebooks:
        settings += [(None,)] if name == "none" else [(name, a.block_size, switch) for switch in switches]
    return list(dict.fromkeys(settings))


def _record(row: dict, first: dict) -> dict:
    """Return a row's figures: accuracies and differences by metric, each as share, low and high of its interval."""
    from qlora_lab.measure.choice_summary import METRICS, accuracies, difference

    record = {name: row[name] for name in ("codebook", "block_size", "double_quant", "adapter_name", "data", "config")}
    for metric in METRICS if row["lengths"] else METRICS[:1]:
        found = accuracies(row, metric)
        record[metric] = {
            "over_questions": _numbers(found.over_questions),
            "over_subjects": _numbers(found.over_subjects),
            "subjects": {name: _numbers(share) for name, share in found.subjects.items()},
            "categories": {name: _numbers(share) for name, share in found.categories.items()},
            "difference": None if row is first else _numbers(difference(row, first, metric)),
        }
    return record


def _numbers(interval) -> list[float]:
    return [round(number, 6) for number in (interval.mean, interval.low, interval.high)]


def _lines(rows: list[dict]) -> list[str]:
    """Return a table for each metric, and what the intervals are."""
    from qlora_lab.measure.choice_summary import accuracies, difference

    config = rows[0]["config"]
    lines = []
    for metric, words in NAMES.items():
        if metric != "acc" and rows[0]["lengths"] is None:
            continue
        if lines or rows[0]["lengths"]:
            lines += [*([""] if lines else []), f"{metric}: the likeliest answer {words}"]
        cells = []
        for row in rows:
            found = accuracies(row, metric)
            compared = "" if row is rows[0] else _percent(difference(row, rows[0], metric), "+")
            cells.append(
                {
                    "codebook": f"{row['codebook'] or 'none'}{' + DQ' * bool(row['double_quant'])}",
                    "accuracy": _percent(found.over_questions),
                    "mean over subjects": _percent(found.over_subjects),
                    "difference to the first": compared,
                }
            )
        lines.append(table(cells))
        if found.categories:  # of the last row; all rows have the same subjects
            lines += _by_category(rows, metric)
    # What was asked stands below the figures: without it they mean nothing.
    data = rows[0]["data"]
    asked = f"{data['questions']} questions of {data['name']}, {config['shots']} examples, {config['answers']}"
    return [*lines, f"{asked}; brackets: 95 % intervals, of differences paired by question"]


def _by_category(rows: list[dict], metric: str) -> list[str]:
    """Return a table of MMLU's categories. The authors' tables have these columns."""
    from qlora_lab.measure.choice_summary import accuracies

    cells = []
    for row in rows:
        shares = accuracies(row, metric).categories
        name = f"{row['codebook'] or 'none'}{' + DQ' * bool(row['double_quant'])}"
        cells.append({"codebook": name} | {category: _percent(share) for category, share in shares.items()})
    return [table(cells)]


def _percent(interval, sign: str = "") -> str:
    """Write an interval in percent (of a difference: percentage points).

    >>> from qlora_lab.measure.choice_summary import wilson
    >>> _percent(wilson(130, 500))
    '26.0 [22.3, 30.0]'
    """
    return f"{100 * interval.mean:{sign}.1f} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"
