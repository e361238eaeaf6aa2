"""Measure which data type and block size lose least on text, on more text than a lesson has time for.

    python bench/data_types.py                     SmolLM2-135M, 64 windows of 512 tokens; a quarter of an hour
    python bench/data_types.py --quick --out FILE  2 windows: to see that it runs

The rows of the sweep are in --results, from which a stopped run continues. Every setting reads the same windows, so
intervals are those of differences: 95 %, by a bootstrap over windows. It writes data_types.json.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import qlora_lab as ql  # noqa: E402
from bench.block_size import interval, text_of  # noqa: E402
from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from qlora_lab.measure.published import published_af4  # noqa: E402
from qlora_lab.measure.sweep import Variant  # noqa: E402

MODEL = "smollm2-135m"
BASE = Variant("nf4", 64)
SETTINGS = [
    Variant(None),
    *(Variant(name) for name in ("nf4", "fp4", "int4", "e2m1", "e3m0", "lloyd-max", "nf3")),
    Variant("af4", levels=published_af4()),
    *(Variant("nf4", size) for size in (16, 32, 128, 256, 1024, 4096)),
    *(Variant(name, double_quant=True) for name in ("nf4", "fp4", "int4")),
]
# the comparisons of notebook 06 and the paper: the second minus the first
PAIRS = [
    (Variant("fp4"), Variant("int4")),
    (Variant("e2m1"), Variant("e3m0")),
    (Variant("e2m1"), Variant("fp4")),
    (Variant("nf4", 16), Variant("nf4", 32)),
    (Variant("nf4", 32), BASE),
    (BASE, Variant("nf4", double_quant=True)),
    (Variant("fp4"), Variant("fp4", double_quant=True)),
    (Variant("int4"), Variant("int4", double_quant=True)),
]


def summary(rows: list[dict]) -> dict:
    losses = {
        str(variant._replace(levels=None)): np.array(row["window_losses"])
        for variant, row in zip(SETTINGS, rows, strict=True)
    }
    kept = "perplexity", "bits_per_parameter", "relative_error", "entropy"
    settings = {name: {key: row[key] for key in kept} for name, row in zip(losses, rows, strict=True)}
    for name, loss in losses.items():
        settings[name]["more_nats_than_nf4"] = interval(loss - losses[str(BASE)])
    pairs = {f"{b} less {a}": interval(losses[str(b)] - losses[str(a)]) for a, b in PAIRS}
    return {"data": rows[0]["data"], "settings": settings, "more_nats": pairs}


def table(result: dict) -> str:
    lines = []
    for name, row in result["settings"].items():
        what = f"{name:38} {row['bits_per_parameter']:7.4f} bits  perplexity {row['perplexity']:8.3f}"
        lines.append(f"{what}  {text_of(row['more_nats_than_nf4'])}")
    return "\n".join(lines + [f"{name}: {text_of(estimate)}" for name, estimate in result["more_nats"].items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 windows of 64 tokens")
    parser.add_argument("--out", type=Path, default=HERE / "data_types.json", help="default: bench/data_types.json")
    rows_file = Path(tempfile.gettempdir()) / "qlora-lab" / "bench_data_types.jsonl"
    parser.add_argument("--results", type=Path, default=rows_file, help=f"default: {rows_file}")
    args = parser.parse_args()
    if args.quick and args.out == HERE / "data_types.json":
        parser.error("--quick needs --out: its figures mean nothing")
    windows, length = (2, 64) if args.quick else (64, 512)
    rows = ql.sweep(MODEL, SETTINGS, args.results, windows=windows, length=length)
    head = {"date": datetime.date.today().isoformat(), "model": rows[0]["model"], "versions": versions()}
    head |= {"windows": windows, "length": length}
    result = head | summary(rows)
    write(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
