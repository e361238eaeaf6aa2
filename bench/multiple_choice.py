"""Ask SmolLM2-135M 500 questions in five data types, by the options' texts, with paired intervals.

    python bench/multiple_choice.py           writes multiple_choice.json and the table of docs/multiple_choice.md
    python bench/multiple_choice.py --render  writes the table again, from the JSON file
    python bench/multiple_choice.py --answers texts letters     asks by letters, too: twice the time
    python bench/multiple_choice.py --questions 20 --out FILE   few questions: to see that it runs

The questions are docstring-choice: which of four summaries describes a Python function? The functions are held out from
`--data docstrings`. "bf16 weights" is the model as its file has it; all models compute in float32.
Rows are kept in --rows, so a stopped call continues, and the seconds are the sum over its rows. Figures are of one
model and one set of questions: they say how wide the intervals are as much as which data type is better.
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
from qlora_lab.data.choice_baselines import baselines  # noqa: E402
from qlora_lab.data.choice_prompts import WAYS, Task  # noqa: E402
from qlora_lab.data.docstring_choice import NAME, docstring_choice  # noqa: E402
from qlora_lab.measure.choice_rows import choice_rows  # noqa: E402
from qlora_lab.measure.choice_summary import figures  # noqa: E402
from qlora_lab.measure.in_place import Variant  # noqa: E402
from qlora_lab.measure.machine import machine  # noqa: E402

MODEL = "smollm2-135m"
QUESTIONS = 500
OUT = HERE / "multiple_choice.json"
PAGE = HERE.parent / "docs" / "multiple_choice.md"
BEGIN = "<!-- made by bench/multiple_choice.py -->"
END = "<!-- end -->"
VARIANTS = {
    "bf16 weights": Variant(None),
    "nf4": Variant("nf4", 64, False),
    "nf4 + DQ": Variant("nf4", 64, True),  # the command's word for double quantization, and the paper's
    "fp4": Variant("fp4", 64, False),
    "int4": Variant("int4", 64, False),
}
METRICS = {"letters": ("acc",), "texts": ("acc", "acc_norm")}


def table(result: dict) -> str:
    """Return what the page says of the figures, in Markdown."""
    lines = [
        f"Measured on {result['date']}: {result['model']}, {result['questions']} questions of {result['data']}, "
        f"{result['shots']} examples, {result['machine']['processor']} {result['versions']['torch']}, "
        f"{result['seconds'] / 60:.0f} minutes. Accuracies and differences in percent, with 95 % intervals. "
        f"bf16 weights: not quantised; all models compute in float32. Load average at the end: {result['load']}.",
        "",
        "| answers | data type | accuracy | difference to bf16 weights | seconds |",
        "|---|---|---:|---:|---:|",
    ]
    for way, models in result["answers"].items():
        for metric in METRICS[way]:
            for name, row in models.items():
                change = _percent(row[metric]["difference"], "+") if row[metric]["difference"] else ""
                cells = (f"{way}, {metric}", name, _percent(row[metric]["over_questions"]), change)
                lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    lines += ["", "What rules score on the same questions that read none of them; guessing gives 25 %:", ""]
    lines += ["| rule | accuracy |", "|---|---:|"]
    lines += [f"| {name} | {100 * share:.1f} |" for name, share in result["baselines"].items()]
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
    parser.add_argument("--answers", nargs="+", choices=WAYS, default=["texts"], help="default: texts")
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
        first = rows[0]
        found = (figures(row, None if row is first else first, 5) for row in rows)
        answers[way] = {
            name: {"seconds": row["seconds"], **one} for name, row, one in zip(VARIANTS, rows, found, strict=True)
        }
    head = {"date": datetime.date.today().isoformat(), "model": MODEL, "data": NAME, "questions": args.questions}
    head |= {"shots": args.shots, "machine": machine(), "versions": versions()}
    head["load"] = round(os.getloadavg()[0], 1)  # of the last minute: an idle machine shows this bench's own threads
    head["seconds"] = round(sum(row["seconds"] for models in answers.values() for row in models.values()))
    head["baselines"] = {name: round(share, 5) for name, share in baselines(questions).items()}
    result = head | {"answers": answers}
    write(args.out, json.dumps(result, indent=1) + "\n")
    if args.out == OUT:
        write(PAGE, in_page(PAGE.read_text("utf-8"), result))
    print(table(result))


if __name__ == "__main__":
    main()
