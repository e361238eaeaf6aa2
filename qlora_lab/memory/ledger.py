"""The table of a memory ledger: rows with a predicted and a measured column, and what they add up to.

In: rows. Out: sums by group and by phase of a training step, a printed table, a dict.
A step has four phases that can be the peak, because what a row counts is not there all the time:

    loss       the forward pass is over, all that it keeps is there, and so is the loss's workspace
    backward   its first layer, the model's last: activations are there, gradients of weights not yet
    end        of the backward pass: gradients of weights are there, activations are gone
    update     gradients and the optimizer's temporaries

Not here: where the numbers come from (predict.py, measured.py).
"""

from dataclasses import asdict, dataclass

PHASES = ("loss", "backward", "end", "update")
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """Bytes of one kind. count: elements of `dtype`. measured: None where it was not measured. when: phases in which it
    is there."""

    group: str
    what: str
    formula: str
    count: int
    dtype: str
    predicted: int
    measured: int | None = None
    when: tuple[str, ...] = PHASES


@dataclass(frozen=True)
class Ledger:
    """All rows of one model in one setup; `setup` says which, in words. tokens: at once. notes: what was assumed."""

    rows: tuple[Row, ...]
    setup: str
    tokens: int
    notes: tuple[str, ...] = ()

    def at(self, phase: str) -> int:
        """Predicted bytes in a phase. Raises ValueError for a phase that there is not."""
        if phase not in PHASES:
            raise ValueError(f"phase={phase!r} is not known: it is one of {', '.join(PHASES)}")
        return sum(row.predicted for row in self.rows if phase in row.when)

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> int:
        """The most bytes that are predicted at once."""
        return self.at(self.phase)

    @property
    def per_token(self) -> float:
        """Predicted bytes of activations that a token keeps from the forward to the backward pass."""
        kept = sum(row.predicted for row in self.rows if row.group == "activations" and "loss" in row.when)
        return kept / self.tokens

    def group(self, name: str) -> int:
        """Predicted bytes of a group. Raises ValueError for one that has no row."""
        if name not in self.groups:
            raise ValueError(f"there is no group {name!r}: there are {', '.join(self.groups)}")
        return self.groups[name]

    @property
    def groups(self) -> dict[str, int]:
        """Predicted bytes by group, in the order of the rows."""
        sums: dict[str, int] = {}
        for row in self.rows:
            sums[row.group] = sums.get(row.group, 0) + row.predicted
        return sums

    def row(self, what: str) -> Row:
        """The row of this name. Raises ValueError if there is none."""
        found = [row for row in self.rows if row.what == what]
        if not found:
            raise ValueError(f"there is no row {what!r}: there are {', '.join(row.what for row in self.rows)}")
        return found[0]

    def to_dict(self) -> dict:
        """Everything, as plain values for JSON."""
        rows = [asdict(row) for row in self.rows]
        phases = {phase: self.at(phase) for phase in PHASES}
        sums = {
            "groups": self.groups,
            "phases": phases,
            "peak": self.peak,
            "peak_phase": self.phase,
            "per_token": self.per_token,
        }
        return {"setup": self.setup, "rows": rows, **sums, "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("group", "what", "count", "dtype", "predicted", "measured", "difference", "formula")
        lines, group = [head], None
        for row in self.rows:
            lines.append((row.group if row.group != group else "", *_cells(row)))
            group = row.group
        shares = [(name, "sum", "", "", f"{size:,}", "", "", f"{size / MIB:,.1f} MiB") for name, size in _some(self)]
        peaks = [("", phase, "", "", f"{self.at(phase):,}", "", "", _mark(self, phase)) for phase in PHASES]
        lines += [*shares, ("phase", *[""] * 7), *peaks]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (0, 1, 3, 7)
        text = [
            "  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
            for line in lines
        ]
        token = f"a token keeps {self.per_token:,.0f} bytes of activations from the forward to the backward pass"
        return "\n".join([self.setup, *text, token, *self.notes])


def _cells(row: Row) -> tuple[str, ...]:
    measured = "" if row.measured is None else f"{row.measured:,}"
    difference = "" if row.measured is None else f"{row.predicted - row.measured:+,}".replace("+0", "0")
    return row.what, f"{row.count:,}", row.dtype, f"{row.predicted:,}", measured, difference, row.formula


def _some(ledger: Ledger) -> list[tuple[str, int]]:
    return [(name, size) for name, size in ledger.groups.items() if size]


def _mark(ledger: Ledger, phase: str) -> str:
    return f"{ledger.at(phase) / MIB:,.1f} MiB{', the peak' if phase == ledger.phase else ''}"
