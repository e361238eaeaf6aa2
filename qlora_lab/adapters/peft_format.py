"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one folder.

Beside them lies qlora-lab.sha256 with their checksums, which PEFT ignores.
Source: PEFT 0.21, utils/save_and_load.py. Keys are `base_model.model.PATH.lora_A.weight`, where PATH is the layer's.

The keys say which layers are adapted, not the patterns that once chose them. Strict: an adapter loads wholly or not at
all, and an error shows which keys differ. torch.compile adds a name to paths, which is left out of files, and passed
over in files of PEFT, which keeps it.
Not here: what the configuration may hold (peft_config.py), other bases (adapter_base.py), merging.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qlora_lab.adapters.adapter import adapters, has_adapters, learned
from qlora_lab.adapters.adapter_base import WEIGHTS_KEY, warn_of_base, weights_of
from qlora_lab.adapters.dora import DoRALinear
from qlora_lab.adapters.expert_lora import kind_beside
from qlora_lab.adapters.layer_patterns import WRAPPER, uncompiled
from qlora_lab.adapters.lora import adapt, lora_layers
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.method_files import METHOD, config_of, load_method, tensors_of
from qlora_lab.adapters.peft_config import check_settings, kind_of, lora_config, strength_of
from qlora_lab.adapters.peft_parameters import PAIR, by_layer, in_files
from qlora_lab.adapters.strength import check_dropout
from qlora_lab.adapters.targets import adaptable, linear_layers
from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, as_lines, sha256
from qlora_lab.files.home import expanded
from qlora_lab.files.out_path import check_outside_model, out_folder
from qlora_lab.files.replace import replacing_folder
from qlora_lab.files.strict_json import parse, read_json
from qlora_lab.files.tensor_file import save_tensors
from qlora_lab.model.layer_kinds import out_and_in
from qlora_lab.model.linear4bit import is_linear
from qlora_lab.model.loaded import check_model
from qlora_lab.quant.finite import is_finite
from qlora_lab.quant.quantize import WEIGHT_DTYPES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"  # refused: unpickling runs code
CARD = "README.md"  # PEFT adds one, and users edit it
PREFIX = "base_model.model."  # PEFT's two wrappers around a model
PARTS = (*PAIR, "lora_magnitude_vector")  # PEFT makes a module of each, whose tensor is its weight
SHOWN = 3  # names in an error


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of `model` to `folder` and return the folder. An older adapter is replaced; README.md stays.

    Raises ValueError if the model has no adapter, if its layers differ in dropout, if `folder` holds anything that does
    not belong to an adapter or lies in the model's folder, or if the path is empty.
    """
    folder = out_folder(folder)
    check_outside_model(folder, getattr(model, "name_or_path", None))
    made = adapters(model)  # raises if there is none
    if folder.exists() and (others := [path.name for path in folder.iterdir() if not _is_an_adapters(path)]):
        raise ValueError(f"{folder} holds {others[0]!r}, which is not part of an adapter: choose another folder")
    layers = {path: layer.plain() for path, layer in made.items() if isinstance(layer, LoRALinear)}
    config = {"base_model_name_or_path": getattr(model, "name_or_path", None)}
    config = (lora_config(model, layers) if layers else config_of(model)) | config
    tensors = in_files(model, _lora_tensors(layers), _key_of) if layers else tensors_of(model, PREFIX)
    bases = [layer.base for layer in layers.values()] if layers else linear_layers(model).values()
    metadata = {"format": "pt", WEIGHTS_KEY: weights_of(layer.weight for layer in bases)}
    with replacing_folder(folder) as staged:
        disk.write_text(staged / CONFIG, json.dumps(config, indent=2) + "\n")
        save_tensors(tensors, staged / WEIGHTS, metadata)
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


@dataclass(frozen=True)
class StoredLora:
    """An adapter's files, as they fit a model."""

    where: str  # for errors
    kind: type[LoRALinear]
    strengths: dict[str, tuple[int, float]]  # path of a layer -> (r, alpha), in the model's order
    tensors: dict[str, torch.Tensor]  # as adapter_tensors names them
    dropout: float
    config: dict
    metadata: dict

    def parts(self, path: str) -> list[torch.Tensor]:
        """Return lora_A and lora_B of a layer, and what its kind has besides, in float32."""
        return [self.tensors[_key(path, name)].float() for name in _parts(self.kind)]


