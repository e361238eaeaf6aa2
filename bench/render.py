"""From the JSON of bench/cpu.py: a table for the terminal, a picture, part of docs/speed.md. No figure is typed."""

import json
from pathlib import Path

from bench.files import between, write

BEGIN, END = "<!-- made by bench/cpu.py -->", "<!-- end -->"
PEER = "bitsandbytes"
# row of the page -> where it is found: work, shape, dtype, tokens, which library to compare with
ROWS = {
    "quantise 4096 x 4096, float32": ("quantise", (4096, 4096), "float32", None, PEER),
    "dequantise 576 x 1536 into a buffer, float32": ("dequantise", (576, 1536), "float32", None, PEER),
    "dequantise 576 x 1536 into a buffer, bf16": ("dequantise", (576, 1536), "bfloat16", None, PEER),
    "dequantise 4096 x 4096 into a buffer, float32": ("dequantise", (4096, 4096), "float32", None, PEER),
    "dequantise 4096 x 4096 into a buffer, bf16": ("dequantise", (4096, 4096), "bfloat16", None, PEER),
    "layer 4096 x 4096, 1 token, bf16, its packed inference path": (
        "forward", (4096, 4096), "bfloat16", 1, f"{PEER}, eval"),
    "layer 4096 x 4096, 8 tokens, bf16, its packed inference path": (
        "forward", (4096, 4096), "bfloat16", 8, f"{PEER}, eval"),
    "layer 4096 x 4096, forward and backward, 256 tokens, bf16": (
        "forward and backward", (4096, 4096), "bfloat16", 256, PEER),
    "the same, 2048 tokens, bf16": ("forward and backward", (4096, 4096), "bfloat16", 2048, PEER),
    "the same, 256 tokens, float32": ("forward and backward", (4096, 4096), "float32", 256, PEER),
    "the same, 2048 tokens, float32": ("forward and backward", (4096, 4096), "float32", 2048, PEER),
    "LoRA step of a LLaMA-7B layer, 256 tokens, bf16": ("LoRA layer step", (4096, 11008), "bfloat16", 256, PEER),
    "LoRA step of a LLaMA-7B layer, 256 tokens, float32": ("LoRA layer step", (4096, 11008), "float32", 256, PEER),
}  # fmt: skip


def find(rows: list[dict], work: str, shape: tuple, dtype: str, tokens: int | None) -> dict | None:
    wanted = {"work": work, "shape": list(shape), "dtype": dtype, "tokens": tokens}
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def ratio(row: dict, name: str) -> float:
    return row["seconds"][name]["median"] / row["seconds"]["ours"]["median"]


def seconds(value: float) -> str:
    return f"{value:.2g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def table(result: dict) -> str:
    """Every row, every contender: median with quartiles, and its time over ours."""
    lines = [f"{result['processor']}, {result['date']}"]
    for allocator, rows in result["allocators"].items():
        lines.append(f"\n{allocator} allocator")
        for row in rows:
            facts = ", ".join(str(row[key]) for key in ("dtype", "tokens") if key in row)
            lines.append(f"{row['work']}, {' x '.join(map(str, row['shape']))}, {facts}")
            for name, s in row["seconds"].items():
                spread = f"{seconds(s['low'])} to {seconds(s['high'])}"
                peak = row.get("peak_bytes", {}).get(name)
                memory = f"  peak +{peak / 2**20:.0f} MiB" if peak is not None else ""
                lines.append(f"  {name:20} {seconds(s['median']):>9}  ({spread})  x {ratio(row, name):.2f}{memory}")
    lines.append("\ncold start")
    for name, value in result["cold_start"].items():
        shown = seconds(value) if isinstance(value, float) else f"{seconds(value[0])}, cached {seconds(value[1])}"
        lines.append(f"  {name:30} {shown}")
    return "\n".join(lines)


def _mentioned(result: dict) -> list[tuple[str, list[dict | None], str]]:
    mentioned = []
    for label, (work, shape, dtype, tokens, peer) in ROWS.items():
        rows = [find(result["allocators"][name], work, shape, dtype, tokens) for name in ("stock", "recycling")]
        if any(rows):
            mentioned.append((label, rows, peer))
    return mentioned


def section(result: dict) -> str:
    """The section of docs/speed.md, in Markdown."""
    versions = result["versions"]
    lines = [
        f"Measured on {result['date']}: {result['processor']}, torch {versions['torch']}, {PEER} {versions[PEER]}, "
        f"torchao {versions['torchao']}, in turn in one process. Times are medians for NF4, block size 64, double "
        "quantization; a ratio is their time over ours. Under the stock allocator, much of a ratio is the cost of "
        f"fresh memory, which {PEER} requests for each result, and QLoRA Lab only to quantise. "
        "The last column is the ratio when the C library "
        "recycles memory, as `qlora-lab finetune` makes it do.",
        "",
        f"| work | ours | {PEER} | ratio | ratio, recycling |",
        "|---|---|---|---|---|",
    ]
    for label, (stock, recycling), peer in _mentioned(result):
        times = [seconds(stock["seconds"][name]["median"]) for name in ("ours", peer)]
        lines.append(f"| {label} | {times[0]} | {times[1]} | {ratio(stock, peer):.2f} | {ratio(recycling, peer):.2f} |")
    lines += ["", *_floors(result), "", f"![{alt(result)}](../bench/cpu.png)", "", _cold(result)]
    return "\n".join(lines)


