"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors in one folder.

In: an adapted model. Out: a folder that peft.PeftModel.from_pretrained loads, and load_adapter.
Source: PEFT 0.21, utils/save_and_load.py. Keys are `base_model.model.PATH.lora_A.weight`, PATH being the layer's.

Strict both ways: an adapter loads wholly or not at all, and an error shows which keys differ.
Not here: merging an adapter into its base.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lab.finetune.files import replacing_folder
from qlora_lab.finetune.lora import adapters, add_lora, choose_targets, has_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG, WEIGHTS, "README.md")  # PEFT adds a model card
PREFIX = "base_model.model."
VARIANTS = ("use_rslora", "use_dora", "use_qalora", "alora_invocation_tokens", "rank_pattern", "alpha_pattern")


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of `model` to `folder`, replacing it as a whole if it is there. Returns the folder.

    Raises ValueError if the model has no adapter, if its layers differ in rank, strength or dropout, or if `folder`
    holds anything that is not an adapter's.
    """
    layers = adapters(model)
    if Path(folder).exists() and (others := [p.name for p in Path(folder).iterdir() if p.name not in ADAPTER_FILES]):
        raise ValueError(f"{folder} holds {others[0]!r}, which is no part of an adapter: choose a folder of its own")
    settings = {(layer.r, layer.alpha, layer.dropout.p) for layer in layers.values()}
    if len(settings) > 1:
        raise ValueError(f"adapters of different (r, alpha, dropout) {sorted(settings)} do not fit into one folder")
    r, alpha, dropout = settings.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": _target_names(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with replacing_folder(folder) as staged:
        (staged / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(adapter_tensors(model), staged / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(staged / CONFIG, staged / WEIGHTS)  # safetensors writes files that only their owner can read
    return Path(folder)


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add the adapter in `folder` to `model`, or replace the values of the one it has. Returns `model`.

    Raises FileNotFoundError for a folder without an adapter, and ValueError for a file that cannot be read, for a
    variant other than plain LoRA, and for keys or shapes that differ from the model's, which is then left as it was.
    """
    folder = Path(folder)
    config, stored = _read(folder)
    adapted = has_adapters(model)
    expected = {k: v.shape for k, v in adapter_tensors(model).items()} if adapted else _planned_shapes(model, config)
    _compare({k: v.shape for k, v in stored.items()}, expected, folder)
    if not adapted:
        add_lora(model, config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"])
    for layer in adapters(model).values():
        layer.set_strength(config["lora_alpha"], config["lora_dropout"])
    with torch.no_grad():
        for key, tensor in adapter_tensors(model).items():
            tensor.copy_(stored[key])
    return model


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """PEFT's key -> lora_A or lora_B, sharing memory with the model."""
    return {
        f"{PREFIX}{path}.{name}.weight": getattr(layer, name).data
        for path, layer in adapters(model).items()
        for name in ("lora_A", "lora_B")
    }


def _target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names if they mean just these layers, else whole paths; PEFT takes either."""
    names = sorted({path.split(".")[-1] for path in paths})
    everywhere = {p.removesuffix(".base") for p in choose_targets(model, "all-linear")}
    meant = {path for path in everywhere if path.split(".")[-1] in names}
    return names if meant <= set(paths) else paths


def _read(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: an adapter folder holds {CONFIG} and {WEIGHTS}")
    try:
        config, stored = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"an adapter file in {folder} cannot be read ({error}): save or copy it again") from None
    if not isinstance(config, dict) or (
        missing := [k for k in ("r", "lora_alpha", "target_modules") if k not in config]
    ):
        what = missing[0] if isinstance(config, dict) else "a JSON object"
        raise ValueError(f"{folder / CONFIG} lacks {what}: it is no adapter configuration of PEFT")
    config.setdefault("lora_dropout", 0.0)
    variants = [name for name in VARIANTS if config.get(name)]
    if config.get("peft_type") != "LORA" or variants:
        what = ", ".join(variants) or config.get("peft_type")
        raise ValueError(f"the adapter in {folder} uses {what}: only plain LoRA is known here")
    return config, stored


def _planned_shapes(model: nn.Module, config: dict) -> dict[str, torch.Size]:
    """What adapter_tensors would hold, had the model this adapter."""
    r, targets = config["r"], config["target_modules"]
    return {
        f"{PREFIX}{path}.{name}.weight": torch.Size(shape)
        for path, layer in choose_targets(model, targets).items()
        for name, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r)))
    }


def _compare(stored: dict[str, torch.Size], expected: dict[str, torch.Size], folder: Path) -> None:
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    shapes = [key for key in expected.keys() & stored.keys() if expected[key] != stored[key]]
    for keys, what in ((missing, "missing from the file"), (extra, "not in the model"), (shapes, "of another shape")):
        if keys:
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(f"the adapter in {folder} does not fit this model: {keys[0]}{more} {what}")
