"""The stations of one weight: what each is called, the sentence of its numbers, where it is taught and computed.

In: a OneWeight. Out: for each station of STATIONS a sentence; its picture is in weight_pictures.py.
"""

from collections.abc import Callable
from typing import NamedTuple

from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.measure.one_weight import RANK, STEPS, OneWeight, follow
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.product_4bit import backward_adapted
from qlora_lab.optim.paging import Pages
from qlora_lab.quant.blocks import block_absmax, scale_blocks
from qlora_lab.quant.codebook import nearest_codes
from qlora_lab.quant.double_quant import double_quantize
from qlora_lab.quant.packing import pack, unpack
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.show import weight_pictures as pictures
from qlora_lab.show.weight_pictures import Picture, number


class Station(NamedTuple):
    """One station. Its first notebook explains it; the others use it."""

    name: str
    title: str  # one idea
    notebooks: tuple[str, ...]
    function: Callable  # that computes it, as show_source takes it
    draw: Callable[[OneWeight], Picture]
    say: Callable[[OneWeight], str]


def _weight(seen: OneWeight) -> str:
    rows, columns = seen.q.shape
    place = f"row {seen.row}, column {seen.column}"
    return f"The weight in {place} of a {rows:,} × {columns:,} matrix is {number(seen.value)}."


def _block(seen: OneWeight) -> str:
    return (
        f"Number {seen.position:,}, row by row, is at place {seen.place} of block {seen.block}, "
        f"whose largest magnitude is absmax = {number(seen.absmax)}."
    )


def _scaled(seen: OneWeight) -> str:
    if not seen.absmax:  # the library divides by the smallest number that it allows
        return "All weights of the block are zero, and stay zero."
    return f"{number(seen.value)} / {number(seen.absmax)} = {number(seen.scaled)}."


def _level(seen: OneWeight) -> str:
    low, high = map(number, seen.interval)
    return f"{number(seen.scaled)} lies between {low} and {high}, where level {number(seen.level)} is the nearest."


def _code(seen: OneWeight) -> str:
    return f"In the codebook {seen.q.codebook}, level {number(seen.level)} has code {seen.code}."


def _nibble(seen: OneWeight) -> str:
    return (
        f"Code {seen.code} is {seen.code:04b} in binary: four bits, where the weight had {8 * seen.q.dtype.itemsize}."
    )


def _byte(seen: OneWeight) -> str:
    half = "high" if seen.high else "low"
    return (
        f"Byte {seen.byte:,} is 0x{seen.packed:02X}: code {seen.code} is its {half} half, "
        f"and code {seen.neighbour} the other."
    )


def _constant(seen: OneWeight) -> str:
    return (
        f"absmax {number(seen.absmax)} becomes code {seen.absmax_code} of 8 bits and comes back as "
        f"{number(seen.absmax_stored)}. All in all, a weight costs {seen.q.bits_per_parameter:.3f} bits."
    )


def _decoded(seen: OneWeight) -> str:
    return f"{number(seen.level)} × {number(seen.absmax_stored)} = {number(seen.decoded)}."


def _error(seen: OneWeight) -> str:
    return (
        f"{number(seen.value)} went in and {number(seen.decoded)} comes back: an error of {number(seen.error)}, or "
        f"{number(100 * abs(seen.error) / (seen.absmax or 1))} % of absmax."
    )


def _product(seen: OneWeight) -> str:
    return (
        f"{number(seen.decoded)} × {number(seen.step.activation)} = {number(seen.product)}. "
        f"The exact weight would give {number(seen.exact_product)}."
    )


def _adapter(seen: OneWeight) -> str:
    return (
        f"After {STEPS} steps of training, row {seen.row} of B times column {seen.column} of A adds "
        f"{number(seen.step.correction)} to {number(seen.decoded)}."
    )


def _gradient(seen: OneWeight) -> str:
    # the largest alone: 32 numbers would say nothing, and the bars show the others
    most = max(seen.step.grad_A.abs().max().item(), seen.step.grad_B.abs().max().item())
    return (
        f"The output's error reaches {RANK} numbers in row {seen.row} of B and {RANK} in column {seen.column} of A; "
        f"the largest gradient is {number(most)}. The stored weight has none."
    )