def read_adapter(model: nn.Module, folder: str | Path) -> StoredLora:
    """Read LoRA's adapter in `folder` for `model`, which stays as it is. Raises what load_adapter raises."""
    folder = expanded(folder)
    return _fitting(model, folder, *_read(folder))


def _fitting(model: nn.Module, folder: Path, config: dict, tensors: dict, metadata: dict) -> StoredLora:
    where = f"the adapter in {folder}"
    layers = adaptable(model)
    check_settings(config, str(folder / CONFIG))
    kind = kind_of(config)
    parts = _parts(kind)
    tensors = by_layer(model, tensors, config, _key_of, where)
    dropout = config.get("lora_dropout") or 0.0
    for path, layer in layers.items():
        if _key(path, "lora_A") in tensors:
            kind_beside(layer, kind, dropout)  # raises for DoRA beside experts
    stored = _stored_paths(tensors, model, parts, where)
    try:
        strengths = {path: strength_of(config, stored[path]) for path in layers if path in stored}  # the model's order
        check_dropout("lora_dropout", dropout)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    values = {_key(path, name): tensors[f"{PREFIX}{stored[path]}.{name}.weight"] for path in stored for name in parts}
    _check_tensors(values, parts, strengths, layers, where)
    return StoredLora(where, kind, strengths, values, dropout, config, metadata)


def _parts(kind: type[LoRALinear]) -> tuple[str, ...]:
    return PARTS if kind is DoRALinear else PAIR


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter in `folder` to `model`, or replace the values of the model's own. Returns `model`.

    Ranks may differ between layers. Values may be float32, bf16 or fp16, and are widened exactly.
    Raises FileNotFoundError for a folder without an adapter, and ValueError for a file that cannot be read, for a
    setting that is not read, and for keys or shapes that differ from the model's; the model is then left as it was.
    Warns with UserWarning if the adapter was trained on another base, or on another code table.
    """
    check_model(model)
    folder = expanded(folder)
    config, tensors, metadata = _read(folder)
    if isinstance(config.get("peft_type"), str) and config["peft_type"] in METHOD:
        where = f"the adapter in {folder}"
        warn_of_base(model, [layer.weight for layer in linear_layers(model).values()], config, metadata, where)
        load_method(model, config, tensors, PREFIX, where)
        return model
    adapter = _fitting(model, folder, config, tensors, metadata)  # everything is checked before the model changes
    if has_adapters(model):
        _check_own(lora_layers(model), adapter.kind, adapter.strengths, adapter.where)
    layers = adaptable(model)
    weights = [layers[path].weight for path in adapter.strengths]
    warn_of_base(model, weights, adapter.config, adapter.metadata, adapter.where)
    if not has_adapters(model):
        adapt(model, adapter.strengths, adapter.dropout, adapter.kind)
    for path, layer in lora_layers(model).items():
        layer.set_strength(adapter.strengths[path][1], adapter.dropout)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            tensor.copy_(adapter.tensors[key])
    return model


def method_in(folder: str | Path) -> str:
    """Return the method of the adapter in `folder`, "lora" for what is none of the others. Raises what reading does."""
    folder = expanded(folder)
    _check_files(folder)
    return METHOD.get(str(read_json(folder / CONFIG).get("peft_type")), LoRALinear.method)


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return key -> tensor that learns, sharing memory with the model; keys of LoRA and its relatives are PEFT's."""
    return {_key(*path.rsplit(".", 1)): parameter.data for path, parameter in learned(model).items()}


def _key(path: str, name: str) -> str:
    return f"{_key_of(path)}.{name}{'.weight' * (name in PARTS)}"


def _key_of(path: str) -> str:
    return f"{PREFIX}{uncompiled(path)}"


