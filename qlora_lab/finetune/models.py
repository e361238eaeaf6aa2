"""Load a model of transformers with its linear layers quantised on arrival, one tensor at a time.

In: a known name, a local folder, or a hub id. Out: (model, tokenizer), the model frozen and in evaluation mode.
Peak memory is the quantised model plus the largest tensor, never the full-precision model: the model is built on the
meta device, where tensors have shapes and no bytes, and each weight is read, quantised and dropped before the next.

A folder that is in 4 bits already (quantized_folder.py) is mapped: no tensor is read before it is used.
Embeddings, lm_head and norms keep their precision. Buffers that no checkpoint holds (rotary frequencies) are computed.
Not here: finding and fetching the folder (fetch.py), adapters (lora.py).
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.finetune.fetch import KNOWN_MODELS, ModelError, resolve, weight_files
from qlora_lab.finetune.linear4bit import HEAD, Linear4bit, is_quantisable
from qlora_lab.finetune.wide import widen
from qlora_lab.quant.block_size import DEFAULT, Candidate, Plan, as_plan, of_layers
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook as named_codebook
from qlora_lab.quant.quantize import WEIGHT_DTYPES, quantize
from qlora_lab.quant.serialize import from_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    name_or_path: str | Path = "smollm2-135m",
    codebook: str | None = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    plan: Plan | str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A quantised model and its tokenizer.

    codebook: a name that qlora_lab.codebook knows, or None for no quantisation. block_size, double_quant: see quantize.
    A folder that is quantised already has its own.
    plan: or its file, instead of these options, for layers that differ (quant/block_size.py).
    dtype: of everything that is not quantised, and of the computation; None takes bf16 where the machine multiplies it
    fast, else float32 (fp16 on an older GPU). device: None takes a CUDA GPU if there is one.
    Raises ValueError for a name or option that is not known, a plan of another model, or a model without linear layers;
    FileNotFoundError for a folder without a model; ModelError for a tensor that is missing, extra, mis-shaped or cut
    off: each names it.
    """
    if codebook is not None:  # before anything is fetched or read
        named_codebook(codebook)
        check_block_size(block_size)
    plan = as_plan(plan)
    folder = resolve(name_or_path, progress=progress)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or fast_dtype(device)
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype={dtype} is not supported: choose float32, bfloat16 or float16 of torch")
    model = empty_model(folder, dtype)
    model.config._name_or_path = model.name_or_path = public_name(name_or_path)
    asked = Candidate(codebook, block_size, double_quant)
    if stored := stored_options(folder):
        if plan is not None or asked not in (DEFAULT, stored):
            given = "by a plan" if plan is not None else f"as {tuple(asked)}"
            raise ValueError(
                f"{folder} is quantised as {stored}, not {given}: leave the options out, or load the original"
            )
        _map(model, folder, device, dtype, progress)
    else:
        options = {} if codebook is None and plan is None else of_layers(asked, plan, layer_sizes(model))
        for name, tensor in _read(folder, model, progress):
            _place(model, name, tensor.to(device), options, dtype)
    _compute_buffers(model, device)
    model.tie_weights()
    widen(model)
    return model.requires_grad_(False).eval(), _tokenizer(folder)


@lru_cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where `device` multiplies it faster than float32 (fp16 on a GPU without bf16), else float32.

    On a CPU this is raced, in about 0.1 s, and not read off its features.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type != "cpu":
        return torch.float32
    from qlora_lab.kernels.product import race

    return torch.bfloat16 if race().use_bfloat16 else torch.float32


def public_name(name_or_path: str | Path) -> str:
    """What an adapter says its base is: a hub id where there is one, and no path of a cache."""
    known = KNOWN_MODELS.get(str(name_or_path))
    return known.hub_id if known else str(name_or_path)


def _tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json is the whole truth. AutoTokenizer rebuilds some classes from their parts and loses a rule: with
    # transformers 5.23 a GPT2Tokenizer folder no longer splits digits one by one, as SmolLM2 was trained to see them.
    kind = PreTrainedTokenizerFast if (folder / "tokenizer.json").exists() else AutoTokenizer
    return kind.from_pretrained(folder)


def empty_model(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    stored_options(folder)  # raises
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it is for transformers' own loader
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def expected_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}


def layer_sizes(model: nn.Module) -> dict[str, int]:
    """Path of each layer to quantise -> its weights. Raises ValueError for a model that has none."""
    shapes = expected_shapes(model)
    sizes = {name.removesuffix(".weight"): shapes[name].numel() for name in shapes if is_linear_weight(model, name)}
    if not sizes:  # GPT-2's are Conv1D
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantise besides {HEAD}: load it with codebook=None"
        )
    return sizes


