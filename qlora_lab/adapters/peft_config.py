"""What adapter_config.json sets, field by field: honoured, known to change no answer, or refused by name.

Source: PEFT 0.21, tuners/lora/config.py for the fields, layer.py for what each initialisation does to the base.

The lists name what is known to be harmless. A field or value that is in none of them, such as one of a later PEFT, is
refused unless it is off: an adapter that is misread answers wrongly, and nothing says so.
"""

import math
from collections import Counter
from reprlib import repr as short
from typing import Any

from torch import nn

from qlora_lab.adapters.dora import DoRALinear
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.layer_patterns import first_match, pattern_of, uncompiled
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.peft_parameters import SETTING, is_named, misread, parameter_names
from qlora_lab.adapters.rslora import RsLoRALinear
from qlora_lab.adapters.strength import check_alpha
from qlora_lab.model.layer_kinds import is_turned
from qlora_lab.quant.numbers import check_whole

HONOURED = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
HONOURED += ("base_model_name_or_path", "revision")  # adapter_base.py compares them
# The tensors' keys show which layers these settings chose.
CHOICES_OF_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
# Where the adapter came from and what it was trained for: its keys show if it fits. Settings that matter only together
# with a refused one. fan_in_fan_out: the layer tells its layout (model/layer_kinds.py), as in PEFT.
WITHOUT_EFFECT = ("auto_mapping", "peft_version", "task_type", "inference_mode", "runtime_config", "fan_in_fan_out")
WITHOUT_EFFECT += ("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (True, False, None),
    "use_dora": (True, False, None),
    # These draw A and B and leave the base alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from the base what A
    # and B start with, and the file lacks that base; MiCA trains only one of the two.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
MUST_BE_OFF = {  # setting -> why an adapter that uses it is more than plain LoRA
    "kasa_config": "KaSA cuts the weights of the base",
    "layer_replication": "it repeats layers of the base",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embeddings were trained beside the adapter",
    "ensure_weight_tying": "it ties adapters of the embeddings and the head",
    "lora_bias": "its lora_B has a bias",
    "use_qalora": "QALoRA pools the adapter's input",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow chooses between adapters for each token",
    "monteclora_config": "MonteCLoRA draws adapters at random",
    "velora_config": "VeLoRA trains by another backward pass",
    "megatron_config": "it is for layers of Megatron",
}
REASONS = MUST_BE_OFF | {
    "peft_type": "another method",
    "bias": "biases of the base were trained beside the adapter",
    "init_lora_weights": "not known to leave the weights of the base alone",
    "use_rslora": "neither true nor false",
    "use_dora": "neither true nor false",
}
UNKNOWN = "an unknown setting"


def check_settings(config: dict, where: str) -> None:
    """Raise ValueError for the first setting that makes an adapter anything but LoRA, rsLoRA or DoRA.

    config: the content of adapter_config.json. where: what an error calls the adapter.
    """
    for name in ("peft_type", *config):  # the method first: in another one the other names mean something else
        if not _is_read(name, config.get(name)):
            shown = name if name.isprintable() else ascii(name)
            reason = REASONS.get(name, UNKNOWN)
            raise ValueError(
                f"{where} has {shown}={short(config.get(name))} ({reason}), but only LoRA, rsLoRA and DoRA are read "
                "here: use it with PEFT, or merge it there and load the result"
            )
    if missing := [name for name in ("r", "lora_alpha") if config.get(name) is None]:
        raise ValueError(f"{where} has no {missing[0]} in its configuration: save it again with PEFT")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{where} has {name}={short(config[name])}: it must map names of layers to numbers")
    named = config.get(SETTING) or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{where} has {SETTING}={short(named)}: it must be a list of names of parameters")


def strength_of(config: dict, path: str) -> tuple[int, float]:
    """Return (r, alpha) of the adapter beside the layer at `path`, as a layer of kind_of(config) takes them.

    Patterns see a layer's weight where target_parameters names that.

    Raises ValueError that names the setting, and its pattern, if the value is not allowed.
    """
    path = f"{path}.weight" if is_named(config, f"{path}.weight") else path
    r_from, r = _of_layer(config, path, "rank_pattern", "r")
    alpha_from, alpha = _of_layer(config, path, "alpha_pattern", "lora_alpha")
    check_whole(r_from, r)
    check_alpha(alpha_from, alpha)
    if config.get("use_rslora") and kind_of(config) is not RsLoRALinear:
        alpha *= math.sqrt(r)  # a DoRA that scales by alpha / sqrt(r)
        check_alpha(f"use_rslora with {alpha_from} * sqrt(r)", alpha)
    return r, alpha


def kind_of(config: dict) -> type[LoRALinear]:
    """Return the kind of layer that the settings mean."""
    if config.get("use_dora"):
        return DoRALinear
    return RsLoRALinear if config.get("use_rslora") else LoRALinear


def _is_read(name: str, value) -> bool:
    if name in (*HONOURED, *CHOICES_OF_LAYERS, *WITHOUT_EFFECT):
        return True
    if name in ALLOWED:
        return value in ALLOWED[name]
    return value is None or value is False or value in ([], {}, "")  # off; 0 is not, it may be a number's value


def _of_layer(config: dict, path: str, patterns: str, otherwise: str) -> tuple[str, Any]:
    """Return (its place in `config`, value) of the first pattern that the end of `path` matches, or of `otherwise`."""
    return first_match(config.get(patterns) or {}, path, patterns) or (otherwise, config[otherwise])


# ------------------------------------------------------------------------------------------------------------- writing


def lora_config(model: nn.Module, layers: dict[str, LoRALinear]) -> dict:
    """Return the settings of these adapters of `model`. Raises ValueError for layers that differ in dropout."""
    dropouts = {layer.dropout.p for layer in layers.values()}
    if len(dropouts) > 1:
        raise ValueError(f"layers differ in dropout ({sorted(dropouts)}), but a folder holds one: set it in all layers")
    # What PEFT finds by the name of a parameter, and what by that of a module.
    parameters = {path: path for path, layer in layers.items() if isinstance(layer, LoRAStack)}
    parameters |= {path: f"{path}.weight" for path in layers.keys() - parameters.keys() if misread(model, path)}
    names = {uncompiled(parameters.get(path, path)): layer for path, layer in layers.items()}
    modules = [path for path in layers if path not in parameters]
    named = parameter_names(model, [uncompiled(parameters[path]) for path in layers if path in parameters])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_strengths(names),  # r, lora_alpha, and patterns for layers that differ
        "lora_dropout": dropouts.pop(),
        **next(iter(layers.values())).flags,  # use_rslora, use_dora
        "target_modules": _target_names(model, modules),
        **({"target_parameters": named} if named else {}),
        "bias": "none",
        "fan_in_fan_out": any(is_turned(layers[path].base) for path in modules),  # as PEFT sets it for a Conv1D
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _strengths(layers: dict[str, LoRALinear]) -> dict:
    """Return the settings for r and alpha: the most frequent values, and patterns for the other layers."""
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_of(name): layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {pattern_of(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
    }


def _target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Return last names if they match exactly these layers, else whole paths; PEFT takes either."""
    names = sorted({path.split(".")[-1] for path in paths})  # q_proj, v_proj
    meant = {path for path, _ in model.named_modules() if path.split(".")[-1] in names}
    return names if meant <= set(paths) else [uncompiled(path) for path in paths]
