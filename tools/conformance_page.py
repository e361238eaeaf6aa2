"""Write docs/conformance.md: the verdicts of `qlora-lab conformance`, and why each difference is one.

    python -m tools.conformance_page       half a minute; torchao has to be importable (docs/conformance.md says how)

In: data/conformance, run through every backend. Out: the page. A test compares the sections of the backends that are
installed with what they do there.
"""

from pathlib import Path

from qlora_lab.export.backends import BACKENDS, OURS
from qlora_lab.export.conformance import REFUSED, Report, conformance

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
COMMAND = "python -m tools.conformance_page"
HEAD = f"""# Are the bytes those of bitsandbytes?

`qlora-lab conformance` answers this with golden vectors: 76 inputs, with the bytes and values that each becomes in 4 \
bits. They cover every data type, block size, weight dtype and storage dtype, double quantization, zeros of both \
signs, ties, subnormals, outliers, partial blocks, odd lengths, NaN and infinity. The expected values were computed in \
exact arithmetic, without any of the implementations. The files and a small reader are in `data/conformance`, so other \
projects can use them; the README there describes them.

```
qlora-lab conformance                          # every installed backend, half a minute
qlora-lab conformance --backend bitsandbytes   # one backend; --json prints every verdict
```

- **bytes equal**: every byte is as expected and decodes to the expected value.
- **values equal**: some bytes differ, but they decode to the expected values.
- **differs**: some values differ.
- **refused**: the implementation reports an error of its own instead of a result. This is right for NaN and infinity.
- **crashed**: it fails in any other way.

Zeros of either sign count as equal. The command exits with 1 if a verdict is not as expected and the reason is not \
known.

`{COMMAND}` writes this page, and a test fails if the page is out of date. torchao is not a dependency; to judge it, \
run `pip install --no-deps torchao==0.18.0`. Its reasons are known for 0.18 only.

| backend | what it is |
|---|---|
| `reference` | the readable functions of QLoRA Lab |
| `cpu` | its compiled kernels; `cpu-plain` is the version for CPUs that cannot look up 16 codes at once |
| `triton` | its GPU kernels in Triton's interpreter, on the CPU |
| `bitsandbytes`, `torchao` | on the CPU |
"""
TAIL = """
## bitsandbytes on a GPU

These differences come from reading the source of bitsandbytes 0.50.2; they were not measured:

- A block of zeros gets code 0 instead of 7, because 0 times infinity is NaN, which compares as false with every \
midpoint. The block decodes to -0.
- FP4's midpoints are written with few decimals, and five of the seven are not the float32 midpoints. Ties go towards \
zero.
- Of FP4's two zeros, code 8 is used for weights that round to zero from below, as in these vectors.
- The reciprocal of the constant is approximate (`--use_fast_math`), so a weight near a midpoint can get another code.
- The 8-bit codes of nested constants are exact.
"""


def page(reports: list[Report]) -> str:
    """The page as Markdown. Implementations of ours whose verdicts are equal share a section."""
    groups = {}
    for report in reports:
        key = "ours" if report.backend in OURS else report.backend, report.verdicts
        groups.setdefault(key, []).append(report)
    return HEAD + "".join(section(group) for group in groups.values()) + TAIL


def section(reports: list[Report]) -> str:
    """One part: how many verdicts of each kind, and a table of those that are not right."""
    report = reports[0]
    ours = ", ".join(one.backend for one in reports)
    name = f"QLoRA Lab: {ours}" if report.backend in OURS else f"{report.backend} {report.version}"
    rows = "".join(_row(why, verdicts) for why, verdicts in report.by_reason().items())
    right = sum(verdict.is_right for verdict in report.verdicts)
    summary = f"{right} of {len(report.verdicts)} cases are as expected. {report.counted}."
    return f"\n## {name}\n\n{summary}\n\n| cases | verdict | why |\n|---|---|---|\n{rows}"


def _row(why: str, verdicts: list) -> str:
    """What differs is counted in a short list of cases; a long one would hide the reason."""
    few = len(verdicts) <= 6 and verdicts[0].verdict != REFUSED
    cases = ", ".join(f"`{one.case}`{few * _counted(one.detail)}" for one in verdicts)
    return f"| {cases} | {verdicts[0].verdict} | {why or 'no reason is known'} |\n"


def _counted(detail: str) -> str:
    """The numbers of a verdict's detail, in parentheses."""
    numbers = "; ".join(part for part in detail.split("; ") if part[0].isdigit())
    return f" ({numbers})" if numbers else ""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page([conformance(name) for name in BACKENDS]), encoding="utf-8")


if __name__ == "__main__":
    main()
