"""Load a model of transformers with its linear layers quantised on arrival, one tensor at a time.

Peak memory is the quantised model plus the largest tensor, never the full-precision model: the model is built on the
meta device, where tensors have shapes but no bytes, and each weight is read, quantised and dropped before the next.

A folder that is in 4 bits already (quantized_folder.py) is mapped: codes are not read until they are used.
Embeddings, head and norms keep their precision. At the end each tensor is the one that was read, or loading fails.
Not here: the folder (fetch.py), the empty model and its buffers (empty_model.py), names in files (stored.py), adapters
(adapters/lora.py).
"""

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.kernels import huge_pages
from qlora_lab.model.empty_model import NO_VALUE, compute_buffers, dtypes_of, empty_model, stored_options, tokenizer_of
from qlora_lab.model.fetch import KNOWN_MODELS, ModelError, resolve
from qlora_lab.model.language_model import as_names
from qlora_lab.model.linear4bit import linears_to_quantise
from qlora_lab.model.out_of_memory import telling_memory
from qlora_lab.model.packed import packed_tensors
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.parameter_count import ParameterCount
from qlora_lab.model.quantised import nothing_to_quantise, options_of, put, quantised
from qlora_lab.model.saving import refuse_to_save
from qlora_lab.model.share_in_4_bits import in_4_bits
from qlora_lab.model.stored import opened_once, stored_tensors
from qlora_lab.model.wide import widen
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook as named_codebook
from qlora_lab.quant.plan import DEFAULT, Candidate, Plan, as_plan
from qlora_lab.quant.quantize import WEIGHT_DTYPES, Quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name_or_path: str | Path = "smollm2-135m",
    codebook: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    plan: Plan | str | Path | None = None,
    also: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a quantised model, frozen and in evaluation mode, and its tokenizer.

    name_or_path: a known name, a local folder, or a hub id. codebook: a name that qlora_lab.codebook knows, or None: do
    not quantise. block_size, double_quant: see quantize. A folder that is quantised already keeps its own options.
    The layers of GPT-2, Conv1D, lie turned in its files, and are quantised as their transpose.
    plan: a Plan or its file, instead of these options, for layers that differ (quant/plan.py).
    also: parts to quantise beside the language model of one that sees, such as LLaVA: "vision_tower". By default none:
    they are few bytes, and every answer depends on them. Its tokenizer's `processor`, of transformers, reads pictures.
    dtype: of everything that is not quantised, and of the computation. None: bf16 where the machine multiplies it fast,
    else float32 (fp16 on an older GPU). What transformers always keeps in float32, such as DeepSeek's routing bias,
    stays so. device: None: a CUDA GPU if there is one.
    Raises ValueError for an unknown name or option, a plan of another model, or a model without linear layers;
    FileNotFoundError for a folder without a model; ModelError, naming the tensor, for one that is missing, extra,
    mis-shaped, not finite or cut off, and for an unsupported family; OutOfMemory, which says what would need less.
    Warns where less than 90 % of the weights are in 4 bits, and where tied weights differ in the files.
    """
    also = as_names(also)  # before anything is fetched or read
    if codebook is not None:
        named_codebook(codebook)
        check_block_size(block_size)
    plan, also = as_plan(plan), as_names(also)  # checked, a plan's file too, before the model's are read
    folder = resolve(name_or_path, progress=progress)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or fast_dtype(device)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype} is not supported: choose torch.float32, torch.bfloat16 or torch.float16")
    options = Candidate(codebook, block_size, double_quant)
    stored = check_options(folder, options, plan, also)
    with telling_memory(lambda: _too_large(folder, stored is not None, codebook)):
        model = empty_model(folder, dtype)
        model.config._name_or_path = model.name_or_path = public_name(name_or_path)
        dtypes = dtypes_of(model, dtype)  # some tensors stay in float32
        compute_buffers(model, device)  # rotary frequencies and the like, which no file holds
        if stored:
            tensors = _mapped(model, folder, progress)  # one at a time, each in its place before the next is read
        else:
            tensors = _quantised(model, folder, options_of(model, options, plan, also), device, dtypes, progress)
        placed = {name: _place(model, name, tensor, device, dtypes[name]) for name, tensor in tensors}
        missing = set(model.state_dict()) - set(placed)  # a head that is its embedding
        model.tie_weights(missing_keys=missing, recompute_mapping=False)
        widen(model)  # attention and head, on a CPU that is slow in bf16
        model.num_parameters = ParameterCount(model)
    _check_whole(model, placed)
    if codebook is not None or plan is not None:
        in_4_bits(model).warn_if_small(stacklevel=2)
    if stored or codebook is not None or plan is not None:
        refuse_to_save(model)
    return model.requires_grad_(False).eval(), tokenizer_of(folder)


def check_options(
    folder: Path, options: Candidate, plan: Plan | None, also: tuple[str, ...] = ()
) -> tuple[str, int, bool] | str | None:
    """Return stored_options. Raises ValueError for a folder that is quantised already, but not as it is asked for."""
    stored = stored_options(folder)
    if also and options.codebook is None and plan is None:
        raise ValueError(
            f"also={also[0]!r} is to be quantised, but codebook=None quantises nothing: leave out one of them"
        )
    if stored and (plan is not None or also or options not in (DEFAULT, stored)):  # DEFAULT: nothing was asked for
        other = "by a plan" if plan is not None else f"with {also[0]}" if also else f"as {tuple(options)}"
        raise ValueError(f"{folder} is quantised as {stored}, not {other}: leave the options out, or load the original")
    return stored


def _too_large(folder: Path, mapped: bool, codebook: str | None) -> str:
    if mapped:
        helps = "close other programs, or choose a smaller model"
    elif codebook is None:
        helps = 'load it in 4 bits, codebook="nf4" (--codebook nf4), or in dtype=torch.bfloat16 (--dtype bfloat16)'
    else:
        helps = "load the copy that `qlora-lab quantize` makes of it, which stays on the disk until it is used"
    return f"out of memory while {folder} was loaded: {helps}"


@lru_cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 where `device` multiplies it faster than float32 (fp16 on a GPU without bf16), else float32.

    On a CPU a race of about 0.1 s decides: its features do not tell which is faster.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float32
    from qlora_lab.kernels.product import race

    return torch.bfloat16 if race().use_bfloat16 else torch.float32


def public_name(name_or_path: str | Path) -> str:
    """Return the name of its base that an adapter records: a hub id where there is one, never a path in a cache."""
    model = KNOWN_MODELS.get(str(name_or_path))
    return model.hub_id if model else os.path.expanduser(str(name_or_path))


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """Return path -> weights for each linear layer to quantise, those that a plan names. Raises ValueError for none."""
    sizes = {path: linear.weight.numel() for path, linear in linears_to_quantise(model).items()}
    if not sizes:
        raise nothing_to_quantise(model)
    return sizes


def _quantised(
    model: "PreTrainedModel",
    folder: Path,
    options: dict[str, Candidate],
    device: torch.device,
    dtypes: dict[str, torch.dtype],
    progress: bool,
) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
    """Yield the tensors of an original one at a time, quantising those of the layers in `options`."""
    bar = tqdm(stored_tensors(model, folder).items(), "loading", unit="tensor", disable=not progress)
    for name, stored in bar:
        bar.set_postfix_str(name.removeprefix("model."), refresh=False)
        tensor = stored.read().to(device)
        layer = name.removesuffix(".weight")
        if layer in options:
            yield name, quantised(model, layer, tensor, options[layer])
        elif stored.rule is None and device.type == "cpu":  # a view of the file is copied, in the right dtype at once
            yield name, huge_pages.empty(tensor.shape, dtypes[name]).copy_(tensor)  # each token reads all of the head
        else:
            yield name, tensor.to(dtypes[name])


def _mapped(model: "PreTrainedModel", folder: Path, progress: bool) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
    """Yield the tensors of a folder in 4 bits. On the CPU all are views of files: codes are not read before use."""
    tensors = packed_tensors(model, folder)
    files = {key: file for packed in tensors.values() for key, file in packed.files.items()}
    with opened_once(files) as opened_files:
        for name, packed in tqdm(tensors.items(), "mapping", unit="tensor", disable=not progress):
            yield name, packed.take(opened_files)


def _place(
    model: "PreTrainedModel",
    name: str,
    tensor: torch.Tensor | Quantized,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor | Quantized, int]:
    """Put a tensor where it belongs. Returns what is there now, and how often that was written to."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(tensor, Quantized):
        put(model, name.removesuffix(".weight"), tensor.to(device))
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor.to(device, dtype)  # a saved buffer, such as a routing bias
    else:
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    return _seen(model, name)


def _seen(model: nn.Module, name: str) -> tuple[torch.Tensor | Quantized, int]:
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    tensor = tensor.weight if isinstance(tensor, PackedModule) else tensor  # a stack: a module in a parameter's place
    return tensor, getattr(tensor, "_version", 0)  # torch counts writes in place; packed weights have no count


def _check_whole(model: nn.Module, placed: dict[str, tuple[torch.Tensor | Quantized, int]]) -> None:
    """Raise ModelError unless each tensor is what was read from the files, unchanged, and none is without values."""
    for name, (tensor, version) in placed.items():
        there, version_there = _seen(model, name)
        if there is not tensor or version_there != version:  # replaced or written to by the family's own code
            raise ModelError(f"{name} is no longer what was read from the files: please report this family")
    for name, tensor in (*model.named_parameters(), *model.named_buffers(), *_plain_tensors(model)):
        if tensor.is_meta:
            raise ModelError(f"{name} {NO_VALUE}")


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that a module keeps as an ordinary attribute."""
    for path, module in model.named_modules():
        yield from ((f"{path}.{name}", value) for name, value in vars(module).items() if torch.is_tensor(value))
