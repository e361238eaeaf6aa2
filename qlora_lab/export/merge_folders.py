"""Merge an adapter's folder into a model's folder, without loading either model.

In: the folder of a model, or its name; the folder of an adapter. Out: what merge.py writes, from the same weights.
The base is read three times, one layer at a time, and quantised on the way if it is an original: by the base's own
answers, by those of the adapter model, and by the merge; a fourth time, to measure rounding, if the adapter changed
little. The merged model is read once.
Memory: one file of the result, the largest tensor in float32 and a few layers, however many layers there are.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qlora_lab.adapters.adapter_base import warn_of_base
from qlora_lab.adapters.dora import turned
from qlora_lab.adapters.peft_format import StoredLora, read_adapter
from qlora_lab.export.layerwise import Reader, reader, streamed
from qlora_lab.export.merge import Work, check_fits, check_new, check_target, empty_to_write, finish, untie, weight_name
from qlora_lab.export.merged_weight import Learned, with_learned
from qlora_lab.export.parity import Parity, log_probabilities, prompt_tokens
from qlora_lab.files.lock import locked_file, reserved
from qlora_lab.files.out_path import check_apart, out_folder
from qlora_lab.model.empty_model import empty_model, tokenizer_of
from qlora_lab.model.fetch import resolve
from qlora_lab.model.layer_kinds import turned as as_kept
from qlora_lab.model.load import check_options, public_name
from qlora_lab.model.quantised import options_of, quantised
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook as named_codebook
from qlora_lab.quant.plan import DEFAULT, Candidate
from qlora_lab.quant.quantize import quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Folders:
    """What is merged. model, original: a known name, a folder or a hub id, as for `load`."""

    model: str | Path
    adapter: str | Path
    original: str | Path | None = None  # for the target "original", if the model is a copy in 4 bits


def merge_folders(
    folders: Folders,
    out: str | Path,
    target: str = "dequantised",
    options: Candidate = DEFAULT,
    *,
    anyway: bool = False,
    progress: bool = True,
) -> Parity:
    """Merge an adapter into a model, both from their folders, as ql.merge does. Returns its report.

    options: codebook, block size and double quantization of the model, as `load` takes them.
    Raises what `merge`, `load` and `load_adapter` raise, and ValueError for an `out` inside a folder that is read.
    """
    check_target(target)
    named_codebook(options.codebook)
    check_block_size(options.block_size)
    out = out_folder(out)
    check_new(out)
    check_apart(out, folders.model, folders.original or folders.model, folders.adapter)  # before a lock lies there
    with locked_file(out, "merge") as lock, reserved(lock):
        check_new(out)
        folder = resolve(folders.model, progress=progress)
        source = folder if folders.original is None else resolve(folders.original, progress=progress)
        check_apart(out, folder, source)  # what a name stands for
        empty = empty_to_write(source, target)
        model = empty_model(folder, torch.float32)
        model.name_or_path = public_name(folders.model)  # which the adapter's is compared with
        learned = read_adapter(model, folders.adapter)
        packing = {} if check_options(folder, options, None) else options_of(model, options, None)
        read = _quantising(model, reader(model, folder), packing)
        _warn_of_base(model, learned, read, packing)
        adapted = {weight_name(model, path): partial(_change, learned, path) for path in learned.strengths}
        base = reader(empty, source) if target == "original" else read
        untie(empty, model, target)
        work = Work(target, source, empty, base, read, adapted)
        check_fits(work, {name: tensor.shape for name, tensor in model.state_dict().items()})
        ids = prompt_tokens(model, tokenizer_of(source))
        # The adapter model is the base with the products already added: in float32 that changes no answer.
        with torch.no_grad():
            before = log_probabilities(streamed(empty_model(folder, torch.float32), _with_adapter(read, adapted)), ids)
            alone = log_probabilities(streamed(model, read), ids)
        return finish(work, out, (ids, alone, before), anyway, progress)


def _quantising(model: "PreTrainedModel", read: Reader, packing: dict[str, Candidate]) -> Reader:
    """Return what reads as `read` does, and quantises layers as `load` would."""

    # Again in each pass: quantising is faster than a disk, and the codes of 7B would take 3.9 GB.
    def packed(name: str):
        layer = name.removesuffix(".weight")
        tensor = read(name)
        return quantised(model, layer, as_kept(model, name, tensor), packing[layer]) if layer in packing else tensor

    return packed


def _with_adapter(read: Reader, adapted: dict[str, Learned]) -> Reader:
    """Return what reads the weights of the adapter model, in float32: as decoded, plus what was learned."""

    def merged(name: str):
        base = read(name)
        return with_learned(base, adapted[name]) if name in adapted else base

    return merged


def _change(adapter: StoredLora, path: str, weight: torch.Tensor, rows: slice, *expert: int) -> torch.Tensor:
    r, alpha = adapter.strengths[path]
    lora_A, *by_row = (tensor[expert] for tensor in adapter.parts(path))  # [()] is the whole
    lora_B, *magnitude = (tensor[rows] for tensor in by_row)
    learned = (lora_B @ lora_A).mul_(alpha / adapter.kind.divisor(r))  # (rows, r) @ (r, in) -> (rows, in)
    return turned(weight, learned, *magnitude) if magnitude else learned


def _warn_of_base(model: "PreTrainedModel", adapter: StoredLora, read: Reader, packing: dict[str, Candidate]) -> None:
    """Warn as load_adapter does, of another base or other weights. A small tensor stands for each that is quantised."""
    zeros = {path: torch.zeros(options.block_size, dtype=torch.float32) for path, options in packing.items()}
    samples = {path: quantize(zeros[path], *options) for path, options in packing.items()}
    weights = (samples[path] if path in samples else read(weight_name(model, path)) for path in adapter.strengths)
    warn_of_base(model, weights, adapter.config, adapter.metadata, adapter.where)
