"""Machine code as nvdisasm prints it: instructions, their kinds, loops, and the part that one thread executes.

    text of one kernel -> list[Instruction] -> the way through a full tile -> how many of each kind, how many bytes

A kernel's text holds more than a thread executes: edges of a matrix, rare cases, padding. One way through it is
counted. Of all ways that reach the end, take those that move the most bytes of global memory (a full tile, no early
exit); of these, those with the most products of matrices (which one thread may start for all); of these, the shortest.
In a loop it is the way through one pass. Instructions whose predicate is off are issued too, so they count; NOPs and
the endless branch behind EXIT do not. Where the threads of a warp part at a branch, both sides are issued but one is
counted: for such code the count is a lower bound. Subroutines, such as a division's rare cases, are left out.
"""

import re
from collections import Counter
from dataclasses import dataclass

NAMES = """
tensor core: HMMA IMMA DMMA BMMA OMMA QMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA
global load: LDG LD LDGSTS UBLKCP UTMALDG
global store: STG ST RED REDG ATOM ATOMG UTMASTG UTMAREDG
shared memory: LDS STS LDSM STSM ATOMS SHFL UTCCP LDTM STTM
local memory: LDL STL
conversion: F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND
float: FADD FADD2 FMUL FMUL2 FFMA FFMA2 FSETP FSEL FSET FMNMX FMNMX3 FCHK FSWZADD MUFU
float: HADD2 HMUL2 HFMA2 HSETP2 HSET2 HMNMX2 DADD DMUL DFMA DSETP
integer: IADD IADD3 IADD32I IMAD IMUL LOP LOP3 LEA SHF SHL SHR ISETP IABS IMNMX PRMT SGXT BMSK BREV FLO POPC IDP
integer: VIADD VIMNMX VIMNMX3 VIADDMNMX
"""  # shared memory includes what else stays on the chip: shuffles and tensor memory
OTHER = "other"  # branches, barriers, moves, constants, numbers of threads
KIND_OF = {name: row.split(": ")[0] for row in NAMES.strip().splitlines() for name in row.split(": ")[1].split()}
KINDS = (*dict.fromkeys(KIND_OF.values()), OTHER)
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # bytes; without a suffix 4
LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")
LABEL = re.compile(r"(\.L_\w+):")
TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """opcode such as LDG.E.128; predicate such as @!P0, or none; target: index of the instruction a branch goes to."""

    opcode: str
    predicate: str = ""
    operands: str = ""
    target: int | None = None

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        return KIND_OF.get(self.name) or KIND_OF.get(self.name.removeprefix("U"), OTHER)

    @property
    def access(self) -> int:
        """Bytes of global memory that a thread asks for; 0 for a bulk copy, whose size is not in its name."""
        if self.kind not in ("global load", "global store") or self.name.startswith("U"):
            return 0
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @property
    def conditional(self) -> bool:
        return bool(self.predicate) or bool(TARGET.split(self.operands)[0].strip())


def parse(text: str) -> list[Instruction]:
    """One kernel's text, without NOPs and without a branch to itself. Raises ValueError for text without code."""
    rows = []  # (predicate, opcode, operands)
    labels = {}  # name -> index of the instruction behind it
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(rows)
        elif (match := LINE.match(line)) and match[2] != "NOP":
            rows.append(((match[1] or "").strip(), match[2], match[3].strip()))
    if not rows:
        raise ValueError("the text holds no instruction: give one kernel's section of nvdisasm -c")
    code = []
    for predicate, opcode, operands in rows:
        goal = TARGET.search(operands) if opcode.startswith(("BRA", "CALL")) else None
        code.append(Instruction(opcode, predicate, operands, labels.get(goal[1]) if goal else None))
    if code[-1].target == len(code) - 1:
        code.pop()  # the endless branch
    return code


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """List (first, last instruction) of each loop that holds no other, in order."""
    backward = [(branch.target, i) for i, branch in enumerate(code) if branch.target is not None and branch.target <= i]
    ends = [(first, last) for first, last in backward if way(code, first, last)]
    return [a for a in ends if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in ends)]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """Return the way through one pass of the longest of loops(code); empty without a loop."""
    return max((way(code, *ends) for ends in loops(code)), key=len, default=[])


def way(code: list[Instruction], first: int = 0, last: int | None = None) -> list[Instruction]:
    """Return the way from `first` to `last` (None: to an EXIT) that is counted; empty if none leads there.

    Backward branches are not followed: a loop on the way is passed once.
    """
    best: dict[int, tuple[int, int, int, int | None]] = {}  # index -> bytes, products, minus instructions, next index
    for i in range(len(code) - 1 if last is None else last, first - 1, -1):
        ends = code[i].name == "EXIT" if last is None else i == last
        ways = [(0, 0, 0, None)] if ends else []
        ways += [(*best[j][:3], j) for j in _next(code, i) if j > i and j in best]
        if ways:
            moved, products, length, j = max(ways, key=lambda way: way[:3])
            best[i] = moved + code[i].access, products + (code[i].kind == KINDS[0]), length - 1, j
    taken = []
    i = first if first in best else None
    while i is not None:
        taken.append(code[i])
        i = best[i][3]
    return taken


def _next(code: list[Instruction], i: int) -> list[int]:
    """Indices of the instructions that can follow instruction i."""
    instruction = code[i]
    if instruction.target is not None:
        falls_through = instruction.conditional or instruction.name == "CALL"
        return [instruction.target, i + 1] if falls_through else [instruction.target]
    ends = instruction.name in ("EXIT", "RET") and not instruction.predicate
    return [] if ends else [i + 1]


def mix(code: list[Instruction]) -> dict[str, int]:
    """Count the instructions of each kind; every kind has an entry."""
    counts = Counter(instruction.kind for instruction in code)
    return {kind: counts[kind] for kind in KINDS}


def accesses(code: list[Instruction]) -> dict[str, int]:
    """Count accesses to global memory by opcode, without hints for caches: LDG.E.128, STG.E.U16, ..."""
    counts = Counter()
    for instruction in code:
        if instruction.kind in ("global load", "global store"):
            parts = instruction.opcode.split(".")
            counts[".".join(p for p in parts if p in ("E", "BYPASS", parts[0]) or p in WIDTHS)] += 1
    return dict(sorted(counts.items()))


def widths(counts: dict[str, int]) -> list[list[int]]:
    """List the bits of the loads, then of the stores, among accesses(); the widest first."""
    bits = [(Instruction(opcode).kind, 8 * Instruction(opcode).access) for opcode in counts]
    return [sorted({n for kind, n in bits if kind == side}, reverse=True) for side in ("global load", "global store")]


def sections(text: str) -> dict[str, str]:
    """nvdisasm's output -> kernel's name (mangled) -> its text."""
    parts = re.split(r"^//-+ \.text\.(\S+) +-+$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
