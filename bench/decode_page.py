"""From decode.json to the section on answers in docs/speed.md. No figure is typed.

python bench/decode_page.py      renew the section, as bench/decode.py does after it writes its JSON
"""

import json
import sys
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.files import between, write  # noqa: E402

BEGIN, END = "<!-- made by bench/decode.py -->", "<!-- end of answers -->"
PAGE = HERE.parent / "docs" / "speed.md"
STORED = HERE / "decode.json"
OURS = "ours", "ours, int8"  # whose bytes are those of the floor


def section(result: dict) -> str:
    """The section of docs/speed.md, in Markdown: a table for each machine."""
    machines = groupby(result["rows"], key=lambda row: row["processor"])
    return "\n".join(_machine([*rows]) for _, rows in machines)


def _machine(rows: list[dict]) -> str:
    named = [row for row in rows if "shape" not in row]  # of a model that can be fetched
    large = [_large(row) for row in rows if "shape" in row]
    return "\n\n".join([*([_table(named)] if named else []), *large]) + "\n"


def _table(named: list[dict]) -> str:
    short, long, batch = (next(row for row in named if test(row)) for test in (_is_short, _is_long, _is_batch))
    words = [
        f"Measured on {short['date']}: {short['processor']}, torch {short['torch']}{_versions(short)}. Greedy answers "
        f"of {short['model']}, all contenders in turn with {short['threads']} threads; figures are medians. A prompt's "
        "time holds its first token.",
        "",
        f"| | prompt of {short['prompt']}, ms | a token after it, ms | tokens/s | prompt of {long['prompt']}, ms |",
        "|---|---|---|---|---|",
    ]
    for name, of in short["contenders"].items():
        first, token = _ms(of["first"]), _ms(of["token"])
        speed = 1 / of["token"]["median"]
        words.append(f"| {name} | {first} | {token} | {speed:.0f} | {_ms(long['contenders'][name]['first'])} |")
    one, many = (of["token"]["median"] for of in batch["contenders"].values())
    (label,) = [name.removeprefix("ours, ") for name in batch["contenders"] if name != "ours"]
    words += [
        "",
        f"A token reads {short['bytes'] / 1e6:.0f} MB, which a copy in the same rounds moves in {_ms(short['floor'])} "
        f"ms. A step of {label} takes {many / one:.1f} times one of a single row.",
    ]
    return "\n".join(words)


def _is_short(row: dict) -> bool:
    return row["tokens"] > 1 and not _is_batch(row)


def _is_long(row: dict) -> bool:
    return row["tokens"] == 1


def _is_batch(row: dict) -> bool:
    return any(name.endswith(" rows") for name in row["contenders"])


def _ms(spread: dict) -> str:
    ms = spread["median"] * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _versions(row: dict) -> str:
    releases = sorted({of["version"] for of in row["programs"].values()})
    return "".join(f", node-llama-cpp {version}" for version in releases)


def _large(row: dict) -> str:
    floor = row["floor"]["median"]
    parts = [
        f"{name}: {of['token']['median'] * 1e3:.0f} ms a token"
        + (f" ({floor / of['token']['median']:.0%} of the speed at which a copy moves its bytes)" * (name in OURS))
        + f", {of['first']['median']:.1f} s for the prompt"
        for name, of in row["contenders"].items()
    ]
    return (
        f"A model with the shape of Llama-2-7B ({row['shape']['num_hidden_layers']} layers, {row['model']}, "
        f"{row['processor']}, {row['date']}), {row['tokens']} tokens after a prompt of {row['prompt']}: "
        f"{'; '.join(parts)}."
    )


def in_page(text: str, result: dict) -> str:
    """Renew the section between the two marks of `text`. Raises ValueError if a mark is missing."""
    return between(text, BEGIN, END, section(result), "docs/speed.md")


def render() -> None:
    """Renew docs/speed.md from the file."""
    write(PAGE, in_page(PAGE.read_text("utf-8"), json.loads(STORED.read_text("utf-8"))))


if __name__ == "__main__":
    render()
