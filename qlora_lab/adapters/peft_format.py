"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one folder.

Beside them lies qlora-lab.sha256 with their checksums, which PEFT ignores.
Source: PEFT 0.21, utils/save_and_load.py. Keys are `base_model.model.PATH.lora_A.weight`, where PATH is the layer's.

The keys say which layers are adapted, not the patterns that once chose them. Strict: an adapter loads wholly or not at
all, and an error shows which keys differ.
Not here: what the configuration may hold (peft_config.py), other bases (adapter_base.py), merging.
"""

import json
import re
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lab.adapters.adapter_base import WEIGHTS_KEY, warn_of_base, weights_of
from qlora_lab.adapters.lora import LoRALinear, adapt, adapters, check_strength, has_adapters, linear_layers
from qlora_lab.adapters.peft_config import check_settings, pattern_of, strength_of
from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, as_lines, sha256
from qlora_lab.files.out_path import out_folder
from qlora_lab.files.replace import replacing_folder
from qlora_lab.files.strict_json import parse, read_json
from qlora_lab.files.tensor_file import save_tensors
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.finite import is_finite
from qlora_lab.quant.quantize import WEIGHT_DTYPES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # refused: unpickling runs code
CARD = "README.md"  # PEFT adds one, and users edit it
PREFIX = "base_model.model."  # PEFT's two wrappers around a model
PAIR = ("lora_A", "lora_B")
SHOWN = 3  # names in an error


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of `model` to `folder` and return the folder. An older adapter is replaced; README.md stays.

    Raises ValueError if the model has no adapter, if its layers differ in dropout, if `folder` holds anything that does
    not belong to an adapter, or if the path is empty.
    """
    folder = out_folder(folder)
    layers = adapters(model)
    if folder.exists() and (others := [path.name for path in folder.iterdir() if not _is_an_adapters(path)]):
        raise ValueError(f"{folder} holds {others[0]!r}, which is not part of an adapter: choose another folder")
    dropouts = {layer.dropout.p for layer in layers.values()}
    if len(dropouts) > 1:
        raise ValueError(f"layers differ in dropout ({sorted(dropouts)}), but a folder holds one: set it in all layers")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        **_strengths(layers),  # r, lora_alpha, and patterns for layers that differ
        "lora_dropout": dropouts.pop(),
        "target_modules": _target_names(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    metadata = {"format": "pt", WEIGHTS_KEY: weights_of(layer.base for layer in layers.values())}
    with replacing_folder(folder) as staged:
        disk.write_text(staged / CONFIG, json.dumps(config, indent=2) + "\n")
        save_tensors(adapter_tensors(model), staged / WEIGHTS, metadata)
        _order_metadata(staged / WEIGHTS, metadata)
        if (folder / CARD).exists():
            disk.copy(folder / CARD, staged / CARD)
        disk.copy_mode(staged / CONFIG, staged / WEIGHTS)  # safetensors lets only the owner read its files
        disk.write_bytes(staged / SUMS, as_lines({name: sha256(staged / name) for name in (CONFIG, WEIGHTS)}))
    return folder


def _is_an_adapters(path: Path) -> bool:
    return path.is_file() and path.name in (CONFIG, WEIGHTS, CARD, SUMS)


def _order_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Rewrite the header with the metadata in this order: safetensors varies it, but one adapter is one file."""
    with disk.open_for(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")  # bytes of the header, which follows as JSON
        header = parse(opened.read(size).decode(), str(file))
        header["__metadata__"] = metadata  # a dict keeps its order
        # Padded to its old size, so no tensor moves.
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, f"a header of {size} bytes became {len(text)}"
        opened.seek(8)
        disk.write_all(opened, text)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter in `folder` to `model`, or replace the values of the model's own. Returns `model`.

    Ranks may differ between layers. Values may be float32, bf16 or fp16, and are widened exactly.
    Raises FileNotFoundError for a folder without an adapter, and ValueError for a file that cannot be read, for a
    setting that makes it more than plain LoRA, and for keys or shapes that differ from the model's; the model is then
    left as it was. Warns with UserWarning if the adapter was trained on another base, or on another code table.
    """
    where = f"the adapter in {folder}"
    layers = linear_layers(model)
    config, tensors, metadata = _read(Path(folder))
    paths = _paths(tensors, model, where)
    dropout = config.get("lora_dropout") or 0.0
    try:
        strengths = {path: strength_of(config, path) for path in layers if path in paths}  # in the model's order
        check_strength(1, dropout)  # alpha is checked by strength_of
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG}: {error}") from None
    _check_tensors(tensors, strengths, layers, where)  # everything is checked before the model changes
    if has_adapters(model):
        _check_own(adapters(model), strengths, where)
    warn_of_base(model, [layers[path] for path in strengths], config, metadata, where)
    if not has_adapters(model):
        adapt(model, strengths, dropout)
    for path, layer in adapters(model).items():
        layer.set_strength(strengths[path][1], dropout)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            tensor.copy_(tensors[key])
    return model


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return PEFT's key -> lora_A or lora_B, sharing memory with the model."""
    return {_key(path, name): getattr(layer, name).data for path, layer in adapters(model).items() for name in PAIR}


def _key(path: str, name: str) -> str:
    return f"{PREFIX}{path}.{name}.weight"


# -------------------------------------------------------------------------------------------------------------- writing


def _strengths(layers: dict[str, LoRALinear]) -> dict:
    """Return the settings for r and alpha: the most frequent values, and patterns for the other layers."""
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_of(path): layer.r for path, layer in layers.items() if layer.r != r},
        "alpha_pattern": {pattern_of(path): layer.alpha for path, layer in layers.items() if layer.alpha != alpha},
    }