def _floors(result: dict) -> list[str]:
    stock = result["allocators"]["stock"]
    clauses = []
    for dtype in ("float32", "bfloat16"):
        if row := find(stock, "dequantise", (4096, 4096), dtype, None):
            clauses.append(f"a {dtype} dequantise takes {1 / ratio(row, 'fill'):.2f} times a fill of the same buffer")
        if row := find(stock, "forward", (4096, 4096), dtype, 256):
            clauses.append(
                f"a {dtype} forward of 256 tokens {1 / ratio(row, 'ready weight'):.2f} times one with a ready weight"
            )
        if row := find(stock, "LoRA layer step", (4096, 11008), dtype, 256):
            clauses.append(f"the {dtype} layer step {1 / ratio(row, 'unquantised'):.2f} times the unquantised layer's")
    opening = "Compared with the least possible work, under the stock allocator: "
    text = opening + "; ".join(clauses) + "." if clauses else ""
    row = find(stock, "forward and backward", (11008, 4096), "bfloat16", 256)
    if row and all((row.get("peak_bytes") or {}).values()):
        mine, theirs = (row["peak_bytes"][name] / 2**20 for name in ("ours", PEER))
        work = "11008 x 4096, 256 tokens, bf16"
        text += f" Rise in peak memory, {work}: ours {mine:.0f} MiB, {PEER} {theirs:.0f} MiB."
    return [text]


def _cold(result: dict) -> str:
    cold = result["cold_start"]
    first = {name: value for name, value in cold.items() if isinstance(value, list)}
    compiling, cached = (sum(value[i] for value in first.values()) for i in (0, 1))
    return (
        f"Cold start: the first calls of four common kernels take {compiling:.0f} s in all, with importing and "
        f"compiling. At the next start they take {cached:.1f} s, from the disk. Importing torch takes "
        f"{cold['import torch']:.1f} s; after it, numba {cold['import numba, after torch']:.1f} s, {PEER} "
        f"{cold['import bitsandbytes, after torch']:.1f} s. "
        "Everything measured: [bench/cpu.json](../bench/cpu.json)."
    )


def alt(result: dict) -> str:
    bars = "; ".join(f"{label}: {ratio(rows[0], peer):.1f}" for label, rows, peer in _mentioned(result) if rows[0])
    return f"Left: time against number of weights on logarithmic axes. Right: their time over ours. {bars}"


def picture(result: dict, path: Path) -> None:
    """Cost against size, log-log, and ratio bars for both allocators."""
    from qlora_lab.show.figure import COLOURS, new_figure  # matplotlib: a bare machine that only measures has none

    fig, (left, right) = new_figure(2, width=11, height=4.6)
    names = {"ours": "blue", PEER: "orange", "torchao": "green", "fill": "grey"}
    stock = result["allocators"]["stock"]
    for work, style in (("quantise, growth", "-"), ("dequantise, growth", "--")):
        rows = [row for row in stock if row["work"] == work]
        for name, colour in names.items():
            points = [(row["shape"][0], row["seconds"][name]["median"]) for row in rows if name in row["seconds"]]
            if points:
                label = f"{name}, {work.split(',')[0]}"
                left.loglog(
                    *zip(*points, strict=True), style, color=COLOURS.get(colour, "0.6"), label=label, marker="."
                )
    left.set(xlabel="weights", ylabel="seconds", title="float32, stock allocator")
    if left.has_data():
        left.legend(fontsize=7, frameon=False, handlelength=4)
    mentioned = _mentioned(result)
    for offset, index, colour, label in ((-0.2, 0, "blue", "stock allocator"), (0.2, 1, "sky", "recycling")):
        values = [ratio(rows[index], peer) if rows[index] else 0 for _, rows, peer in mentioned]
        right.barh([i + offset for i in range(len(values))], values, 0.4, color=COLOURS[colour], label=label)
    right.axvline(1, color="black", linewidth=0.8)
    right.set(xscale="log", title=f"{PEER}' time over ours", yticks=range(len(mentioned)))
    right.set_yticklabels([label for label, *_ in mentioned], fontsize=7)
    right.invert_yaxis()
    right.legend(fontsize=7, frameon=False)
    fig.savefig(path, metadata={"Software": None})


def in_page(text: str, result: dict) -> str:
    """Renew the section between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(result) + "\n", "docs/speed.md")


def render(json_file: Path, page: Path | None) -> None:
    """Print the table and write the picture and, if there is a page, its section."""
    result = json.loads(json_file.read_text())
    print(table(result))
    picture(result, json_file.with_suffix(".png"))
    if page:
        write(page, in_page(page.read_text("utf-8"), result))
