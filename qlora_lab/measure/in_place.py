"""Let one model compute with its weights quantised one way after another, and give it its own weights back.

One model is in memory. For each variant, dequantize(quantize(weight)) overwrites every weight that `load` quantises:
linear layers but the head, and stacks of experts, one matrix at a time. Afterwards each weight is read again from the
checkpoint, which is mapped and not copied, so it comes back to the bit, even after an exception or Ctrl-C.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from qlora_lab.measure.code_use import CodeUse, code_counts
from qlora_lab.model.empty_model import stored_options
from qlora_lab.model.experts import stacks_of
from qlora_lab.model.fetch import resolve
from qlora_lab.model.layer_kinds import turned
from qlora_lab.model.linear4bit import linears_to_quantise
from qlora_lab.model.stored import stored_tensors
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import CODEBOOKS, check_levels
from qlora_lab.quant.lloyd_max import lloyd_max, scaled_sample
from qlora_lab.quant.quantize import QuantizedTensor, dequantize, quantize
from qlora_lab.train.interrupt import Interrupt, waiting

LLOYD_MAX = re.compile(r"lloyd-max([2-8]?)")  # a codebook that is fitted to the model; the digit is its bits, 4 if none
SAMPLE = 2**20  # weights to fit it to, from all layers; another million moves no level by more than 0.006


class Variant(NamedTuple):
    """One way to quantise a model. A plain tuple works as well.

    codebook: a name that qlora_lab.codebook knows; "lloyd-max" (or "lloyd-max3" and so on, by bits) for levels fitted
    to the model's own blocks; a name of your own, if you give `levels`; or None for the unquantised model, whatever the
    other fields say.
    """

    codebook: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = False
    levels: Sequence[float] | torch.Tensor | None = None  # (2^bits,) ascending, in [-1, 1]

    def __str__(self) -> str:
        if self.codebook is None:
            return "not quantised"
        return f"{self.codebook}, blocks of {self.block_size}{', double quantization' * self.double_quant}"


def checked(setting: Variant | tuple) -> Variant:
    """Check a setting and return it as a Variant. Raises TypeError or ValueError for one that is not allowed."""
    if not (isinstance(setting, tuple) and setting and isinstance(setting[0], str | None)):
        raise TypeError(f"setting {setting!r}: give a Variant, or a tuple such as ('nf4', 64, True)")
    variant = Variant(*setting)
    variant = variant._replace(double_quant=bool(variant.double_quant))  # 1 and True are the same setting
    if variant.codebook is None:
        if variant.levels is not None:
            raise ValueError("levels are given without a name: name them in the field codebook")
        return Variant(None)
    check_block_size(variant.block_size)
    reserved = variant.codebook in CODEBOOKS or LLOYD_MAX.fullmatch(variant.codebook)
    if variant.levels is None:
        if not reserved:
            names = f"{', '.join(CODEBOOKS)}, lloyd-max"
            raise ValueError(f"codebook {variant.codebook!r:.60} is not known: choose from {names}, or give levels")
        return variant
    if reserved or variant.codebook == "none":  # tables of results call the unquantised model "none"
        raise ValueError(f"levels are given under the name {variant.codebook!r}, which stands for others: rename them")
    try:
        return variant._replace(levels=check_levels(torch.as_tensor(variant.levels, dtype=torch.float32)))
    except ValueError as error:
        raise ValueError(f"{variant.codebook}: {error}") from None


class Source:
    """A model and the files that hold its weights. names: of the quantised weights, linear layers before experts."""

    def __init__(self, model: torch.nn.Module, folder: Path):
        self.model = model
        self.folder = folder
        self._stored = stored_tensors(model, folder)
        self.names = [*(f"{layer}.weight" for layer in linears_to_quantise(model)), *stacks_of(model)]
        if not self.names:
            raise ValueError(f"{folder} has no linear layer to quantise besides the head: give a larger model")

    def read(self, name: str) -> torch.Tensor:
        """Read a weight as the file stores it, as (out_features, in_features), on the CPU a view of the mapped file.

        A stack is (experts, out_features, in_features), here and in `put`.
        """
        with _no_interrupt():  # safetensors would turn a Ctrl-C into a ValueError
            return self.stored(name)

    def stored(self, name: str) -> torch.Tensor:
        """Do the same, for a caller that handles interrupts itself."""
        return turned(self.model, name, self._stored[name].read()).to(self.model.get_parameter(name).device)

    def put(self, name: str, weight: torch.Tensor) -> None:
        """Let the model compute with `weight`, (out_features, in_features)."""
        self.place(name).copy_(weight)

    def place(self, name: str) -> torch.Tensor:
        """View the weight that the model computes with."""
        return turned(self.model, name, self.model.get_parameter(name).data)


def original(name_or_path: str | Path, what: str, progress: bool) -> Path:
    """Return a model's folder. what: starts the advice, "a sweep starts". Raises ValueError for a model in 4 bits."""
    folder = resolve(name_or_path, progress=progress)
    if stored := stored_options(folder):
        raise ValueError(f"{folder} is quantised already, as {stored}: {what} from the original")
    return folder


