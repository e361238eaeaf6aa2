"""Measure multiple choice by data type, with intervals of the differences; if interrupted, run it again to continue.

The questions are generated from held-out docstrings, or read from a copy of MMLU.
"""

import argparse
import json
from pathlib import Path

from qlora_lab.cli.loading import DOUBLE_QUANT, add_double_quant, add_measured, add_rows
from qlora_lab.cli.options import add_fields, whole
from qlora_lab.cli.printing import table
from qlora_lab.train.run_options import ModelOptions

EXAMPLE = "qlora-lab multiple-choice smollm2-135m --codebooks none nf4 fp4 --answers texts --out rows.jsonl"
LESS_MEMORY = "use fewer --shots; the rows that are in --out are kept"
NAMES = {"acc": "by sum", "acc_norm": "by character"}  # lm-evaluation-harness' metrics, in words


def add_options(parser: argparse.ArgumentParser) -> None:
    models = add_measured(parser)
    add = models.add_argument
    add("--adapter", metavar="FOLDER", help="an adapter in PEFT's format, put on each of the models")
    kinds = "none (not quantised), nf4, fp4, int4, ...; the first is what the others are compared with"
    add("--codebooks", nargs="+", default=["none", "nf4"], metavar="NAME", help=kinds)
    add_fields(models, ModelOptions, "block_size")
    add_double_quant(models, "on")  # as load has it
    add = parser.add_argument_group("questions").add_argument
    kept = "folder with dev/ and test/ in MMLU's CSV, or JSON lines with subject, input (a whole prompt) and output "
    add("--data", metavar="PATH", help=f"{kept}(default: generated from docstrings)")
    most = "how many to generate, or the most to take from --data: a fair sample"
    add("--questions", type=whole, default=500, metavar="N", help=most)
    add("--shots", type=whole, metavar="N", help="worked examples in each prompt (default: 5)")
    ways = (
        "what the model completes the prompt with: A to D, as in MMLU, or the options' texts, which suits small models"
    )
    add("--answers", default="letters", choices=("letters", "texts"), help=ways)
    add("--seed", type=whole, default=0, metavar="N", help="seed of the generated questions")
    add_rows(parser)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.data.choice_prompts import Task
    from qlora_lab.data.docstring_choice import EXAMPLES
    from qlora_lab.files.out_path import out_path
    from qlora_lab.measure.choice_rows import choice_rows
    from qlora_lab.measure.sweep import checked
    from qlora_lab.quant.numbers import MOST, check_seed, check_whole
    from qlora_lab.train.run_folder import find_adapter

    out_path(a.out)  # questions take seconds to generate
    check_whole("questions", a.questions)
    check_seed(a.seed)
    if a.shots is not None:  # a generated subject has EXAMPLES examples; a file tells when it is read
        check_whole("shots", a.shots, 0, EXAMPLES if a.data is None else MOST)
    if a.adapter is not None:  # a missing adapter should cost no time
        find_adapter(Path(a.adapter))
    settings = [checked(setting) for setting in _settings(a)]  # before questions are generated
    task = Task(_questions(a), a.shots, a.answers)
    rows = choice_rows(a.model, settings, task, a.out, adapter=a.adapter, progress=not a.quiet)
    if a.json:
        print(json.dumps([_record(row, rows[0]) for row in rows]))
        return
    print("\n".join([*_lines(rows), *_of_rules(task)]))


def _questions(a: argparse.Namespace):
    if a.data is None:
        from qlora_lab.data.docstring_choice import docstring_choice

        return docstring_choice(a.questions, seed=a.seed, progress=not a.quiet)
    from qlora_lab.data.choice_files import read_questions

    return read_questions(a.data).sample(a.questions)


def _settings(a: argparse.Namespace) -> list[tuple]:
    """Return the variants to measure, each once."""
    # "none" has no constants to quantise, so --double-quant both makes one variant of it, not two.
    switches = DOUBLE_QUANT[a.double_quant]
    settings = []
    for name in a.codebooks:
        settings += [(None,)] if name == "none" else [(name, a.block_size, switch) for switch in switches]
    return list(dict.fromkeys(settings))


def _record(row: dict, first: dict) -> dict:
    """Return a row's figures, with what was asked of which model."""
    from qlora_lab.measure.choice_summary import figures

    record = {name: row[name] for name in ("codebook", "block_size", "double_quant", "adapter_name", "data", "config")}
    return record | figures(row, None if row is first else first)


def _of_rules(task) -> list[str]:
    """Return a line with the two best rules that read nothing: below them, an accuracy shows no understanding."""
    from qlora_lab.data.choice_baselines import baselines

    if task.questions.test[0].prompt is not None:  # its options are not known apart
        return []
    # Two are enough: the best says what to beat, the second whether it stands alone.
    found = sorted(baselines(task.questions).items(), key=lambda pair: -pair[1])
    best = ", ".join(f"{name} {share:.1%}" for name, share in found[:2])
    return [f"rules that read no question: {best}; guessing 25 %"]


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
                    "codebook": _name(row),
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
    asked = f"{_counted(data['questions'], 'question')} of {data['name']}, {_counted(config['shots'], 'example')}"
    asked += f", {config['answers']}"
    return [*lines, f"{asked}; brackets: 95 % intervals, of differences paired by question"]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _name(row: dict) -> str:
    """Name a data type as the paper's tables do: + DQ is double quantization."""
    return f"{row['codebook'] or 'none'}{' + DQ' * bool(row['double_quant'])}"


def _by_category(rows: list[dict], metric: str) -> list[str]:
    """Return a table of MMLU's categories. The authors' tables have these columns."""
    from qlora_lab.measure.choice_summary import accuracies

    cells = []
    for row in rows:
        shares = accuracies(row, metric).categories
        cells.append({"codebook": _name(row)} | {category: _percent(share) for category, share in shares.items()})
    return [table(cells)]


def _percent(interval, sign: str = "") -> str:
    """Write an interval in percent (of a difference: percentage points).

    >>> from qlora_lab.measure.choice_summary import wilson
    >>> _percent(wilson(130, 500))
    '26.0 [22.3, 30.0]'
    """
    return f"{100 * interval.mean:{sign}.1f} [{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"
