"""Tabulate which bytes have which dtype: every tensor that training holds from one step to the next.

Source: QLoRA section 3, equation 5: storage in 4 bits, computation in 16, gradients for the adapter alone.

Bytes are read from the tensors themselves; those of gradients and moments, which the first step creates, follow from
their parameters. Elements are logical: a 4-bit weight counts as one element, not as half a byte, so that a share is a
share of the model. A tensor that two modules share, such as a tied head, counts once.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import nn

from qlora_lab.adapters.adapter import has_adapters, method_of
from qlora_lab.adapters.model_tensors import ADAPTER, EMBEDDINGS, EXPERTS, HEAD, LINEAR, OTHER, ROUTER, model_tensors
from qlora_lab.optim.paged_adamw import UNIT
from qlora_lab.quant.quantize import Quantized

WEIGHTS = "base weights"
ADAPTERS = "adapters"
OTHER_TRAINED = "other trained weights"
WORDS = dict.fromkeys((LINEAR, EXPERTS), WEIGHTS) | dict.fromkeys(ADAPTER, ADAPTERS)
WORDS |= {kind: kind for kind in (EMBEDDINGS, HEAD, ROUTER, OTHER)}
GRADIENTS = "gradients"
MOMENTS = "moments"
COPIES = "master copies"
COLUMNS = ("what", "dtype", "elements", "bytes", "bits each")


@dataclass(frozen=True)
class Row:
    """Tensors of one kind and one dtype."""

    what: str
    dtype: str
    elements: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits stored for each element, constants included."""
        return 8 * self.nbytes / self.elements  # 4.127 for nf4, blocks of 64, double quantization


@dataclass(frozen=True)
class DtypePolicy:
    """The table of a model. computes_in: the dtype of activations and products, also of the adapter's.

    trained, weights: logical elements that get a gradient, and all elements, adapters included. stored: the number of
    stored elements, where a packed byte counts as one; many tools report a share of this sum.
    """

    rows: tuple[Row, ...]
    computes_in: str
    trained: int
    weights: int
    stored: int
    loss: str = "float32"

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients need a scaled loss: in float16 they vanish below 6e-8, in bf16 they do not."""
        return self.computes_in == "float16"

    @property
    def nbytes(self) -> int:
        """Bytes in memory between two steps."""
        return sum(row.nbytes for row in self.rows)

    @property
    def share(self) -> float:
        """Trained weights over all weights, from 0 to 1."""
        return self.trained / self.weights

    def to_dict(self) -> dict:
        return asdict(self) | {"loss_scaling": self.loss_scaling, "bytes": self.nbytes, "share": self.share}

    def __str__(self) -> str:
        cells = [(r.what, r.dtype, f"{r.elements:,}", f"{r.nbytes:,}", f"{r.bits:.4g}") for r in self.rows]
        cells = [COLUMNS, *cells, ("sum", "", "", f"{self.nbytes:,}", "")]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]  # of the widest cell
        lines = [
            "  ".join(f"{text:{'<' if i < 2 else '>'}{widths[i]}}" for i, text in enumerate(row)).rstrip()
            for row in cells
        ]
        scaling = "scaled before the backward pass" if self.loss_scaling else "not scaled"
        lines.append(f"computed in {self.computes_in}; loss in {self.loss}, {scaling}")
        lines.append(f"trained: {self.trained:,} of {self.weights:,} weights, {self.share:.2%}")
        return "\n".join(lines)


class _Tensor(NamedTuple):
    """One tensor of a model: its kind, its dtype in words, and its counts."""

    what: str
    dtype: str
    elements: int
    nbytes: int
    stored: int
    trained: nn.Parameter | None


def dtype_policy(model: nn.Module, optimizer_bits: int = 32) -> DtypePolicy:
    """Make the table of `model` under AdamW with moments of 32 or 8 bits, as PagedAdamW keeps them.

    Raises ValueError for other bits.
    """
    if optimizer_bits not in UNIT:
        raise ValueError(f"optimizer_bits={optimizer_bits!r} is not allowed: moments have 32 or 8 bits")
    tensors = list(_tensors(model))
    trained = [tensor.trained for tensor in tensors if tensor.trained is not None]
    rows = [(tensor.what, tensor.dtype, tensor.elements, tensor.nbytes) for tensor in tensors]
    rows += [(GRADIENTS, _name(p.dtype), p.numel(), p.nbytes) for p in trained]
    copied = [p for p in trained if _is_whole(model) and p.dtype != torch.float32]
    rows += [(COPIES, "float32", p.numel(), 4 * p.numel()) for p in copied]
    together, size = UNIT[optimizer_bits]  # elements in a block, and its bytes
    moments = "float32" if optimizer_bits == 32 else f"8-bit codes, blocks of {together}"
    # Each parameter starts a new block, so bytes are not proportional to elements.
    rows += [(MOMENTS, moments, 2 * p.numel(), -(-p.numel() // together) * size) for p in trained]
    dtype = getattr(model, "dtype", None) or next(p.dtype for p in model.parameters())  # a bare nn.Module has none
    return DtypePolicy(
        rows=tuple(_sums(rows)),
        computes_in=_name(dtype),
        trained=sum(p.numel() for p in trained),
        weights=sum(tensor.elements for tensor in tensors),
        stored=sum(tensor.stored for tensor in tensors),
    )


def _tensors(model: nn.Module) -> Iterator[_Tensor]:
    """Yield every tensor of the model once, base before adapters."""
    seen: dict[nn.Parameter | torch.Tensor, list[str]] = {}
    for kind, tensor in model_tensors(model):
        if isinstance(tensor, Quantized):
            double = ", double quantization" if tensor.double_quant else ""
            words = f"{tensor.codebook}, blocks of {tensor.block_size}{double}"
            yield _Tensor(WEIGHTS, words, tensor.numel, tensor.nbytes, tensor.packed.numel(), None)
            continue
        kinds = seen.setdefault(tensor, [])  # by identity: a tied head is one tensor of two kinds
        if (what := WORDS.get(kind, "norms, biases, buffers")) not in kinds:
            kinds.append(what)
    known = _is_whole(model)  # all of it is saved
    for tensor, kinds in sorted(seen.items(), key=lambda item: ADAPTERS in item[1]):
        trained = tensor if tensor.requires_grad else None
        what = " and ".join(kinds) if known or trained is None or kinds == [ADAPTERS] else OTHER_TRAINED
        yield _Tensor(what, _name(tensor.dtype), tensor.numel(), tensor.nbytes, tensor.numel(), trained)


def _is_whole(model: nn.Module) -> bool:
    """Whether all weights learn, those of 16 bits by float32 copies."""
    return has_adapters(model) and method_of(model) == "full"


def _sums(rows: list[tuple[str, str, int, int]]) -> Iterator[Row]:
    """Add up rows of the same kind and dtype, in the order of first appearance."""
    sums: dict[tuple[str, str], list[int]] = {}
    for what, dtype, elements, nbytes in rows:
        total = sums.setdefault((what, dtype), [0, 0])
        total[0] += elements
        total[1] += nbytes
    for (what, dtype), total in sums.items():
        yield Row(what, dtype, *total)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
