"""Sweep over data types and block sizes: quantise one model in each way, and write a row of results for each.

Source: QLoRA table 2 compares data types by mean perplexity; here it is the perplexity of one model on one text.

One model is in memory, and in_place.py swaps its weights: SmolLM2-135M loads in a peak of 1085 MiB, reads one window of
256 tokens in 1207, and is swept through 20 settings in 1307.

A row is written as soon as it is known. A variant that has a row with the same model, data, configuration, versions and
quantiser is not run again, so the same call continues a stopped sweep. Threads and the processor's instructions do not
count, although float sums depend on them: with AVX2 instead of AVX-512 and 2 threads instead of 1 a window's loss moved
by 1e-5 in float32, in which a CPU computes here, and by 0.004 in bf16. The row names the machine.
Not here: the swap (in_place.py), the file (results_file.py), plots, and the block size of each layer (best_plan.py).
"""

import hashlib
import math
import subprocess
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from platform import python_version
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from qlora_lab.files.out_path import out_path
from qlora_lab.files.results_file import append_result, identity, open_results, with_checksum
from qlora_lab.files.strict_json import TEXT, read_json
from qlora_lab.measure.in_place import Source, Variant, checked, fitted, original, quantised, quantised_in_place
from qlora_lab.measure.machine import machine
from qlora_lab.measure.perplexity import (
    LARGEST_LOSS,
    check_windows,
    check_windows_fit,
    text_windows,
    topics_text,
    window_losses,
)
from qlora_lab.model.load import fast_dtype, load
from qlora_lab.model.model_files import weight_files
from qlora_lab.quant.numbers import check_seed
from qlora_lab.quant.quantize import dequantize
from qlora_lab.train.identity import installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def variants(
    codebooks: Iterable[str], block_sizes: Iterable[int] = (64,), double_quant: Iterable[bool] = (False,)
) -> list[Variant]:
    """List the unquantised model and every combination.

    >>> print(*variants(["nf4"], [64], [False, True]), sep="; ")
    not quantised; nf4, blocks of 64; nf4, blocks of 64, double quantization
    """
    return [Variant(None), *(Variant(*options) for options in product(codebooks, block_sizes, double_quant))]


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
    """Return a row for each of `settings`, in their order; measure and append those that the file `results` lacks.

    settings: Variants. windows, length, text: see perplexity; None takes topics_text. dtype: of the computation; None
    takes float32 on the CPU and load's choice on a GPU. device: as for load. seed: of the weights that Lloyd-Max levels
    are fitted to.
    A row has model, data, config, codebook, levels (of a table that has no name in qlora_lab.codebook), block_size,
    double_quant, seed (if levels were fitted), quantiser (a checksum of its results); perplexity, window_losses (mean
    nats per token), bits_per_parameter (of the quantised weights and their constants), relative_error (squared, over
    all of them), layer_errors (the same, a list for each kind of layer, first layer first), entropy and code_share
    (code_use.py); versions, commit, machine, seconds, processor_seconds, date, sha256 (of all fields before it).

    A torn last line is removed, with a warning. An interrupt says how much is done.
    Raises whatever load, quantize, perplexity and open_results raise, and ValueError for an empty path.
    """
    results = out_path(results)  # before anything is loaded
    settings = [checked(setting) for setting in settings]
    check_windows(length, windows)
    check_seed(seed)
    data = f"help topics of Python {python_version()}" if text is None else "text of the caller"
    text = topics_text() if text is None else text
    with open_results(results) as (rows, file):
        done = {identity(row): row for row in rows}  # by earlier calls
        source, tokenizer = _loaded(name_or_path, dtype, device, progress)
        tokens = text_windows(tokenizer, text, length, windows)  # (windows, length)
        check_windows_fit(source.model, tokenizer, tokens)
        shared = {"model": model_record(name_or_path, source.folder), "data": _data_record(data, text, tokens)}
        shared |= _run_record(source, tokens)
        measured = []
        bar = tqdm(settings, "sweep", unit="setting", disable=not progress)
        try:
            for variant in bar:
                bar.set_postfix_str(str(variant))
                full = fitted(variant, source, seed)  # with levels, if it named a fit
                row = shared | variant_record(full, source.model.device) | {"seed": None if full is variant else seed}
                if (same := identity(row)) not in done:
                    row = with_checksum(row | _measured(full, source, tokens, progress))
                    append_result(file, row)  # on the disk before the next setting
                    done[same] = row
                measured.append(done[same])
        except KeyboardInterrupt:
            said = f"{len(measured)} of {len(settings)} settings are in {results}; the same call goes on from there"
            raise KeyboardInterrupt(said) from None
    return measured


