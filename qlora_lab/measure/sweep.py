"""A sweep: what each data type and block size makes of one model, a row of a results file for each.

In: a model, variants of its quantisation, a results file. Out: the rows, as dicts; the file holds one as JSON a line.
Source: QLoRA table 2 compares data types by mean perplexity; here it is the perplexity of one model on one text.

One model is in memory, unquantised. For each variant every linear layer's weight but the head's is overwritten by
dequantize(quantize(weight)), and afterwards read again from the checkpoint, which is mapped and not copied: it comes
back to the bit, after an exception and Ctrl-C too. SmolLM2-135M loads in a peak of 1085 MiB, reads one window of 256
tokens in 1207, and is swept through 20 settings in 1307.

A row is written as soon as it is known. A variant that has one, by the same model, data, configuration, versions and
quantiser, is not run again: a sweep that was stopped goes on when it is called again. Threads and the processor's
instructions do not count, though float sums depend on them: with AVX2 for AVX-512 and 2 threads for 1 a window's loss
moved by 1e-5 in float32, which is what a CPU computes in here, and by 0.004 in bf16. The row has the machine.
Not here: the file (results_file.py), plots, and which block size for which layer (best_plan.py).
"""

import hashlib
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from platform import python_version
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from qlora_lab.files.out_path import out_path
from qlora_lab.files.strict_json import TEXT, read_json
from qlora_lab.measure.code_use import CodeUse, code_counts
from qlora_lab.measure.machine import machine
from qlora_lab.measure.perplexity import check_windows, check_windows_fit, text_windows, topics_text, window_losses
from qlora_lab.measure.results_file import append_result, identity, open_results, with_checksum
from qlora_lab.model.empty_model import stored_options
from qlora_lab.model.fetch import resolve
from qlora_lab.model.linear4bit import linears_to_quantise
from qlora_lab.model.load import fast_dtype, load
from qlora_lab.model.model_files import weight_files
from qlora_lab.model.stored import stored_tensors
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import CODEBOOKS, check_levels
from qlora_lab.quant.lloyd_max import lloyd_max, scaled_sample
from qlora_lab.quant.numbers import check_seed
from qlora_lab.quant.quantize import QuantizedTensor, dequantize, quantize
from qlora_lab.train.identity import installed_version
from qlora_lab.train.interrupt import Interrupt, waiting

LLOYD_MAX = re.compile(r"lloyd-max([2-8]?)")  # a codebook that is fitted to the model; a digit for other than 4 bits
SAMPLE = 2**20  # weights that it is fitted to, from all layers; another million moves no level by more than 0.006
LARGEST_LOSS = math.log(sys.float_info.max)  # whose perplexity is a number


class Variant(NamedTuple):
    """One way to quantise a model; the plain tuple serves as well.

    codebook: a name that qlora_lab.codebook knows, "lloyd-max" (or "lloyd-max3" and so on, by bits) for levels fitted
    to the model in such blocks, a name of your own if `levels` are given, or None for the model as it is, whatever the
    rest says. levels: ascending, in [-1, 1].
    """

    codebook: str | None = "nf4"
    block_size: int = 64
    double_quant: bool = False
    levels: Sequence[float] | torch.Tensor | None = None

    def __str__(self) -> str:
        if self.codebook is None:
            return "not quantised"
        return f"{self.codebook}, blocks of {self.block_size}{', double quantization' * self.double_quant}"


def variants(
    codebooks: Iterable[str], block_sizes: Iterable[int] = (64,), double_quant: Iterable[bool] = (False,)
) -> list[Variant]:
    """The model as it is, and every combination.

    >>> print(*variants(["nf4"], [64], [False, True]), sep="; ")
    not quantised; nf4, blocks of 64; nf4, blocks of 64, double quantization
    """
    return [Variant(None), *(Variant(*one) for one in product(codebooks, block_sizes, double_quant))]


