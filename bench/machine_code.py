"""Count the instructions of the compiled GPU kernels, and of bitsandbytes'. No GPU is needed; no time is measured.

python bench/machine_code.py              compile, count, write machine_code.json and a section of docs/gpu.md; a minute
python bench/machine_code.py --render     only the section, from machine_code.json
"""

import argparse
import datetime
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import between, write  # noqa: E402
from bench.render import PEER  # noqa: E402
from qlora_lab.gpu_code import aot  # noqa: E402
from qlora_lab.gpu_code.machine_code import widths  # noqa: E402

BEGIN, END = "<!-- kernels -->", "<!-- /kernels -->"
ARCH = 90
DTYPES = ("bfloat16", "float32")  # what docs/gpu.md shows


def count() -> dict:
    """Versions, date, and a record of every rung, and of bitsandbytes' kernels, for each architecture and dtype."""
    ours, theirs = [], []
    for dtype in aot.DTYPES:
        ours += aot.report(None, aot.ARCHS, dtype, progress=True)
        for arch in aot.ARCHS:
            reports, why = aot.bitsandbytes_report(arch, dtype)
            if reports is None:
                sys.exit(why)
            theirs += reports
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("triton", PEER)},
        "ours": records(ours),
        PEER: records(theirs),
    }


def records(reports: list[aot.Report]) -> list[dict]:
    """Each kernel once, as plain data. Kernels of constants are float32 whatever dtype was requested."""
    once = {(report.rung, report.kernel, report.arch, report.dtype): report for report in reports}
    return [{key: _rounded(value) for key, value in asdict(report).items()} for report in once.values()]


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items() if part}
    return round(value, 4) if isinstance(value, float) else value


def find(rows: list[dict], rung: str, dtype: str) -> dict | None:
    """The first record of a rung for ARCH."""
    only = aot.RUNGS[rung].dtypes
    dtype = only[0] if len(only) == 1 else dtype
    return next((row for row in rows if (row["rung"], row["arch"], row["dtype"]) == (rung, ARCH, dtype)), None)


def bits(row: dict) -> str:
    return " / ".join(", ".join(map(str, side)) for side in widths(row["accesses"]))


def section(result: dict) -> str:
    """The section of docs/gpu.md, in Markdown."""
    versions = result["versions"]
    lines = [
        "These are counts of instructions in compiled code, not times. On "
        f"{result['date']} Triton {versions['triton']} compiled the kernels for sm_{ARCH} (H100, H200), and {PEER} "
        f"{versions[PEER]} was disassembled as installed. A figure is the number of instructions that one thread "
        "executes for each weight of a full tile; for a loop, in one pass. Where the threads of a warp diverge, the "
        "shorter side is counted, for both libraries. Registers, spills and bits (of global loads / stores) "
        "belong to the first figure of a row.",
        "",
        f"| kernel | bf16 | {PEER} | float32 | {PEER} | registers | spills | bits | {PEER} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rung in aot.RUNGS:
        pairs = [(find(result["ours"], rung, dtype), find(result[PEER], rung, dtype)) for dtype in DTYPES]
        record, peer = pairs[0]
        if len(aot.RUNGS[rung].dtypes) == 1:  # float32, which is listed once
            pairs[0] = None, None
        figures = [f"{row['per_weight']:.1f}" if row else "" for pair in pairs for row in pair]
        cells = [f"`{rung}`", *figures, record["registers"], record["spills"], bits(record), bits(peer) if peer else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "`double_quantize` and `double_dequantize` count for each constant, `adamw_8bit` for each parameter; "
        f"`gemv_nf4` multiplies one token. {PEER} decodes quantised constants in another launch, which is not counted "
        "beside `dequantize_double`. All figures, for sm_80, sm_90 and sm_100 and three dtypes: "
        "`bench/machine_code.json`; one at a time: `qlora-lab kernels --compare`.",
    ]
    return "\n".join(lines)


def in_page(text: str, result: dict) -> str:
    """Renew the section between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(result) + "\n", "docs/gpu.md")


def as_json(result: dict) -> str:
    """JSON with one record per line."""
    parts = [f'"{key}": {json.dumps(result[key])}' for key in ("date", "versions")]
    for key in ("ours", PEER):
        parts.append(f'"{key}": [\n' + ",\n".join(map(json.dumps, result[key])) + "\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="do not compile: read machine_code.json")
    file = HERE / "machine_code.json"
    page = HERE.parent / "docs" / "gpu.md"
    if not parser.parse_args().render:
        write(file, as_json(count()))
    result = json.loads(file.read_text("utf-8"))
    print(section(result))
    write(page, in_page(page.read_text("utf-8"), result))


if __name__ == "__main__":
    main()