def _loaded(
    name_or_path: str | Path, dtype: torch.dtype | None, device: str | torch.device | None, progress: bool
) -> "tuple[Source, Tokenizer]":
    folder = original(name_or_path, "a sweep starts", progress)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else fast_dtype(device))
    model, tokenizer = load(name_or_path, None, dtype=dtype, device=device, progress=progress)
    return Source(model, folder), tokenizer


def _measured(variant: Variant, source: Source, tokens: torch.Tensor, progress: bool) -> dict:
    start, processor = time.perf_counter(), time.process_time()
    with quantised_in_place(source, variant) as figures:
        losses = window_losses(source.model, tokens, progress)
    if not fmean(losses) < LARGEST_LOSS:  # true for NaN, too
        raise FloatingPointError(f"{variant}: the losses of the windows are {losses}: try dtype=torch.float32")
    return {
        "perplexity": math.exp(fmean(losses)),
        "window_losses": losses,
        **figures.record(),
        "seconds": float(f"{time.perf_counter() - start:.3g}"),  # three digits: a small model takes milliseconds
        "processor_seconds": float(f"{time.process_time() - processor:.3g}"),  # of all threads
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _data_record(name: str, text: str, tokens: torch.Tensor) -> dict:
    return {
        "name": name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }


def _run_record(source: Source, tokens: torch.Tensor) -> dict:
    windows, length = tokens.shape
    return run_record({"windows": windows, "length": length}, source.model.dtype, source.model.device)


def run_record(config: dict, dtype: torch.dtype, device: torch.device) -> dict:
    """Record what was asked for, and with which versions, commit and machine it is computed."""
    return {
        "config": config | {"dtype": str(dtype).removeprefix("torch."), "device": device.type},
        "versions": {name: installed_version(name) for name in ("qlora-lab", "torch", "transformers")},
        "commit": commit(),
        "machine": machine() | {"instructions": torch.backends.cpu.get_cpu_capability()},
    }


def variant_record(variant: Variant, device: torch.device) -> dict:
    """Record how weights are quantised, with a checksum of what the quantiser does on this device."""
    if variant.codebook is None:
        return dict.fromkeys((*Variant._fields, "quantiser"))
    levels = None if variant.levels is None else variant.levels.tolist()
    return variant._asdict() | {"levels": levels, "quantiser": _quantiser(variant, device)}


def _quantiser(variant: Variant, device: torch.device) -> str:
    """Checksum fixed numbers after quantising them: in an edited checkout the version alone does not identify a row."""
    numbers = torch.arange(2**16, device=device) * 40503 % 65537 - 2**15  # whole numbers, so equal on every machine
    restored = dequantize(quantised(numbers / 2**15, variant), torch.float32)
    return hashlib.sha256(restored.cpu().numpy().tobytes()).hexdigest()[:16]


def model_record(name_or_path: str | Path, folder: Path) -> dict:
    """Record a model's name and source, and checksums of its weights and config.json, which identify it."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())  # a checksum of checksums
    record = {"name": str(name_or_path), "source": "a local folder", "weights_sha256": digest.hexdigest()}
    record["config_sha256"] = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    if note := _source_note(folder):
        record["source"] = note
    elif folder.parent.name == "snapshots":  # the hub's cache: models--ORG--NAME/snapshots/COMMIT
        hub_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
        record["source"] = f"hub {hub_id}, commit {folder.name}"
    return record


def _source_note(folder: Path) -> str | None:
    try:
        return read_json(folder / "source.json", {"source": TEXT}, ("source",))["source"]
    except (OSError, ValueError):  # no such file, or not one of fetch
        return None


def commit() -> str | None:
    """Name the commit of the library's own checkout, with "-dirty" if files were changed; None if it is installed."""
    root = Path(__file__).parents[2]  # of the repository
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None
