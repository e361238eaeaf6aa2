"""One weight on its way through QLoRA: every number between its float and the page that holds its adapter's moments.

In: a weight, (out_features, in_features) float32, bf16 or fp16, a row and a column; course_weight() is the matrix that
all notebooks follow. Out: a OneWeight.
Source: QLoRA sections 2 and 3. The adapter learns for STEPS steps to undo the layer's quantisation error: the loss is
the mean squared difference between its outputs and those of the weight before quantisation.
"""

from dataclasses import dataclass, replace

import torch
from safetensors import safe_open

from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.model.empty_model import stored_options
from qlora_lab.model.fetch import on_disk
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.optim.paged_adamw import UNIT, PagedAdamW
from qlora_lab.optim.stores import SYSTEM_PAGE
from qlora_lab.quant.blocks import scale_blocks, to_blocks
from qlora_lab.quant.codebook import rounding
from qlora_lab.quant.double_quant import GROUP_SIZE, double_quantize
from qlora_lab.quant.numbers import check_whole
from qlora_lab.quant.quantize import QuantizedTensor, dequantize, quantize

MODEL = "smollm2-135m"
MATRIX = "model.layers.0.self_attn.q_proj.weight"
BITS = 4  # two codes in a byte: a code of 3 bits can lie in two bytes
RANK = 16
TOKENS = 32
STEPS = 10  # after one step A has no gradient yet, because B was zero
LR = 1e-3
LARGE = 2**22  # weights: a smaller matrix takes less than a second, if nothing else runs
NEAR = 7, 15  # rows and columns of the matrix that are shown around the weight


@dataclass(frozen=True)
class OneWeight:
    """What the library's functions say about one weight. Floats are in the weight's own unit, unless noted."""

    q: QuantizedTensor  # of the whole matrix, with double quantization
    row: int
    column: int
    near: torch.Tensor  # (at most 7, at most 15) float32, the weights around it
    near_place: tuple[int, int]  # its row and column in them
    value: float
    block: int
    place: int  # in its block
    block_values: torch.Tensor  # (block_size,) float32, zeros behind the last weight
    absmax: float  # before double quantization
    scaled: float  # value / absmax
    code: int
    level: float
    interval: tuple[float, float]  # scaled values that get this code
    byte: int  # the byte's number
    packed: int  # what it holds, 0 to 255
    high: bool  # the weight's code is in the high half
    neighbour: int  # the code in the other half: of the next weight or the one before, or padding
    absmax_code: int  # 0 to 255
    group: int  # of constants with one scale
    absmax_scale: float
    absmax_offset: float
    absmax_stored: float  # with double quantization undone
    decoded: float
    error: float  # decoded - value
    step: "AdapterStep"

    @property
    def position(self) -> int:
        """Its number in the matrix, row by row."""
        return self.row * self.q.shape[1] + self.column

    @property
    def product(self) -> float:
        """What it adds to the output of the frozen layer for the first token."""
        return self.decoded * self.step.activation  # in double precision: a layer adds products without rounding each

    @property
    def exact_product(self) -> float:
        """What the weight before quantisation would add."""
        return self.value * self.step.activation


@dataclass(frozen=True)
class AdapterStep:
    """What an adapter beside the frozen matrix does at this weight, at the end of STEPS steps."""

    activation: float  # the first token's input at the weight's column
    output: float  # of the frozen layer for that token, at the weight's row
    correction: float  # B[row] A[:, column], times alpha / r, after the last step
    grad_A: torch.Tensor  # (r,) float32, of A[:, column], in the last step
    grad_B: torch.Tensor  # (r,) float32, of B[row], in the last step
    moments: tuple[float, float]  # of B[row, 0], after the last step
    page: int  # that holds them
    page_count: int
    resident: tuple[int, ...]  # pages in frames after the last step
    page_size: int  # bytes


Table = str | torch.Tensor  # a codebook's name, or its levels


def course_weight() -> torch.Tensor | None:
    """Return the matrix whose weight the course follows, (576, 576) bf16, or None where its model is not here.

    It is the query projection of the first layer of SmolLM2-135M-Instruct, as notebook 00 reads it. Nothing else of the
    model is read. Raises as `fetch` does for a damaged folder.
    """
    folder = on_disk(MODEL)
    if folder is None:
        return None
    if stored_options(folder) is not None or not (folder / "model.safetensors").exists():
        return None  # somebody's own copy, in 4 bits or in parts
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_tensor(MATRIX)