# -------------------------------------------------------------------------------------------------------------- writing


def _lora_tensors(layers: dict[str, LoRALinear]) -> dict[str, torch.Tensor]:
    return {_key(path, name): p.data for path, layer in layers.items() for name, p in layer.learned().items()}


# -------------------------------------------------------------------------------------------------------------- reading


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor], dict[str, str]]:
    _check_files(folder)
    try:
        config = read_json(folder / CONFIG)
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            tensors = {_named(key): stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  (not a dict)
            metadata = stored.metadata() or {}
    except (ValueError, SafetensorError) as error:  # a ValueError of ours names its file already
        reason = error if isinstance(error, ValueError) else f"{WEIGHTS}: {error}"
        raise ValueError(f"the adapter in {folder} cannot be read ({reason}): save or copy it again") from None
    return config, tensors, metadata


def _named(key: str) -> str:
    return f"{key}{'.weight' * key.endswith('.lora_magnitude_vector')}"  # early PEFT had no module for it


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
            f"{folder} has {PICKLE}, a pickle (safe_serialization=False), which can run code and is not read: load it "
            f"with PEFT, and save it again as {WEIGHTS}"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    instead = f"but {_some(others)}: merge them into one file of this name" if others else "so it is not an adapter"
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}, {instead}")


def _stored_paths(
    tensors: dict[str, torch.Tensor], model: nn.Module, parts: tuple[str, ...], where: str
) -> dict[str, str]:
    """Return the path in the model -> the path in the file for each layer that the file adapts.

    Raises ValueError for a key that no adapter of a linear layer has, for half an adapter, and for two of one layer.
    """
    layers = {uncompiled(path): path for path in adaptable(model)}
    in_file = {key: path for key in tensors if uncompiled(path := _adapted_path(key, parts)) in layers}
    _check_others({key: tensor for key, tensor in tensors.items() if key not in in_file}, model, where)
    paths = sorted(set(in_file.values()))
    halves = sorted({f"{PREFIX}{path}.{name}.weight" for path in paths for name in parts} - tensors.keys())
    if halves:
        raise ValueError(f"{where} is not whole: {_some(halves)} missing from the file; copy or save it again")
    if not paths:
        raise ValueError(f"{where} holds no {' and '.join(parts)}: save it again with PEFT")
    stored = {layers[uncompiled(path)]: path for path in paths}
    if len(stored) < len(paths):
        raise ValueError(f"{where} adapts a layer twice, with {WRAPPER!r} in its name and without: save it again")
    return stored


def _adapted_path(key: str, parts: tuple[str, ...]) -> str:
    """Return the layer's path, or "" for any other key."""
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(parts)})\.weight", key)
    return match[1] if match else ""


def _check_others(tensors: dict[str, torch.Tensor], model: nn.Module, where: str) -> None:
    """Raise ValueError unless these tensors beside the adapters are the base's own."""
    modules = {uncompiled(path): module for path, module in model.named_modules()}
    modules |= {uncompiled(path): layer for path, layer in linear_layers(model).items()}  # as without adapters
    if strange := sorted(key for key in tensors if not _same_values(tensors[key], _of_base(key, modules))):
        headless = f"{getattr(model, 'base_model_prefix', '')}."
        raise ValueError(f"{where} holds {_some(strange)}, but {_why_strange(strange[0], modules, headless)}")


def _of_base(key: str, modules: dict[str, nn.Module]) -> torch.Tensor | None:
    """Return the base's own tensor of that name: PEFT adds embeddings and head to some adapters."""
    path, _, leaf = uncompiled(key).removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    own = getattr(modules.get(path), leaf, None)
    return own if isinstance(own, torch.Tensor) else None


