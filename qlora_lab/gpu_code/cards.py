"""What a GPU's data sheet promises: how many warps fit on a multiprocessor, and the least time that work can take.

Both are models: no measurement is in them, and no kernel reaches all of a data sheet. Source of the limits: "Technical
Specifications per Compute Capability", CUDA C++ Programming Guide. Of the cards: NVIDIA's data sheets of A100 80GB SXM,
H100 SXM, H200 SXM and T4, and the white paper of the Ada generation; rates without sparsity.
"""

from dataclasses import dataclass
from typing import NamedTuple

REGISTERS = 65536  # of 32 bits, on a multiprocessor of every architecture here
REGISTER_UNIT = 256  # a warp gets its registers in portions of this many
SHARED_UNIT, SHARED_RESERVED = 128, 1024  # bytes: a block's portions, and what the system takes of each block
SCHEDULERS = 4  # of a multiprocessor; each issues one instruction of a warp each cycle


class Limits(NamedTuple):
    """Of one multiprocessor: warps, blocks, bytes of shared memory in all and for one block."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int


LIMITS = {  # compute capability times ten
    80: Limits(64, 32, 164 * 1024, 163 * 1024),
    90: Limits(64, 32, 228 * 1024, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 227 * 1024),
}


@dataclass(frozen=True)
class Card:
    """One row of data sheets. arch: the machine code that is counted for it, the nearest of LIMITS."""

    name: str
    arch: int
    bandwidth: float  # bytes a second
    processors: int  # multiprocessors
    clock: float  # cycles a second, boost
    products: dict[str, float]  # dtype -> operations a second of the tensor cores, with float32 sums


CARDS = (
    Card("A100", 80, 2039e9, 108, 1.41e9, {"bfloat16": 312e12, "float16": 312e12}),
    Card("H100", 90, 3350e9, 132, 1.98e9, {"bfloat16": 989e12, "float16": 989e12}),
    Card("H200", 90, 4800e9, 132, 1.98e9, {"bfloat16": 989e12, "float16": 989e12}),
    Card("RTX 4090", 80, 1008e9, 128, 2.52e9, {"bfloat16": 165.2e12, "float16": 165.2e12}),
    Card("T4", 80, 320e9, 40, 1.59e9, {"float16": 65e12}),  # its tensor cores know no bf16
)


@dataclass(frozen=True)
class Roof:
    """The least seconds that a card's memory, tensor cores and schedulers each need: a model, not a measurement."""

    card: str
    memory: float
    product: float | None  # None: the card has no unit for it
    issue: float

    @property
    def seconds(self) -> float | None:
        return None if self.product is None else max(self.memory, self.product, self.issue)

    @property
    def bound(self) -> str:
        """What is waited for: memory, product or issue."""
        return max(("memory", "product", "issue"), key=lambda name: getattr(self, name) or 0)


def roof(card: Card, moved: float, operations: float, dtype: str, instructions: float) -> Roof:
    """moved: bytes; operations: of a matrix product; instructions: of threads, 32 of which are one of a warp."""
    rate = card.products.get(dtype)
    product = operations / rate if rate else None if operations else 0.0
    issue = instructions / 32 / (SCHEDULERS * card.processors * card.clock)
    return Roof(card.name, moved / card.bandwidth, product, issue)


def occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that fit at once; 0 where not even one block does.

    registers: of a thread; shared: bytes of a block; warps: of a block. Raises ValueError for an unknown arch.
    """
    if arch not in LIMITS:
        raise ValueError(f"arch={arch} is not known: choose one of {', '.join(map(str, LIMITS))}")
    limits = LIMITS[arch]
    if shared > limits.shared_of_block or warps > 32 or registers > 255:
        return 0.0
    of_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS // warps
    of_block = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    blocks = min(limits.blocks, limits.warps // warps, by_registers, limits.shared // of_block)
    return blocks * warps / limits.warps