@dataclass
class Figures:
    """The cost of quantising the weights, summed over all layers or listed by layer."""

    errors: dict[str, float] = field(default_factory=dict)  # name -> sum of squared errors
    squares: dict[str, float] = field(default_factory=dict)  # name -> sum of squared weights
    bits: int = 0  # of codes and constants
    weights: int = 0
    counts: torch.Tensor | None = None  # (2^bits,) int64: how often each code is used

    def record(self) -> dict:
        """Return them as fields of a row. Layers of one kind share a list: 210 names would fill most of the file."""
        layers: dict[str, list[float]] = {}
        for name, error in self.errors.items():
            kind = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
            layers.setdefault(kind, []).append(_short(_relative(error, self.squares[name])))
        figures = {
            "bits_per_parameter": self.bits / self.weights,
            "relative_error": _relative(sum(self.errors.values()), sum(self.squares.values())),
            "layer_errors": layers,
        }
        if self.counts is None:
            return figures | {"entropy": None, "code_share": None}
        use = CodeUse(self.counts.double() / self.counts.sum(), figures["relative_error"])
        return figures | {"entropy": use.entropy, "code_share": [_short(share) for share in use.share.tolist()]}


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Raise a Ctrl-C inside the `with` block at its end; a second one at once."""
    interrupt = Interrupt()
    with waiting(interrupt):
        yield
    if interrupt.asked:
        raise KeyboardInterrupt


@contextmanager
def quantised_in_place(source: Source, variant: Variant) -> Iterator[Figures]:
    """Let the model of `source` compute with quantised weights inside the `with` block, then with its own again."""
    try:
        yield _overwrite(source, variant)
    finally:
        if variant.codebook is not None:
            with _no_interrupt():  # a half-restored model would give wrong numbers without any error
                for name in source.names:
                    source.put(name, source.stored(name))


def _overwrite(source: Source, variant: Variant) -> Figures:
    figures = Figures()
    for name in source.names:
        figures.errors[name] = figures.squares[name] = 0.0
        # an expert at a time: a float32 copy of a whole stack could be as large as the model in 16 bits
        for weight, place in zip(_matrices(source.read(name)), _matrices(source.place(name)), strict=True):
            _overwrite_matrix(figures, name, weight, place, variant)
    return figures


def _overwrite_matrix(figures: Figures, name: str, weight: torch.Tensor, place: torch.Tensor, variant: Variant) -> None:
    """weight: (out_features, in_features) of the file. place: where the model reads it."""
    wide = weight.float()
    figures.weights += weight.numel()
    figures.squares[name] += _sum_of_squares(wide)
    if variant.codebook is None:
        figures.bits += 8 * weight.nbytes
        return
    q = quantised(weight, variant, name)  # from the precision of the file, as load does
    restored = dequantize(q, torch.float32)
    place.copy_(restored)  # rounded once, if the model computes in 16 bits
    figures.bits += 8 * q.nbytes
    figures.errors[name] += _sum_of_squares(restored.sub_(wide))
    counts = code_counts(q).cpu()
    figures.counts = counts if figures.counts is None else figures.counts + counts


def _matrices(weight: torch.Tensor) -> torch.Tensor:
    """View a weight as (matrices, out_features, in_features)."""
    return weight if weight.dim() == 3 else weight[None]


def quantised(weight: torch.Tensor, variant: Variant, name: str = "weight") -> QuantizedTensor:
    """Quantise a weight the way that `variant` says."""
    table = variant.codebook if variant.levels is None else variant.levels
    return quantize(weight, table, variant.block_size, variant.double_quant, name=name)


def _sum_of_squares(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2  # no third copy of the weight


def fitted(variant: Variant, source: Source, seed: int) -> Variant:
    """Return a variant with levels in place of the name of a fit, such as "lloyd-max"; any other as it is."""
    if variant.levels is not None or not (match := LLOYD_MAX.fullmatch(variant.codebook or "")):
        return variant
    generator = torch.Generator().manual_seed(seed)
    share = SAMPLE / sum(source.model.get_parameter(name).numel() for name in source.names)
    # blocks end with a matrix, so each expert is drawn from by itself
    matrices = (matrix for name in source.names for matrix in _matrices(source.read(name)))
    parts = (scaled_sample(matrix, variant.block_size, share, generator) for matrix in matrices)
    return variant._replace(levels=lloyd_max(torch.cat([part.cpu() for part in parts]), int(match[1] or 4)))


def _relative(error: float, square: float) -> float:
    return error / square if error else 0.0  # weights that are all zero have neither


def _short(number: float) -> float:
    return float(f"{number:.5g}")