def sweep(
    name_or_path: str | Path,
    settings: Iterable[Variant | tuple],
    results: str | Path,
    *,
    windows: int = 8,
    length: int = 512,
    text: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """Rows of `settings`, Variants, in their order; those that the file `results` lacks are measured and appended.

    windows, length, text: see perplexity; None takes topics_text. dtype: of the computation, None float32 on the CPU
    and what load takes on a GPU. device: as for load. seed: of the sample that Lloyd-Max levels are fitted to.
    A row has model, data, config, codebook, levels (of a table that has no name in qlora_lab.codebook), block_size,
    double_quant, seed (if levels were fitted), quantiser (a checksum of what it does); perplexity, window_losses (mean
    nats a token), bits_per_parameter (of the quantised weights, constants included), relative_error (squared, over all
    of them), layer_errors (the same by kind of layer, a list each, first layer first), entropy and code_share
    (code_use.py); versions, commit, machine, seconds, date, sha256 (of all before it).

    A last line that was torn off is removed, with a warning. An interrupt says how much is done.
    Raises what load, quantize, perplexity and open_results raise, and ValueError for an empty path.
    """
    results = out_path(results)  # before anything is loaded
    settings = [_checked(one) for one in settings]
    check_windows(length, windows)
    check_seed(seed)
    with open_results(results) as (rows, file):
        done = {identity(row): row for row in rows}
        source, tokens, shared = _prepared(name_or_path, windows, length, text, dtype, device, progress)
        found, bar = [], tqdm(settings, "sweep", unit="setting", disable=not progress)
        try:
            for variant in bar:
                bar.set_postfix_str(str(variant))
                fitted = _fitted(variant, source, seed)
                row = shared | _variant_record(fitted, source) | {"seed": None if fitted is variant else seed}
                if (same := identity(row)) not in done:
                    row = with_checksum(row | _measured(fitted, source, tokens, progress))
                    append_result(file, row)
                    done[same] = row
                found.append(done[same])
        except KeyboardInterrupt:
            said = f"{len(found)} of {len(settings)} settings are in {results}; the same call goes on from there"
            raise KeyboardInterrupt(said) from None
    return found


def _prepared(name_or_path, windows, length, text, dtype, device, progress) -> "tuple[Source, torch.Tensor, dict]":
    """The model, the text's windows of tokens, and what all rows have in common."""
    folder = resolve(name_or_path, progress=progress)
    if stored := stored_options(folder):
        raise ValueError(f"{folder} is quantised already, as {stored}: a sweep starts from the original")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else fast_dtype(device))
    model, tokenizer = load(name_or_path, None, dtype=dtype, device=device, progress=progress)
    source = Source(model, folder)
    own = text is not None
    text = text if own else topics_text()
    tokens = text_windows(tokenizer, text, length, windows)
    check_windows_fit(model, tokenizer, tokens)
    shared = {
        "model": _model_record(name_or_path, folder),
        "data": {
            "name": "text of the caller" if own else f"help topics of Python {python_version()}",
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        },
        "config": {
            "windows": windows,
            "length": length,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
        },
        "versions": {name: installed_version(name) for name in ("qlora-lab", "torch", "transformers")},
        "commit": _commit(),
        "machine": machine() | {"instructions": torch.backends.cpu.get_cpu_capability()},
    }
    return source, tokens, shared


# ------------------------------------------------------------------------------------------------------------ the model


class Source:
    """A model and the files that its weights come from. linears: the quantised weights' names, in the model's order."""

    def __init__(self, model: torch.nn.Module, folder: Path):
        self.model, self._stored = model, stored_tensors(model, folder)
        self.linears = [f"{layer}.weight" for layer in linears_to_quantise(model)]
        if not self.linears:
            raise ValueError(f"{folder} has no linear layer to quantise besides the head")

    def read(self, name: str) -> torch.Tensor:
        """The weight as it is stored: a view of the mapped file on the CPU."""
        with _no_interrupt():  # which safetensors would turn into a ValueError
            return self.stored(name)

    def stored(self, name: str) -> torch.Tensor:
        """The same, for a caller who sees to interrupts."""
        return self._stored[name].read().to(self.model.get_parameter(name).device)


@dataclass
class Figures:
    """What quantising the weights costs, summed and by layer: squares of errors and weights, bits, codes counted."""

    errors: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    bits: int = 0
    weights: int = 0
    counts: torch.Tensor | None = None  # (2^bits,) int64

    def record(self) -> dict:
        """As fields of a row. Layers of one kind share a list, as 210 names would be most of the file."""
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
    """A Ctrl-C inside the `with` block is raised at its end; a second one at once."""
    interrupt = Interrupt()
    with waiting(interrupt):
        yield
    if interrupt.asked:
        raise KeyboardInterrupt


@contextmanager
def quantised_in_place(source: Source, variant: Variant) -> Iterator[Figures]:
    """The model of `source` computes with quantised weights inside the `with` block; then with its own again."""
    try:
        yield _overwrite(source, variant)
    finally:
        if variant.codebook is not None:
            with _no_interrupt():
                for name in source.linears:
                    source.model.get_parameter(name).data.copy_(source.stored(name))


def _overwrite(source: Source, variant: Variant) -> Figures:
    figures = Figures()
    for name in source.linears:
        weight, parameter = source.read(name), source.model.get_parameter(name)
        wide = weight.float()
        figures.weights += weight.numel()
        figures.squares[name] = _sum_of_squares(wide)
        if variant.codebook is None:
            figures.bits += 8 * weight.nbytes
            figures.errors[name] = 0.0
            continue
        q = _quantised(weight, variant, name)  # from the precision of the file, as load does
        stored = dequantize(q, torch.float32)
        parameter.data.copy_(stored)  # rounded once, if the model computes in 16 bits
        figures.bits += 8 * q.nbytes
        figures.errors[name] = _sum_of_squares(stored.sub_(wide))
        counts = code_counts(q).cpu()
        figures.counts = counts if figures.counts is None else figures.counts + counts
    return figures