def _page(seen: OneWeight) -> str:
    step = seen.step
    # of the row's 16 numbers the first stands for all; two pages may share a row
    first, second = map(number, step.moments)
    return (
        f"Page {step.page} holds both moments of B[{seen.row}, 0]: {first} and {second}. "
        f"{len(step.resident)} of {step.page_count} pages, of {step.page_size:,} bytes each, are in frames."
    )


# In the order of the course. A station's first notebook explains it; with the others, each notebook has a station to
# end with.
STATIONS = (
    Station(
        "weight",
        "A weight is one number of a matrix",
        ("00_start_here", "14_multimodal"),  # a weight of a model that reads, or of one that sees
        follow,
        pictures.weight,
        _weight,
    ),
    Station("block", "Neighbours share one constant", ("03_block_size",), block_absmax, pictures.block, _block),
    Station(
        "scaled",
        "Divided by the constant, it lies between \N{MINUS SIGN}1 and 1",
        ("01_codebook",),
        scale_blocks,
        pictures.scaled,
        _scaled,
    ),
    Station("level", "The nearest level takes its place", ("01_codebook",), nearest_codes, pictures.level, _level),
    Station("code", "Only the number of the level is kept", ("01_codebook",), quantize, pictures.code, _code),
    Station("nibble", "A code fits in half a byte", ("02_packing",), unpack, pictures.nibble, _nibble),
    Station("byte", "Two weights share one byte", ("02_packing",), pack, pictures.byte, _byte),
    Station(
        "constant",
        "The constant is quantised as well",
        ("04_double_quant",),
        double_quantize,
        pictures.constant,
        _constant,
    ),
    Station(
        "decoded",
        "A level and a constant give a weight back",
        ("05_kernels",),
        dequantize,
        pictures.decoded,
        _decoded,
    ),
    Station(
        "error",
        "What comes back is not quite what went in",
        ("06_data_types", "12_results"),  # how large it is, and what it costs a model
        follow,  # a difference, and no function of its own
        pictures.error,
        _error,
    ),
    Station(
        "product",
        "A decoded weight is used, then dropped",
        ("05_kernels", "15_answers"),  # of many tokens, and of one
        Linear4bit.forward,
        pictures.product,
        _product,
    ),
    Station(
        "adapter",
        "An adapter adds its correction at the same place",
        ("07_lora", "11_peft_zoo", "13_merge_lab"),
        LoRALinear.change,
        pictures.adapter,
        _adapter,
    ),
    Station(
        "gradient",
        "The adapter learns, the weight does not",
        ("10_finetune_llama",),
        backward_adapted,  # has gradients of A, B and x, none of the weight
        pictures.gradient,
        _gradient,
    ),
    Station(
        "page",
        "The optimizer keeps the adapter's moments in pages",
        ("09_paged_optimizer", "08_memory"),
        Pages.page,
        pictures.page,
        _page,
    ),
)


def place_of(lit: str) -> int:
    """Return the number of a station, by its name or by a notebook: "constant", "04_double_quant", "double_quant".

    A notebook's station is the last one that it explains, or else uses. Raises ValueError for any other name.
    """
    for place, station in enumerate(STATIONS):
        if lit == station.name:
            return place
    explains = [i for i, station in enumerate(STATIONS) if lit in _names(station.notebooks[:1])]
    uses = [i for i, station in enumerate(STATIONS) if lit in _names(station.notebooks)]
    if found := explains or uses:
        return found[-1]  # 01 derives the scaled weight and the level on its way to the code
    names = ", ".join(station.name for station in STATIONS)
    raise ValueError(
        f"lit={lit!r} is no station: choose one of {names}, or the name of a notebook such as '04_double_quant'"
    )


def _names(notebooks: tuple[str, ...]) -> list[str]:
    return [*notebooks, *(name.partition("_")[2] for name in notebooks)]
