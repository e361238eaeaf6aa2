"""Measure a mix of block sizes on text that was not used to choose it: loss, and bits saved at equal loss.

    python bench/block_size.py                     SmolLM2-135M; five minutes, writes block_size.json
    python bench/block_size.py --quick --out FILE  few windows: to see that it runs

Calibrated (Fisher) on 12 windows of 256 tokens spread over the second half of Python's help topics, judged on 64 of the
first. Constants are float32. "nf4" chooses a block size from 32 to 1024 for each layer; "any type" also chooses among
nf3, int5, int6 and int8. Every model reads the same windows, so intervals are those of differences: 95 %, by a
bootstrap over windows. Bits saved at the loss of block size 64 everywhere lie on a line between two measured budgets.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import qlora_lab as ql  # noqa: E402
from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from qlora_lab.measure.best_plan import Candidate, Choices, Plan, best_plan, uniform  # noqa: E402
from qlora_lab.measure.perplexity import text_windows, topics_text, window_losses  # noqa: E402
from qlora_lab.measure.sensitivity import choices_of  # noqa: E402

MODEL = "smollm2-135m"
LENGTH = 256
DRAWS = 10_000
SIZES = (32, 64, 128, 256, 512, 1024)
TYPES = ("nf4", "nf3", "int5", "int6", "int8")
BASE = Candidate("nf4", 64, False)
BASE_BITS = 4 + 32 / BASE.block_size
BUDGETS = {"nf4": (4.5, 4.25, 4.125), "any type": (4.5, 4.25, 4.0)}
BETWEEN = {"nf4": (4.125, 4.25), "any type": (4.0, 4.25)}  # budgets on both sides of BASE's loss


def plans(calibration: str, windows: int, length: int, types: tuple[str, ...]) -> dict[str, Plan]:
    """Name -> plan, for the mixes and for three uniform block sizes."""
    model, tokenizer = ql.load(MODEL, None, dtype=torch.float32, progress=False)
    every = text_windows(tokenizer, calibration, length, 18 * windows)[::18]  # from many topics
    batches = [{"input_ids": row[None]} for row in every]
    s = ql.sensitivity(model, None, batches, fisher=True)
    chosen = {}
    for name, allowed in (("nf4", types[:1]), ("any type", types)):
        choices: Choices = choices_of(model, [Candidate(t, size, False) for t in allowed for size in SIZES], s)
        chosen |= {f"{name}, {budget} bits": best_plan(choices, budget) for budget in BUDGETS[name]}
    chosen |= {f"nf4/{size} for all": uniform(choices, Candidate("nf4", size, False)) for size in (32, 64, 128)}
    return chosen


def judge(chosen: dict[str, Plan], text: str, windows: int, length: int) -> dict[str, np.ndarray]:
    """Name -> mean loss of each window in nats per token, (windows,); also of the unquantised model."""
    losses = {}
    for name, plan in tqdm({"not quantised": None, **chosen}.items(), "judging", unit="model"):
        options = {"codebook": None} if plan is None else {"plan": plan}
        model, tokenizer = ql.load(MODEL, dtype=torch.float32, progress=False, **options)
        rows = text_windows(tokenizer, text, length, windows)
        losses[name] = np.array(window_losses(model, rows, progress=False))
    return losses


def summary(losses: dict[str, np.ndarray], chosen: dict[str, Plan]) -> dict:
    base = losses["nf4/64 for all"]
    draws = draws_of(len(base))
    rows = {}
    for name, loss in losses.items():
        rows[name] = {"perplexity": float(np.exp(loss.mean())), "more_nats": interval(loss - base)}
        if name in chosen:
            rows[name] |= {"bits": chosen[name].bits_per_parameter, "expected_nats": chosen[name].error}
    saved = {}
    for name, (low, high) in BETWEEN.items():
        below, above = (losses[f"{name}, {budget} bits"] - base for budget in (low, high))  # the former loses more

        def bits(windows: np.ndarray, below=below, above=above, low=low, high=high) -> np.ndarray:
            loss_below = below[windows].mean(-1)
            loss_above = above[windows].mean(-1)
            return BASE_BITS - (low + (high - low) * loss_below / (loss_below - loss_above))

        low_end, high_end = np.percentile(bits(draws), [2.5, 97.5])
        saved[name] = {"bits": float(bits(np.arange(len(base)))), "low": float(low_end), "high": float(high_end)}
    return {"models": rows, "bits_saved_at_the_loss_of_64_for_all": saved}


def draws_of(windows: int) -> np.ndarray:
    """Indices of windows, drawn with replacement: (DRAWS, windows)."""
    return np.random.default_rng(0).integers(0, windows, (DRAWS, windows))


def interval(difference: np.ndarray) -> dict[str, float]:
    """Mean of the (windows,) differences, and the interval that holds it in 95 % of the draws of windows."""
    low, high = np.percentile(difference[draws_of(len(difference))].mean(-1), [2.5, 97.5])
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def text_of(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:+.4f} ({estimate['low']:+.4f} to {estimate['high']:+.4f})"


def table(result: dict) -> str:
    lines = []
    for name, row in result["models"].items():
        lines.append(f"{name:22} {row['perplexity']:8.3f}  {text_of(row['more_nats'])}")
    for name, s in result["bits_saved_at_the_loss_of_64_for_all"].items():
        lines.append(f"bits saved, {name}: {s['bits']:.3f} ({s['low']:.3f} to {s['high']:.3f})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two data types, 2 short windows for calibration, 3 to judge"
    )
    parser.add_argument("--out", type=Path, default=HERE / "block_size.json", help="default: bench/block_size.json")
    args = parser.parse_args()
    if args.quick and args.out == HERE / "block_size.json":
        parser.error("--quick needs --out: its figures mean nothing")
    calibrated, judged, length = (2, 3, 64) if args.quick else (12, 64, LENGTH)
    text = topics_text()
    chosen = plans(text[len(text) // 2 :], calibrated, length, TYPES[:2] if args.quick else TYPES)
    results = summary(judge(chosen, text[: len(text) // 2], judged, length), chosen)
    head = {"date": datetime.date.today().isoformat(), "model": MODEL, "versions": versions()}
    head |= {"calibration_windows": calibrated, "windows": judged, "length": length}
    write(args.out, json.dumps(head | results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
