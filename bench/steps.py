"""From train_step.json and seven_b.json to the section on steps in docs/speed.md. No figure is typed.

python bench/steps.py      renew the section, as both benches do after they write their JSON
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import between, write  # noqa: E402

BEGIN, END = "<!-- made by bench/steps.py -->", "<!-- end of steps -->"
PAGE = HERE.parent / "docs" / "speed.md"
TRAIN_STEP, SEVEN_B = "train_step.json", "seven_b.json"
MIB, GIB = 2**20, 2**30


def stored(file: Path) -> list[dict]:
    """Results of a bench, one for each processor that it ran on."""
    return json.loads(file.read_text("utf-8")) if file.exists() else []


def of_processor(file: Path, processor: str) -> dict | None:
    return next((result for result in stored(file) if result["processor"] == processor), None)


def keep(file: Path, result: dict) -> None:
    """Write `result` into the file, in the place of an earlier one of its processor."""
    others = [other for other in stored(file) if other["processor"] != result["processor"]]
    write(file, json.dumps([*others, result], indent=1) + "\n")


def section(steps: list[dict], seven_b: dict) -> str:
    """The section of docs/speed.md, in Markdown."""
    parts = [part for result in steps for part in (*_steps(result), "")]
    return "\n".join([*parts, *_seven_b(seven_b), ""])


def _steps(result: dict) -> list[str]:
    dates = sorted({case["date"] for case in result["cases"]})
    versions = result["versions"]
    lines = [
        f"Measured on {' and '.join(dates)}: {result['processor']}, torch {versions['torch']}, PEFT {versions['peft']} "
        f"over bitsandbytes {versions['bitsandbytes']}. The work is a step of SmolLM2-135M in bf16, 4 x 256 tokens, "
        "LoRA r = 16 on all linear layers. The contenders run in turn, each in a process of its own; figures are "
        "medians. A ratio is their time over ours. Peak memory is counted above the loaded model.",
        "",
        "| step | | tokens/s | ratio | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        label = f"{case['labels']} of {case['tokens']} tokens learned" + ", checkpointing" * case["checkpointing"]
        label += f" ({case['date']})" * (len(dates) > 1)
        for name, ratio in case["ratio"].items():
            peak = case["peak_bytes"][name]
            memory = "" if peak is None else f"{peak / MIB:.0f}"
            speed = case["tokens_per_second"][name]
            lines.append(f"| {label} | {name} | {speed:.0f} | {ratio['median']:.2f} | {memory} |")
            label = ""
    (groups,) = [case["profile"]["ours"] for case in result["cases"] if "profile" in case]
    shares = ", ".join(f"{name} {seconds / sum(groups.values()):.0%}" for name, seconds in groups.items())
    words = (
        'PEFT is "prepared" by its own function, which converts to float32 whatever is not quantised, or used "as '
        'loaded". "recycled" means that the C library recycles memory, as `qlora-lab finetune` makes it do. '
        f'"unquantised" is our step on a bf16 model. The time of our first step goes to: {shares}.'
    )
    return [*lines, "", words]


def _seven_b(result: dict) -> list[str]:
    s = result["stages"]
    load, step, mapped, answer = s["load"], s["step"], s["map_again"], s["answer"]
    original = load["MB per core-second"] * load["core_seconds"] / 1e3
    return [
        f"A LLaMA of 7B parameters on {result['machine']} ({result['model']}, {result['date']}, `bench/seven_b.py`): "
        f"loading and quantising its {original:.1f} GB takes {load['seconds']:.0f} s and at most "
        f"{load['peak_bytes_above_import'] / GIB:.2f} GiB above the imports ({load['MB per core-second']:.0f} MB per "
        f"core-second); quantising it to disk takes {s['quantise']['seconds']:.0f} s and "
        f"{s['quantise']['peak_bytes_above_import'] / GIB:.2f} GiB; mapping that folder "
        f"({mapped['folder_bytes'] / GIB:.2f} GiB) {mapped['seconds']:.2f} s. One training step of {step['tokens']} "
        f"tokens, r = {step['r']}, gradient checkpointing: {step['seconds']:.0f} s, {step['over_floor']:.2f} times the "
        f"matrix products that it cannot avoid, and at most {step['peak_bytes'] / GIB:.2f} GiB. "
        f"An answer of {answer['most_tokens']} tokens takes {answer['seconds']:.0f} s."
    ]


def in_page(text: str, step: list[dict], seven_b: dict) -> str:
    """Renew the section between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(step, seven_b), "docs/speed.md")


def render() -> None:
    """Renew docs/speed.md from the two files."""
    seven_b = json.loads((HERE / SEVEN_B).read_text("utf-8"))
    write(PAGE, in_page(PAGE.read_text("utf-8"), stored(HERE / TRAIN_STEP), seven_b))


if __name__ == "__main__":
    render()