def stored_options(folder: Path) -> tuple[str, int, bool] | str | None:
    """(codebook, block size, double quantization) of a folder in 4 bits (quantized_folder.py); None for an original.

    Where layers differ it is a word that says so: each tensor has its own beside it.

    Raises ModelError for a model that is quantised by anything else.
    """
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if not found:
        return None
    if found.get("quant_method") not in ("bitsandbytes", "qlora_lab") or not found.get("load_in_4bit"):
        method = found.get("quant_method", "an unknown method")
        raise ModelError(f"{folder} holds a model quantised by {method}: load the original, which is quantised here")
    if "plan" in found:
        return f"mixed by its {found['plan']}"
    return (
        found.get("bnb_4bit_quant_type", "fp4"),  # what is left out has bitsandbytes' default
        found.get("block_size", 64),
        found.get("bnb_4bit_use_double_quant", False),
    )


def _map(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype, progress: bool) -> None:
    """Place what a folder in 4 bits holds. On the CPU nothing is read before it is used: tensors are views of files."""
    files, expected = files_of(folder), expected_shapes(model)
    parts: dict[str, list[str]] = {}
    for key in files:
        name, dot, _ = key.partition(".weight.")
        parts.setdefault(f"{name}.weight" if dot else key, []).append(key)
    names = _check_names(folder, parts, model)
    if not any(len(parts[name]) > 1 for name in names):
        raise ModelError(f"{folder} is quantised by its config.json, but not its tensors: mend one of the two")
    with ExitStack() as stack:
        stored = {path: stack.enter_context(opened(path)) for path in set(files.values())}
        for name in tqdm(names, "mapping", unit="tensor", disable=not progress):
            tensors = {key: stored[files[key]].get_tensor(key) for key in parts[name]}
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            if len(tensors) == 1:
                tensor = tensors[name]
            else:
                try:
                    tensor = from_tensors(tensors, name)
                except (KeyError, ValueError) as error:
                    raise ModelError(f"{files[name]}: {error.args[0]}") from None
            _check_shape(files[name], name, tensor.shape, expected[name])
            if len(tensors) == 1:
                setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
            else:
                model.set_submodule(path, Linear4bit(tensor.to(device), module.bias))


def _read(folder: Path, model: "PreTrainedModel", progress: bool) -> Iterator[tuple[str, torch.Tensor]]:
    files, shapes = files_for(model, folder), expected_shapes(model)
    bar = tqdm(files, "loading", unit="tensor", disable=not progress)
    for name in bar:
        bar.set_postfix_str(name.removeprefix("model."), refresh=False)
        yield name, read_tensor(files[name], name, shapes[name])


def read_tensor(file: Path, name: str, shape: torch.Size) -> torch.Tensor:
    """A view of the file, which is opened anew for each tensor: dropping it is what gives its pages back."""
    with opened(file) as stored:
        tensor = stored.get_tensor(name)
    _check_shape(file, name, tensor.shape, shape)
    return tensor


def _check_shape(file: Path, name: str, given: torch.Size, wanted: torch.Size) -> None:
    if given != wanted:
        raise ModelError(f"{file}: {name} has shape {tuple(given)}, but config.json asks for {tuple(wanted)}")


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, in the files' order."""
    files = {}
    for path in weight_files(folder):
        with opened(path) as stored:
            for name in stored.keys():  # noqa: SIM118  (not a dict: it has no __iter__)
                if files.setdefault(name, path) != path:
                    raise ModelError(f"{name} is in {files[name].name} and in {path.name}: keep one of the two files")
    return files


def files_for(model: "PreTrainedModel", folder: Path) -> dict[str, Path]:
    """files_of an original, for the tensors that `model` reads. Raises ModelError for one that is missing or extra."""
    files = files_of(folder)
    return {name: files[name] for name in _check_names(folder, files, model)}


def _check_names(folder: Path, found: Iterable[str], model: "PreTrainedModel") -> list[str]:
    """Those of the names `found` in `folder` that the model reads, in their order."""
    expected, stored = set(expected_shapes(model)), set(found)
    # a tied head is the embedding; files hold it twice or once
    absent = {f"{HEAD}.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(expected - absent - stored)
    extra = sorted(n for n in stored - expected if not n.endswith("rotary_emb.inv_freq"))  # old exports have it
    for names, what in ((missing, "missing from"), (extra, "not part of the model, but in")):
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            raise ModelError(f"{names[0]}{more}: {what} {folder}; config.json and weights do not belong together")
    return [name for name in found if name in expected - absent]


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is cut off or no safetensors file ({error}): delete it and fetch it again") from None


def is_linear_weight(model: nn.Module, name: str) -> bool:
    """Whether `name` is the weight of a layer to quantise."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and is_quantisable(path, model.get_submodule(path))


def _place(model, name, tensor, options: dict[str, Candidate], dtype) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and path in options:
        weight = quantize(tensor, *options[path], name=name)
        model.set_submodule(path, Linear4bit(weight, module.bias))
    else:
        # a copy, because the tensor is a view of the file; clone() would keep its dtype
        setattr(module, leaf, nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False))


def _compute_buffers(model: nn.Module, device: torch.device) -> None:
    """Rotary frequencies and their like depend on the configuration alone: build their module again, off meta."""
    for name, module in model.named_modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            try:
                fresh = type(module)(config=model.config)
            except TypeError:
                raise ModelError(f"{name} ({type(module).__name__}) has buffers that no file holds") from None
            model.set_submodule(name, fresh.to(device))
