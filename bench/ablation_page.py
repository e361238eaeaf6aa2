"""Write docs/ablations.md from the rows of data/ablations.jsonl: tables, and the slides' claims with their verdicts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.ablation_settings import GROUPS, LOOKED_AT, RATES, STEPS, TRIED, method_of  # noqa: E402
from bench.files import between, write  # noqa: E402
from qlora_lab.measure.ablations import (  # noqa: E402
    MARGIN,
    NOISE,
    SEEN,
    Interval,
    by_setting,
    paired,
    read_ablations,
    size_is_open,
    summary,
    surviving,
    verdict,
)

PAGE = HERE.parent / "docs" / "ablations.md"
BEGIN, END = "<!-- made by bench/ablations.py -->", "<!-- end -->"
MIB = 2**20
SUFFIX = ", 60 steps"


@dataclass(frozen=True)
class Claim:
    """A claim about the loss of `setting` beside that of `reference`."""

    words: str
    setting: str
    reference: str
    kind: str  # as verdict takes it


LORA, LORA_4, SMALL_LORA = "lora r=16", "lora r=16, nf4+dq", "lora r=1, four kinds of layer"
CLAIMS = [
    Claim("LoRA converges to full fine-tuning", LORA, "full", "same"),
    Claim("4-bit matches 16-bit", LORA_4, LORA, "same"),
    Claim("NF4 beats FP4", "lora r=16, nf4", "lora r=16, fp4", "lower"),
    Claim("double quantization costs nothing", LORA_4, "lora r=16, nf4", "same"),
]
CLAIMS += [
    Claim("all layers must be tuned, at equal rank", f"lora r=16, {layers}", LORA, "higher")
    for layers in ("query and value", "attention", "feed-forward")
]
CLAIMS += [
    Claim("all layers must be tuned, at equal parameters", name, LORA, "higher")
    for name in ("lora r=85, query and value", "lora r=42, attention", "lora r=26, feed-forward")
]
CLAIMS += [Claim("rank hardly matters", f"lora r={r}", LORA, "same") for r in (2, 8, 64)]
CLAIMS += [
    Claim(f"{words} beats LoRA", name, LORA, "lower")
    for words, name in (("DoRA", "dora r=16"), ("PiSSA", "pissa r=16"))
]
CLAIMS += [Claim("LoftQ beats LoRA", "loftq r=16, nf4+dq", LORA_4, "lower")]
CLAIMS += [Claim("LoRA+ beats LoRA", "lora+ r=16", LORA, "lower")]
CLAIMS += [
    Claim(f"{words} fall short of LoRA at equal parameters", name, reference, "higher")
    for words, name, reference in (
        ("Houlsby adapters", "houlsby size=70", LORA),
        ("prefixes", "prefix 424 tokens", LORA),
        ("prefixes", "prefix 14 tokens", SMALL_LORA),
        ("prompts", "prompt 270 tokens", SMALL_LORA),
        ("biases", "zero_bias", SMALL_LORA),
    )
]

# title, the setting that the others are compared with, settings
FOUR_BITS = [LORA_4, "loftq r=16, nf4+dq"]
FEW = [SMALL_LORA, "zero_bias", "prompt 270 tokens", "prefix 14 tokens"]
TABLES = [
    ("Methods, as many trainable parameters", LORA, [n for n in GROUPS["zoo"] if n not in (*FOUR_BITS, *FEW)]),
    ("Methods, as many trainable parameters as there are biases", SMALL_LORA, FEW),
    ("LoftQ, on 4 bits", LORA_4, FOUR_BITS),
    ("Methods, as much memory", LORA, GROUPS["memory"]),
    ("Which layers", LORA, GROUPS["layers"]),
    ("Rank", LORA, GROUPS["rank"]),
    ("Weights", LORA, GROUPS["weights"]),
    ("Learning rate", LORA, GROUPS["learning rate"]),
    ("Alpha", LORA, GROUPS["alpha"]),
    ("Dropout", LORA, GROUPS["dropout"]),
]


REVERSAL = (
    "Before training the order is another: FP4 starts lower than NF4, and even lower than the 16-bit weights that both "
    "were made from. The loss before is one number on 24 functions, so it has no interval. FP4's table is that of "
    "bitsandbytes (tests/quant/test_bitsandbytes.py), and its weights lie further from the 16-bit ones than NF4's: by "
    "12.5 % of the norm of the linear layers against 9.3 %. Why it starts lower is not known."
)


def section(rows: list[dict]) -> str:
    """The part of the page between its marks, in Markdown."""
    tables = [text for title, reference, names in TABLES if (text := table(rows, title, reference, names))]
    return "\n".join(filter(None, [about(rows), claims(rows), *tables, sixty(rows), rates(rows)]))


def about(rows: list[dict]) -> str:
    dates = sorted({row["date"][:10] for row in rows})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    processors = ", ".join(sorted({row["machine"]["processor"] for row in rows})).replace(" 1 threads", " 1 thread")
    config = rows[0]["config"]
    return (
        f"{len(rows)} runs of {rows[0]['model']['name']}, recorded on {days}: torch {rows[0]['versions']['torch']}, "
        f"{config['dtype']}, {processors}. A run makes {STEPS} steps of {config['batch_size']} docstrings of at most "
        f"{config['max_length']} tokens, at a constant learning rate. It is tested on {config['test_examples']} "
        "functions of matplotlib, which is not among the libraries that the runs learn from.\n"
    )


def claims(rows: list[dict]) -> str:
    """The table of claims, and which verdicts hold if all are judged together."""
    known = by_setting(rows)
    found = {c: paired(rows, c.setting, c.reference) for c in CLAIMS if c.setting in known and c.reference in known}
    holds = dict(zip(found, surviving(found.values()), strict=True))
    lines = ["## The slides' claims", ""]
    lines += [f"| claim | compared | difference in loss, nats | seeds | here | after Holm |\n{'|---' * 6}|"]
    for claim in CLAIMS:
        cells = "", "0", "no runs yet", ""
        if claim in found:
            difference = found[claim]
            cells = signed(difference), str(difference.n), said(difference, claim), "holds" if holds[claim] else ""
        lines.append(f"| {claim.words} | {claim.setting} minus {claim.reference} | {' | '.join(cells)} |")
    told = sum(verdict(difference, claim.kind) != NOISE for claim, difference in found.items())
    words = (
        f"{told} of {len(found)} differences can be told from noise one by one. If all are judged together, by Holm's "
        f"method at 5 %, {sum(holds.values()) or 'none'} can. Only the seeds and with them the order of the "
        "examples vary between the runs of a setting; the held-out functions are fixed."
    )
    return "\n".join([*lines, "", words, ""])


def said(difference: Interval, claim: Claim) -> str:
    """The verdict, and what it leaves open."""
    words = f"**{verdict(difference, claim.kind)}**"
    if size_is_open(difference):
        return f"{words}; its size is open"
    if claim.kind != "same" and verdict(difference, "same") == SEEN:
        return f"{words}: at most {MARGIN:g} apart"
    return words


def table(rows: list[dict], title: str, reference: str, names: list[str]) -> str:
    """One group of settings; empty until all of them were run."""
    known = by_setting(rows)
    if not {reference, *names} <= set(known):
        return ""
    before = ["before"] if names == GROUPS["weights"] else []
    heads = ["setting", "learning rate", "trainable", "memory, MiB", *before, "loss", f"minus {reference}", "ROUGE-L"]
    lines = [f"## {title}", "", f"| {' | '.join([*heads, 'seeds'])} |", "|---" * (len(heads) + 1) + "|"]
    for name in names:
        row = known[name][0]
        memory = "" if row["memory"] is None else f"{row['memory'] / MIB:,.0f}"
        rouge = plain(summary(rows, name, "rouge_l_after")) if row["rouge_l_after"] is not None else ""
        minus = "" if name == reference else signed(paired(rows, name, reference))
        cells = [name, rate(name, row), f"{row['trainable']:,}", memory]
        cells += [f"{row['loss_before']:.3f}"] if before else []
        cells += [plain(summary(rows, name)), minus, rouge, str(len(known[name]))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *([REVERSAL, ""] if before else [])])


def rate(name: str, row: dict) -> str:
    """The learning rate, and whether it was looked for with this very setting or is what the table varies."""
    chosen = name in LOOKED_AT or name in GROUPS["learning rate"]
    return f"{row['config']['lr']:g}" + ("" if chosen else ", rate not searched")


def sixty(rows: list[dict]) -> str:
    known = by_setting(rows)
    names = [name for name in GROUPS["sixty"] if name in known]
    if not names:
        return ""
    words = "One run of each method: the loss on the same held-out functions."
    if missing := "; ".join(name.removesuffix(SUFFIX) for name in GROUPS["sixty"] if name not in known):
        words += f" Not run for 60 steps: {missing}."
    lines = ["## Sixty steps", "", words, ""]
    lines += ["| setting | before | after | seed |", "|---|---|---|---|"]
    for name in names:
        row = known[name][0]
        short = name.removesuffix(SUFFIX)
        lines.append(f"| {short} | {row['loss_before']:.3f} | {row['loss_after']:.3f} | {row['seed']} |")
    return "\n".join([*lines, ""])


def rates(rows: list[dict]) -> str:
    """How the learning rates were chosen."""
    known = by_setting(rows)
    words = (
        "One run at each rate, with a seed that is not compared above: the loss afterwards. The best is used. DoRA, "
        "LoftQ and all 4-bit settings have the rate of LoRA on 16 bits; that of a prompt was looked for with 20 "
        "tokens, because 270 take five times as long. All other ranks, layers and sizes have the rate of their method."
    )
    lines = ["## The learning rates", "", words, "", "| setting | loss at each rate | used |", "|---|---|---|"]
    for name in LOOKED_AT:
        tried = {rate: known.get(f"{name}, lr {rate:g}, seed 0") for rate in TRIED[method_of(name)]}
        found = ", ".join(f"{found[0]['loss_after']:.3f} at {rate:g}" for rate, found in tried.items() if found)
        lines.append(f"| {name} | {found} | {RATES[method_of(name)]:g} |")
    return "\n".join([*lines, ""])


def best_rate(rows: list[dict], name: str) -> float:
    """The rate of the lowest loss in the search for `name`."""
    known = by_setting(rows)
    losses = {}
    for rate in TRIED[method_of(name)]:
        found = known[f"{name}, lr {rate:g}, seed 0"]
        losses[rate] = fmean(row["loss_after"] for row in found)
    return min(losses, key=losses.get)


def plain(found: Interval) -> str:
    return f"{found.mean:.3f} " + (f"({found.low:.3f} to {found.high:.3f})" if found.n > 1 else "(one seed)")


def signed(found: Interval) -> str:
    return f"{found.mean:+.3f} " + (f"({found.low:+.3f} to {found.high:+.3f})" if found.n > 1 else "(one seed)")


def in_page(text: str, rows: list[dict]) -> str:
    """Renew the section between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(rows), "docs/ablations.md")


def renew() -> None:
    write(PAGE, in_page(PAGE.read_text("utf-8"), read_ablations()))
