"""Say in words which merge to choose, from the reports of all that were made.

In: the reports of merges of one adapter, one for each target. Out: sentences with their measured numbers.
The rule: a merge whose verdict is "kept" (parity.py) keeps the fine-tuning. Of those the smallest is advised, and of
two in 16 bits `dequantised`, because it is what was trained.

Not here: which merge answers better on a task of yours (measure/held_out.py).
"""

from collections.abc import Iterable

from qlora_lab.export.parity import Parity

ORDER = ("requantised", "dequantised", "original")  # the first that passes is advised
BYTES = {"requantised": "half a byte", "dequantised": "two bytes", "original": "two bytes"}


def advice(reports: Iterable[Parity]) -> str:
    """Return a line for the target to choose and one for each report, in the order of ORDER.

    Raises ValueError without a report, and for two of one target.
    """
    by_target: dict[str, Parity] = {}
    for report in reports:
        if report.target in by_target:
            raise ValueError(f"two reports are of target {report.target!r}: give one for each target")
        by_target[report.target] = report
    if not by_target:
        raise ValueError("no report is given: give those that merge returns")
    ordered = [by_target[target] for target in ORDER if target in by_target]
    # A pass alone can be a change that cannot be told from rounding: no reason to choose a merge.
    best = next((report for report in ordered if report.verdict == "kept"), None)
    if best is None:
        chosen = "No merge keeps the fine-tuning: keep the adapter beside its 4-bit base."
    else:
        chosen = f"Choose {best.target}: it keeps the fine-tuning in {BYTES[best.target]} a weight."
    return "\n".join([chosen, *map(_sentence, ordered)])


def _sentence(report: Parity) -> str:
    verdict = "passes" if report.passes else "is refused"
    if report.verdict == "cannot be told":
        verdict += " because the adapter's change cannot be told from rounding"
    moved = "" if report.nibbles_changed is None else f"; {report.nibbles_changed:.1%} of the codes moved"
    return (
        f"- {report.target} {verdict}: its answers are {report.kl:.3g} nats a token away, where the adapter itself "
        f"changed {report.adapter_kl:.3g}{moved}."
    )