def follow(
    weight: torch.Tensor, row: int, column: int, codebook: Table = "nf4", block_size: int = 64, *, progress: bool = True
) -> OneWeight:
    """Follow weight[row, column] through quantisation with double quantization, a product, and an adapter's training.

    codebook, block_size: as quantize takes them, with codes of 4 bits. progress: show a bar for a large matrix, if it
    takes seconds. Raises TypeError for a weight that quantize refuses, ValueError for one that is not a matrix or not
    finite, for a place outside it, and for a codebook with codes of another width.

    >>> seen = follow(torch.linspace(-1, 1, 64).view(4, 16), 3, 15)
    >>> seen.code, seen.byte, hex(seen.packed)
    (15, 31, '0xff')
    """
    if isinstance(weight, torch.Tensor):
        weight = weight.detach().cpu()  # the tokens and the pages of the adapter are there
    exact, q = _quantised(weight, codebook, block_size)
    rows, columns = weight.shape
    check_whole("row", row, 0, rows - 1)
    check_whole("column", column, 0, columns - 1)
    # 16-bit weights are quantised as they are; what follows shows them in float32, which changes no value
    weight = weight.float()
    position = row * columns + column
    block, place = divmod(position, block_size)
    # to_blocks pads and copies a whole matrix; one block is enough here
    (values,) = to_blocks(weight.reshape(-1)[block * block_size :][:block_size], block_size)
    code = int(q.codes[position])  # the library's; by hand it is a half of the byte below
    byte = int(q.packed[position // 2])
    top, left = _window(row, rows, NEAR[0]), _window(column, columns, NEAR[1])
    decoded = dequantize(q, torch.float32)[row, column].item()
    value = weight[row, column].item()
    return OneWeight(
        q=q,
        row=row,
        column=column,
        near=weight[top : top + NEAR[0], left : left + NEAR[1]].clone(),
        near_place=(row - top, column - left),
        value=value,
        block=block,
        place=place,
        block_values=values,
        absmax=exact[block].item(),
        scaled=scale_blocks(values[None], exact[block : block + 1])[0, place].item(),
        code=code,
        level=q.levels[code].item(),
        interval=_interval(q.levels, code),
        byte=position // 2,
        packed=byte,
        high=position % 2 == 0,
        neighbour=byte & 15 if position % 2 == 0 else byte >> 4,
        absmax_code=int(q.constants.absmax_codes[block]),
        group=block // GROUP_SIZE,
        absmax_scale=q.constants.absmax_scale[block // GROUP_SIZE].item(),
        absmax_offset=q.constants.absmax_offset.item(),
        absmax_stored=q.absmax[block].item(),
        decoded=decoded,
        error=decoded - value,
        step=_trained(weight, q, row, column, progress and weight.numel() >= LARGE),
    )


def _window(place: int, count: int, width: int) -> int:
    """Return where a window of `width` begins that has `place` in its middle, or as near to it as the edges allow."""
    return max(0, min(place - width // 2, count - width))


def _quantised(
    weight: torch.Tensor, codebook: str | torch.Tensor, block_size: int
) -> tuple[torch.Tensor, QuantizedTensor]:
    """Return the exact constants, which double quantization does not keep, and the quantised weight."""
    if isinstance(weight, torch.Tensor) and weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but it must be a matrix: give one with 2 dimensions")
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not torch.isfinite(weight).all():
        # quantize would say so too, but its advice is to keep NaN, which double quantization cannot
        raise ValueError("weight holds NaN or infinity: repair it, for example with torch.nan_to_num")
    # Its constants are exact. quantize(double_quant=True) would have the same codes, but keeps no exact constants.
    plain = quantize(weight, codebook, block_size)
    if plain.bits != BITS:
        raise ValueError(
            f"codebook={plain.codebook!r} has codes of {plain.bits} bits, but half a byte holds 4: "
            "choose a codebook with codes of 4 bits, such as 'nf4'"
        )
    return plain.absmax, replace(plain, constants=double_quantize(plain.absmax))


def _interval(levels: torch.Tensor, code: int) -> tuple[float, float]:
    """Return the scaled values between which `code` is the nearest; FP4's codes are not in the order of its levels."""
    thresholds, order = rounding(levels)
    # the outermost levels have no threshold beyond them, and no scaled value lies beyond 1
    edges = [-1.0, *thresholds.tolist(), 1.0]
    place = order.tolist().index(code)
    return edges[place], edges[place + 1]


@torch.enable_grad()  # a reader's cell may have switched gradients off
def _trained(weight: torch.Tensor, q: QuantizedTensor, row: int, column: int, progress: bool) -> AdapterStep:
    """Train an adapter beside `q` to give the outputs of `weight`, and read what it holds for one place."""
    from tqdm.auto import tqdm

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, weight.shape[1], dtype=torch.float32, generator=generator)  # (tokens, in)
    layer = LoRALinear(Linear4bit(q), RANK, RANK, generator=generator)  # alpha = r: a scaling of 1, as in notebook 00
    numel = layer.lora_A.numel() + layer.lora_B.numel()
    per_page = SYSTEM_PAGE // UNIT[32][1]  # elements whose two moments one page holds
    pages = -(-numel // per_page)
    # frames for half of the pages, so that some must leave: with frames for all, paging would do nothing
    budget = SYSTEM_PAGE * max(1, pages // 2)
    optimizer = PagedAdamW([layer.lora_A, layer.lora_B], lr=LR, page_size=SYSTEM_PAGE, budget=budget)
    # No data set is needed: all that the adapter can learn here is the error of the 4-bit weight.
    wanted = x @ weight.T  # (tokens, out)
    bar = tqdm(range(STEPS), "steps", unit="step", leave=False, delay=2, disable=not progress)
    for _ in bar:  # seconds for a 7B model's matrix
        optimizer.zero_grad()
        (layer(x) - wanted).square().mean().backward()
        optimizer.step()
    resident = tuple(optimizer.pages.resident)  # before state_dict() asks for all pages
    state = optimizer.state_dict()["state"][1]  # of lora_B
    return AdapterStep(
        activation=x[0, column].item(),
        output=layer.base(x[:1])[0, row].item(),
        correction=layer.change(weight, slice(row, row + 1))[0, column].item(),
        grad_A=layer.lora_A.grad[:, column].clone(),
        grad_B=layer.lora_B.grad[row].clone(),
        moments=(state["exp_avg"][row, 0].item(), state["exp_avg_sq"][row, 0].item()),
        page=(layer.lora_A.numel() + row * RANK) // per_page,  # A lies before B
        page_count=pages,
        resident=resident,
        page_size=SYSTEM_PAGE,
    )
