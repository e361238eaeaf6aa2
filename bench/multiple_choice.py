"""Ask SmolLM2-135M 500 questions in five data types, by the options' texts and by letters, with paired intervals.

    python bench/multiple_choice.py           writes multiple_choice.json and the table of docs/multiple_choice.md
    python bench/multiple_choice.py --render  writes the table again, from the JSON file
    python bench/multiple_choice.py --questions 20 --out FILE   few questions: to see that it runs

The questions are docstring-choice: which of four summaries describes a Python function? The functions are held out from
`--data docstrings`. The model without quantisation computes in float32, as the others do, from weights in bf16.
Rows are kept in --rows, so a stopped call continues. Figures are of one model and one set of questions: they say how
wide the intervals are as much as which data type is better.
"""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.cpu import versions  # noqa: E402
from bench.files import between, write  # noqa: E402
from qlora_lab.data.docstring_choice import NAME, docstring_choice  # noqa: E402
from qlora_lab.measure.ablations import Interval  # noqa: E402
from qlora_lab.measure.choice_rows import choice_rows  # noqa: E402
from qlora_lab.measure.choice_summary import accuracies, difference  # noqa: E402
from qlora_lab.measure.in_place import Variant  # noqa: E402
from qlora_lab.measure.machine import machine  # noqa: E402
from qlora_lab.measure.multiple_choice import WAYS, Task  # noqa: E402

MODEL = "smollm2-135m"
QUESTIONS = 500
OUT = HERE / "multiple_choice.json"
PAGE = HERE.parent / "docs" / "multiple_choice.md"
BEGIN = "<!-- made by bench/multiple_choice.py -->"
END = "<!-- end -->"
VARIANTS = {
    "bf16": Variant(None),
    "nf4": Variant("nf4", 64, False),
    "nf4 + double quantization": Variant("nf4", 64, True),
    "fp4": Variant("fp4", 64, False),
    "int4": Variant("int4", 64, False),
}
METRICS = {"letters": ("acc",), "texts": ("acc", "acc_norm")}


def figures(rows: list[dict], way: str) -> dict:
    """Name -> accuracies and differences to bf16, by metric: [share, low, high] of a 95 % interval."""
    first = rows[0]
    found = {}
    for name, row in zip(VARIANTS, rows, strict=True):
        found[name] = {"seconds": row["seconds"]}
        for metric in METRICS[way]:
            shares = accuracies(row, metric)
            found[name][metric] = {
                "over_questions": _numbers(shares.over_questions),
                "over_subjects": _numbers(shares.over_subjects),
                "subjects": {subject: _numbers(share) for subject, share in shares.subjects.items()},
                "difference": None if row is first else _numbers(difference(row, first, metric)),
            }
    return found


def _numbers(interval: Interval) -> list[float]:
    return [round(number, 5) for number in (interval.mean, interval.low, interval.high)]


def table(result: dict) -> str:
    """Return what the page says of the figures, in Markdown."""
    lines = [
        f"Measured on {result['date']}: {result['model']}, {result['questions']} questions of {result['data']}, "
        f"{result['shots']} examples, {result['machine']['processor']} {result['versions']['torch']}. Accuracies and "
        f"differences in percent, with 95 % intervals. Load average at the end: {result['load']}.",
        "",
        "| answers | data type | accuracy | difference to bf16 | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for way, models in result["answers"].items():
        for metric in METRICS[way]:
            for name, row in models.items():
                change = _percent(row[metric]["difference"], "+") if row[metric]["difference"] else ""
                cells = (f"{way}, {metric}", name, _percent(row[metric]["over_questions"]), change)
                lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _percent(numbers: list[float], sign: str = "") -> str:
    share, low, high = (f"{100 * number:{sign}.1f}" for number in numbers)
    return f"{share} ({low} to {high})"


def in_page(page: str, result: dict) -> str:
    """Return the page with the table of these figures."""
    return between(page, BEGIN, END, table(result), PAGE.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="default: 500")
    parser.add_argument("--shots", type=int, default=5, help="worked examples in each prompt; default: 5")
    parser.add_argument("--answers", nargs="+", choices=WAYS, default=["texts", "letters"], help="default: both")
    parser.add_argument("--rows", type=Path, default=HERE.parent / "build" / "multiple_choice.jsonl", help="kept rows")
    parser.add_argument("--render", action="store_true", help="do not measure: read the JSON file")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/multiple_choice.json")
    args = parser.parse_args()
    if args.render:
        write(PAGE, in_page(PAGE.read_text("utf-8"), json.loads(OUT.read_text("utf-8"))))
        return
    questions = docstring_choice(args.questions)
    answers = {}
    for way in args.answers:
        rows = choice_rows(MODEL, VARIANTS.values(), Task(questions, args.shots, way), args.rows)
        answers[way] = figures(rows, way)
    head = {"date": datetime.date.today().isoformat(), "model": MODEL, "data": NAME, "questions": args.questions}
    head |= {"shots": args.shots, "machine": machine(), "versions": versions()}
    head["load"] = round(os.getloadavg()[0], 1)  # of the last minute: an idle machine shows this bench's own threads
    result = head | {"answers": answers}
    write(args.out, json.dumps(result, indent=1) + "\n")
    if args.out == OUT:
        write(PAGE, in_page(PAGE.read_text("utf-8"), result))
    print(table(result))


if __name__ == "__main__":
    main()