def _target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Return last names if they match exactly these layers, else whole paths; PEFT takes either."""
    names = sorted({path.split(".")[-1] for path in paths})  # q_proj, v_proj
    meant = {path for path, _ in model.named_modules() if path.split(".")[-1] in names}
    return names if meant <= set(paths) else paths


# -------------------------------------------------------------------------------------------------------------- reading


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    _check_files(folder)
    try:
        config = read_json(folder / CONFIG)
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (not a dict)
            metadata = stored.metadata() or {}
    except (ValueError, SafetensorError) as error:  # a ValueError of ours names its file already
        reason = error if isinstance(error, ValueError) else f"{WEIGHTS}: {error}"
        raise ValueError(f"the adapter in {folder} cannot be read ({reason}): save or copy it again") from None
    check_settings(config, str(folder / CONFIG))
    return config, tensors, metadata


def _check_files(folder: Path) -> None:
    """Raise FileNotFoundError unless both files are there; the message is guessed from the folder's content."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name a local folder with {CONFIG} and {WEIGHTS}")
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        instead = f"but its subfolders {_some(inner)} have: name one of them" if inner else "so it is not an adapter"
        raise FileNotFoundError(f"{folder} has no {CONFIG}, {instead}")
    if (folder / WEIGHTS).is_file():
        return
    if (folder / PICKLE).is_file():
        raise FileNotFoundError(
            f"{folder} has {PICKLE}, a pickle, which can run code and is not read: load it with PEFT, and save it "
            f"again as {WEIGHTS}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    instead = f"but {_some(others)}: merge them into one file of this name" if others else "so it is not an adapter"
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}, {instead}")


def _paths(tensors: dict[str, torch.Tensor], model: nn.Module, where: str) -> set[str]:
    """Return the layers that the file adapts. Raises ValueError for a key that no adapter of a linear layer has."""
    layers = linear_layers(model)
    modules = dict(model.named_modules()) | layers  # by the paths that a model without adapters has
    paths = {path for key in tensors if (path := _adapted_path(key)) in layers}
    others = [key for key in tensors if _adapted_path(key) not in layers]
    if strange := sorted(key for key in others if not _same_values(tensors[key], _of_base(key, modules))):
        raise ValueError(f"{where} holds {_some(strange)}, but {_why_strange(strange[0], modules)}")
    if halves := sorted({_key(path, name) for path in paths for name in PAIR} - tensors.keys()):
        raise ValueError(f"{where} is not whole: {_some(halves)} missing from the file; copy or save it again")
    if not paths:
        raise ValueError(f"{where} holds no lora_A and lora_B: save it again with PEFT")
    return paths


def _adapted_path(key: str) -> str | None:
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B)\.weight", key)
    return match[1] if match else None


def _of_base(key: str, modules: dict[str, nn.Module]) -> torch.Tensor | None:
    """Return the base's own tensor of that name: PEFT adds embeddings and head to some adapters."""
    path, _, leaf = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    own = getattr(modules.get(path), leaf, None)
    return own if isinstance(own, torch.Tensor) else None


def _same_values(stored: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Tell whether both are equal, but for a rounding of either to bf16 (2^-9) or fp16 (2^-24 near 0)."""
    if own is None or own.shape != stored.shape or stored.dtype not in WEIGHT_DTYPES:
        return False
    return torch.allclose(stored.float(), own.detach().cpu().float(), rtol=2**-8, atol=2**-24)


def _why_strange(key: str, modules: dict[str, nn.Module]) -> str:
    path = key.removeprefix(PREFIX).split(".lora_")[0]
    if "lora_embedding_" in key:
        return "adapters of embeddings are not read here: use PEFT, or merge it there and load the result"
    if _of_base(key, modules) is not None:
        return "this model has other values: they were trained or extended, so merge it into its base with PEFT"
    if isinstance(modules.get(path), (nn.Linear, Linear4bit)):
        return f"for a linear layer only {_key('PATH', 'lora_A')} and lora_B are read: save it again with PEFT"
    if path in modules:
        return f"{path} is of type {type(modules[path]).__name__} here: only linear layers are adapted"
    return "this model has no such layer: load the model that the adapter was trained on"


def _check_tensors(
    tensors: dict[str, torch.Tensor], strengths: dict[str, tuple[int, float]], layers: dict[str, nn.Module], where: str
) -> None:
    for path, (r, _) in strengths.items():
        wanted = (r, layers[path].in_features), (layers[path].out_features, r)  # of lora_A, of lora_B
        for name, shape in zip(PAIR, wanted, strict=True):
            tensor = tensors[_key(path, name)]
            if tensor.shape != shape:
                raise ValueError(
                    f"{where} does not fit: {path}.{name} has shape {tuple(tensor.shape)}, but with r={r} this model's "
                    f"layer needs {shape}; load the model that the adapter was trained on"
                )
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{where} has {path}.{name} in {tensor.dtype}: save it in float32, bf16 or fp16")
            if not is_finite(tensor):
                raise ValueError(f"{where} has NaN or infinity in {path}.{name}: use the adapter of an earlier step")


def _check_own(own: dict[str, LoRALinear], strengths: dict[str, tuple[int, float]], where: str) -> None:
    """Raise ValueError unless the model's own adapter has the same layers and ranks."""
    ours = {path: layer.r for path, layer in own.items()}
    theirs = {path: r for path, (r, _) in strengths.items()}
    for path in [*ours, *theirs]:
        if ours.get(path) != theirs.get(path):
            a, b = (f"r={ranks[path]}" if path in ranks else "nothing" for ranks in (theirs, ours))
            raise ValueError(f"{where} has {a} at {path}, but the model's own has {b}: load the model without one")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