def _quantised(weight: torch.Tensor, variant: Variant, name: str = "weight") -> QuantizedTensor:
    table = variant.codebook if variant.levels is None else variant.levels
    return quantize(weight, table, variant.block_size, variant.double_quant, name=name)


def _sum_of_squares(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2  # no third copy of the weight


def _fitted(variant: Variant, source: Source, seed: int) -> Variant:
    """A variant with levels where it had only the name of a fit."""
    if variant.levels is not None or not (match := LLOYD_MAX.fullmatch(variant.codebook or "")):
        return variant
    generator = torch.Generator().manual_seed(seed)
    share = SAMPLE / sum(source.model.get_parameter(name).numel() for name in source.linears)
    parts = (scaled_sample(source.read(name), variant.block_size, share, generator) for name in source.linears)
    return variant._replace(levels=lloyd_max(torch.cat([part.cpu() for part in parts]), int(match[1] or 4)))


def _measured(variant: Variant, source: Source, tokens: torch.Tensor, progress: bool) -> dict:
    start = time.perf_counter()
    with quantised_in_place(source, variant) as figures:
        losses = window_losses(source.model, tokens, progress)
    if not fmean(losses) < LARGEST_LOSS:  # nor is NaN
        raise FloatingPointError(f"{variant}: the losses of the windows are {losses}: try dtype=torch.float32")
    return {
        "perplexity": math.exp(fmean(losses)),
        "window_losses": losses,
        **figures.record(),
        "seconds": float(f"{time.perf_counter() - start:.3g}"),  # a fast machine takes milliseconds for a small model
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


# -------------------------------------------------------------------------------------------------------------- records


def _checked(setting: Variant | tuple) -> Variant:
    if not (isinstance(setting, tuple) and setting and isinstance(setting[0], str | None)):
        raise TypeError(f"setting {setting!r}: give a Variant, or a tuple such as ('nf4', 64, True)")
    variant = Variant(*setting)
    variant = variant._replace(double_quant=bool(variant.double_quant))  # 1 and True are one setting
    if variant.codebook is None:
        if variant.levels is not None:
            raise ValueError("levels are given without a name: put one in the place of codebook")
        return Variant(None)
    check_block_size(variant.block_size)
    known = variant.codebook in CODEBOOKS or LLOYD_MAX.fullmatch(variant.codebook)
    if variant.levels is None:
        if not known:
            names = f"{', '.join(CODEBOOKS)}, lloyd-max"
            given = f"codebook {variant.codebook!r:.60} is not known"
            raise ValueError(f"{given}: choose one of {names}, or give its levels")
        return variant
    if known or variant.codebook == "none":  # what tables of rows call the model as it is
        raise ValueError(f"levels are given under the name {variant.codebook!r}, which stands for others: rename them")
    try:
        return variant._replace(levels=check_levels(torch.as_tensor(variant.levels, dtype=torch.float32)))
    except ValueError as error:
        raise ValueError(f"{variant.codebook}: {error}") from None


def _variant_record(variant: Variant, source: Source) -> dict:
    if variant.codebook is None:
        return dict.fromkeys((*Variant._fields, "quantiser"))
    levels = None if variant.levels is None else variant.levels.tolist()
    return variant._asdict() | {"levels": levels, "quantiser": _quantiser(variant, source.model.device)}


def _quantiser(variant: Variant, device: torch.device) -> str:
    """A checksum of fixed numbers, quantised: in a checkout that is edited, a version does not tell who made a row."""
    numbers = torch.arange(2**16, device=device) * 40503 % 65537 - 2**15  # whole: the same on every machine
    stored = dequantize(_quantised(numbers / 2**15, variant), torch.float32)
    return hashlib.sha256(stored.cpu().numpy().tobytes()).hexdigest()[:16]


def _model_record(name_or_path: str | Path, folder: Path) -> dict:
    """Its name, where it came from, and checksums of weights and config.json, which decide whether it is the same."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    record = {"name": str(name_or_path), "source": "a local folder", "weights_sha256": digest.hexdigest()}
    record["config_sha256"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    if note := _source_note(folder):
        record["source"] = note
    elif folder.parent.name == "snapshots":  # the hub's cache: models--ORG--NAME/snapshots/COMMIT
        hub_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
        record["source"] = f"hub {hub_id}, commit {folder.name}"
    return record


def _source_note(folder: Path) -> str | None:
    """What fetch wrote of where the weights come from."""
    try:
        return read_json(folder / "source.json", {"source": TEXT}, ("source",))["source"]
    except (OSError, ValueError):  # there is none, or it is somebody else's
        return None


def _commit() -> str | None:
    """Of the library's own checkout, "-dirty" behind it if files were changed; None where it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None


def _relative(error: float, square: float) -> float:
    return error / square if error else 0.0  # weights that are all zero have neither


def _short(number: float) -> float:
    return float(f"{number:.5g}")
