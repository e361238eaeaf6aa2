"""Hold the table of a memory ledger: rows with a predicted and a measured column, and their sums.

Bytes come and go during a step, so any of four phases can hold the peak:

    loss       the forward pass has ended: all activations that it keeps, and the loss's workspace
    backward   the backward pass has begun: activations, but no gradients of weights yet
    end        the backward pass has ended: gradients of weights, but no activations
    update     gradients and the optimizer's temporaries
"""

from dataclasses import asdict, dataclass

PHASES = ("loss", "backward", "end", "update")
MIB = 2**20


@dataclass(frozen=True)
class LedgerRow:
    """One kind of tensor and its bytes."""

    group: str  # "weights", "activations" and so on: a colour of the memory explorer
    what: str  # names the row
    formula: str  # in the letters of activations.LETTERS
    count: int  # elements of `dtype`
    dtype: str
    predicted: int  # bytes
    measured: int | None = None  # bytes; None if nothing was measured
    when: tuple[str, ...] = PHASES  # the phases in which these bytes are allocated


@dataclass(frozen=True)
class Ledger:
    """All rows of one model in one setup."""

    rows: tuple[LedgerRow, ...]
    setup: str  # the model and the setup, in words
    tokens: int  # that go through the model at once
    notes: tuple[str, ...] = ()  # what was assumed
    idle: int = 0  # predicted bytes of the experts that one token is not routed to

    def at(self, phase: str) -> int:
        """Return the predicted bytes in a phase. Raises ValueError for a phase that is not in PHASES."""
        if phase not in PHASES:
            raise ValueError(f"phase={phase!r} is not known: it is one of {', '.join(PHASES)}")
        return sum(row.predicted for row in self.rows if phase in row.when)

    def groups_at(self, phase: str) -> dict[str, int]:
        """Sum the predicted bytes of a phase by group, in the order of the rows; a group may have 0."""
        sums = dict.fromkeys(self.groups, 0)
        for row in self.rows:
            sums[row.group] += row.predicted * (phase in row.when)
        return sums

    @property
    def phase(self) -> str:
        """The phase that holds the peak."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> int:
        """The largest number of bytes predicted to be allocated at once."""
        return self.at(self.phase)

    @property
    def per_token(self) -> float:
        """Predicted bytes of activations that a token keeps between the forward and the backward pass."""
        kept = sum(row.predicted for row in self.rows if row.group == "activations" and "loss" in row.when)
        return kept / self.tokens

    @property
    def active(self) -> int:
        """Predicted bytes of the weights that one token uses: all of them, but in a mixture of experts."""
        return self.group("weights") - self.idle

    def group(self, name: str) -> int:
        """Return the predicted bytes of a group. Raises ValueError for a group without rows."""
        if name not in self.groups:
            raise ValueError(f"this ledger has no group {name!r}: choose one of {', '.join(self.groups)}")
        return self.groups[name]

    @property
    def groups(self) -> dict[str, int]:
        """Predicted bytes by group, in the order of the rows."""
        sums: dict[str, int] = {}
        for row in self.rows:
            sums[row.group] = sums.get(row.group, 0) + row.predicted
        return sums

    def row(self, what: str) -> LedgerRow:
        """Return the first row with this name. Raises ValueError if no row has it."""
        for row in self.rows:
            if row.what == what:
                return row
        raise ValueError(f"this ledger has no row {what!r}: choose one of {', '.join(row.what for row in self.rows)}")

    def to_dict(self) -> dict:
        """Return every field and sum, as plain values for JSON."""
        rows = [asdict(row) for row in self.rows]
        phases = {phase: self.at(phase) for phase in PHASES}
        sums = {"groups": self.groups, "phases": phases, "peak": self.peak, "peak_phase": self.phase}
        sums |= {"per_token": self.per_token, "stored_weights": self.group("weights"), "active_weights": self.active}
        return {"setup": self.setup, "rows": rows, **sums, "notes": list(self.notes)}

    def __str__(self) -> str:
        head = ("group", "what", "count", "dtype", "predicted", "measured", "difference", "formula")
        lines = [head]
        group = None
        for row in self.rows:
            lines.append((row.group if row.group != group else "", *_cells(row)))  # a group's name once
            group = row.group
        sums = {name: size for name, size in self.groups.items() if size}
        shares = [(name, "sum", "", "", f"{size:,}", "", "", f"{size / MIB:,.1f} MiB") for name, size in sums.items()]
        peaks = [("", phase, "", "", f"{self.at(phase):,}", "", "", _mark(self, phase)) for phase in PHASES]
        lines += [*shares, ("phase", *[""] * 7), *peaks]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (0, 1, 3, 7)  # columns of words; numbers are aligned at the right
        text = [
            "  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
            for line in lines
        ]
        token = f"a token keeps {self.per_token:,.0f} bytes of activations from the forward to the backward pass"
        used = f"a token uses {self.active:,} of the {self.group('weights'):,} bytes of weights that are stored"
        return "\n".join([self.setup, *text, token, *[used] * bool(self.idle), *self.notes])


def _cells(row: LedgerRow) -> tuple[str, ...]:
    measured = "" if row.measured is None else f"{row.measured:,}"
    difference = "" if row.measured is None else f"{row.predicted - row.measured:+,}".replace("+0", "0")
    return row.what, f"{row.count:,}", row.dtype, f"{row.predicted:,}", measured, difference, row.formula


def _mark(ledger: Ledger, phase: str) -> str:
    return f"{ledger.at(phase) / MIB:,.1f} MiB{', the peak' if phase == ledger.phase else ''}"
