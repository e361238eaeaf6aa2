"""Do 4 bits blind a model? Train one that sees in full, by LoRA and by QLoRA, and quantise it part by part.

    python bench/multimodal.py                     three seeds
    python bench/multimodal.py --seeds 1           the first seed alone
    python bench/multimodal.py --quick --out FILE  a few steps: to see that it runs

What is measured, and how, stands in qlora_lab/measure/seeing_rows.py. Notebook 14 reads the figures. Seconds are those
of the processor, so other work beside them matters little; threads that wait for each other spin, so one is enough:
OMP_NUM_THREADS=1.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import write  # noqa: E402
from qlora_lab.measure.seeing_rows import Settings, seeing_rows  # noqa: E402

OUT = HERE / "multimodal.json"


def table(rows: list[dict]) -> str:
    lines = []
    for run in dict.fromkeys(row["run"] for row in rows):
        means = ", ".join(f"{accuracy(row['right']):.3f}" for row in rows if row["run"] == run)
        seconds = [round(row["cost"]["processor_seconds"], 1) for row in rows if row["run"] == run and "cost" in row]
        lines.append(f"{run:34} {means}  {seconds or ''}")
    for row in rows:
        lines += [f"seed {row['seed']}, {name}: {accuracy(r):.3f}" for name, r in row.get("damaged", {}).items()]
    return "\n".join(lines)


def accuracy(right: dict[str, list[int]]) -> float:
    return sum(map(sum, right.values())) / sum(map(len, right.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--quick", action="store_true", help="two steps of each kind")
    parser.add_argument("--out", type=Path, default=OUT, help="default: bench/multimodal.json")
    work = Path(tempfile.gettempdir()) / "qlora-lab" / "multimodal"
    parser.add_argument("--work", type=Path, default=work, help=f"models and rows of a stopped bench; default: {work}")
    args = parser.parse_args()
    if args.quick and args.out == OUT:
        parser.error("--quick needs --out: its figures mean nothing")
    quick = Settings(pictures=64, tower_steps=2, batch=2, projector_steps=2, language_steps=2, test=4)
    rows = seeing_rows(args.work, quick if args.quick else Settings(), args.seeds)
    result = {"rows": rows}
    write(args.out, json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
