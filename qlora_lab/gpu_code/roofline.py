"""Why 4-bit is slower, and when it is not: the least time of one product x W^T, in three ways, from data sheets.

ready: W lies in memory in bf16 or fp16. fused: one kernel decodes W on its way to the tensor cores. separate: one
kernel writes the decoded W to memory, another reads and multiplies it. Fused work is bounded twice: `fused` lets
memory, decoding and tensor cores work at the same time without any loss; `in_turn` lets decoding and tensor cores wait
for each other. A real kernel lies between the two.

A model, not a measurement: full rates of a data sheet, no launch, no cache that keeps W between two kernels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_lab.gpu_code.aot import DTYPES, Report, roofline
from qlora_lab.gpu_code.cards import CARDS, Card, Roof, roof


@dataclass(frozen=True)
class ProductTimes:
    """Least seconds of x W^T for this many tokens, in the ways of the module docstring."""

    tokens: int
    ready: float
    fused: float
    in_turn: float
    separate: float


def product_times(
    decode: Report, product: Report, card: str, shape: tuple[int, int], tokens: Iterable[int]
) -> list[ProductTimes]:
    """Compute the times for each number of tokens, for a weight of `shape` (out_features, in_features).

    decode: of dequantize_nf4 or dequantize_double; product: of matmul_nf4; both compiled for the card's architecture
    and in one dtype that its tensor cores take. Raises ValueError otherwise.
    """
    sheet = _sheet(card, decode, product)
    decoded = _of(roofline(decode, shape), card).seconds
    return [_times(sheet, decoded, product, shape, n) for n in tokens]


def _times(sheet: Card, decoded: float, product: Report, shape: tuple[int, int], n: int) -> ProductTimes:
    rows, columns = shape
    size = DTYPES[product.dtype][1]  # bytes of a number
    moved = (rows * columns + n * (rows + columns)) * size
    ready = roof(sheet, moved, 2 * n * rows * columns, product.dtype, 0).seconds
    fused = _of(roofline(product, shape, n), sheet.name)
    return ProductTimes(n, ready, fused.seconds, max(fused.memory, fused.issue + fused.product), decoded + ready)


def stops_paying(tokens: Sequence[int], fused: Sequence[float], other: Sequence[float]) -> int | None:
    """Find the number of tokens from which on `fused` is no longer faster than `other`; None if it is at the last."""
    faster = [i for i, (a, b) in enumerate(zip(fused, other, strict=True)) if a < b]
    after = faster[-1] + 1 if faster else 0
    return tokens[after] if after < len(tokens) else None


def _of(roofs: list[Roof], card: str) -> Roof:
    return next(roof for roof in roofs if roof.card == card)


def _sheet(name: str, decode: Report, product: Report) -> Card:
    card = next((card for card in CARDS if card.name == name), None)
    if card is None:
        raise ValueError(f"card {name!r} is not known: choose from {', '.join(card.name for card in CARDS)}")
    if {decode.arch, product.arch} != {card.arch}:
        compiled = f"sm_{decode.arch} and sm_{product.arch}"
        raise ValueError(f"the kernels are compiled for {compiled}, but the {name} needs sm_{card.arch}")
    if decode.dtype != product.dtype or product.dtype not in card.products:
        allowed = " or ".join(card.products)
        raise ValueError(
            f"the kernels compute in {decode.dtype} and {product.dtype}, but the {name} multiplies {allowed}: "
            "compile both for one of these"
        )
    return card