def _same_values(stored: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Tell whether both come from one tensor: equal, but for a rounding of either to 16 bits.

    No tolerance where equality will do: a short training moves weights by less than a bf16 rounding does.
    """
    if own is None or own.shape != stored.shape or stored.dtype not in WEIGHT_DTYPES:
        return False
    if own.is_meta:  # `merge` loads no model
        what = "the adapter holds embeddings or a head as well, and no base is loaded to compare them with"
        raise ValueError(f"{what}: merge the loaded model with ql.merge, or save the adapter without them")
    own = own.detach().cpu()
    if {stored.dtype, own.dtype} == {torch.bfloat16, torch.float16}:  # rounded apart: by 2^-9, and by 2^-24 near 0
        return torch.allclose(stored.float(), own.float(), rtol=2**-8, atol=2**-24)
    rounded = (own.to(dtype).to(stored.dtype) for dtype in WEIGHT_DTYPES)  # PEFT keeps rounded embeddings in float32
    return torch.equal(stored.to(own.dtype), own) or any(torch.equal(stored, values) for values in rounded)


def _why_strange(key: str, modules: dict[str, nn.Module], headless: str) -> str:
    path = uncompiled(key).removeprefix(PREFIX).split(".lora_")[0]
    if "lora_embedding_" in key:
        return "adapters of embeddings (target_modules) are not read here: use it with PEFT, or merge it there"
    if ".trainable_tokens_" in key:
        return "rows of embeddings (trainable_token_indices) are not read here: use it with PEFT"
    if _of_base(key, modules) is not None:
        return (
            "this model has other values: they were trained or extended, and stored by save_embedding_layers, so merge "
            "it into its base with PEFT"
        )
    if path in modules and is_linear(modules[path]):
        return f"for a linear layer only {_key('PATH', 'lora_A')} and lora_B are read: save it again with PEFT"
    if path in modules:
        kind = type(modules[path]).__name__
        return (
            f"{path} is of type {kind} here: only linear layers and experts are adapted, so train it with other targets"
        )
    if headless + path in modules:
        return "it was trained on a model without a head (task_type FEATURE_EXTRACTION): use it with PEFT on that model"
    return "this model has no such layer: load the model that the adapter was trained on"


def _check_tensors(
    tensors: dict[str, torch.Tensor],
    parts: tuple[str, ...],
    strengths: dict[str, tuple[int, float]],
    layers: dict[str, nn.Module],
    where: str,
) -> None:
    for path, (r, _) in strengths.items():
        rows, columns = out_and_in(layers[path])
        experts = layers[path].weight.shape[:-2]  # () of a linear layer
        wanted = (*experts, r, columns), (*experts, rows, r), (rows,)  # in the order of PARTS
        for name, shape in zip(parts, wanted, strict=False):
            tensor = tensors[_key(path, name)]
            if tensor.shape != shape:
                fix = "load the model that the adapter was trained on"
                if name == "lora_A" and tensor.shape[-1:] == shape[-1:]:  # only the rank differs
                    fix = f"mend r or rank_pattern in its {CONFIG} (PEFT sorts patterns, and the first one counts)"
                raise ValueError(
                    f"{where} does not fit: {path}.{name} has shape {tuple(tensor.shape)}, but with r={r} this model's "
                    f"layer needs {shape}; {fix}"
                )
            if tensor.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{where} has {path}.{name} in {tensor.dtype}: save it in float32, bf16 or fp16")
            if not is_finite(tensor):
                raise ValueError(f"{where} has NaN or infinity in {path}.{name}: use the adapter of an earlier step")


def _check_own(
    own: dict[str, LoRALinear], kind: type[LoRALinear], strengths: dict[str, tuple[int, float]], where: str
) -> None:
    """Raise ValueError unless the model's own adapter has the same kind, layers and ranks."""
    if others := {layer.method for layer in own.values() if layer.method != kind.method}:
        found = others.pop()
        raise ValueError(f"{where} is of method {kind.method}, but the model's own is {found}: load the model anew")
    ours = {path: layer.r for path, layer in own.items()}
    theirs = {path: r for path, (r, _) in strengths.items()}
    for path in [*ours, *theirs]:
        if ours.get(path) != theirs.get(path):
            a, b = (f"r={ranks[path]}" if path in ranks else "nothing" for ranks in (theirs, ours))
            raise ValueError(f"{where} has {a} at {path}, but the model's own has {b}: load the model without one")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
