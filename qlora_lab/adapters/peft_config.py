"""What adapter_config.json sets, field by field: honoured, known to change no answer, or refused by name.

Source: PEFT 0.21, tuners/lora/config.py for the fields, layer.py for what each initialisation does to the base, and
get_pattern_key in utils/other.py for patterns.

The lists name what is known to be harmless. A field or value that is in none of them, such as one of a later PEFT, is
refused unless it is off: an adapter that is misread answers wrongly, and nothing says so.
"""

import math
import re
from reprlib import repr as short

from qlora_lab.adapters.lora import check_strength
from qlora_lab.quant.numbers import check_whole

HONOURED = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern")
HONOURED += ("base_model_name_or_path", "revision")  # adapter_base.py compares them
# The tensors' keys show which layers these settings chose.
CHOICES_OF_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# Where the adapter came from and what it was trained for: its keys show if it fits. Settings that matter only together
# with a refused one. fan_in_fan_out: a linear layer has one layout, and no other kind of layer is adapted.
WITHOUT_EFFECT = ("auto_mapping", "peft_version", "task_type", "inference_mode", "runtime_config", "fan_in_fan_out")
WITHOUT_EFFECT += ("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (True, False, None),
    # These draw A and B and leave the base alone. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from the base what A
    # and B start with, and the file lacks that base; MiCA trains only one of the two.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
MUST_BE_OFF = {  # setting -> why an adapter that uses it is more than plain LoRA
    "use_dora": "DoRA rescales the weights of the base",
    "kasa_config": "KaSA cuts the weights of the base",
    "layer_replication": "it repeats layers of the base",
    "modules_to_save": "whole modules were trained beside the adapter",
    "trainable_token_indices": "rows of the embeddings were trained beside the adapter",
    "ensure_weight_tying": "it ties adapters of the embeddings and the head",
    "target_parameters": "it adapts parameters outside linear layers",
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
}
# A repeated group, or many repeats in a row, can make a pattern take for ever. pattern_of escapes whole paths.
ENDLESS = re.compile(r"(?<!\\)\)[*+{]")
REPEATS = re.compile(r"(?<!\\)[*+{]")
MOST_REPEATS = 3
UNKNOWN = "an unknown setting"


def check_settings(config: dict, where: str) -> None:
    """Raise ValueError for the first setting that makes an adapter anything but plain LoRA on an unchanged base.

    config: the content of adapter_config.json. where: what an error calls the adapter.
    """
    for name in ("peft_type", *config):  # the method first: in another one the other names mean something else
        if not _is_read(name, config.get(name)):
            shown = name if name.isprintable() else ascii(name)
            reason = REASONS.get(name, UNKNOWN)
            raise ValueError(
                f"{where} has {shown}={short(config.get(name))} ({reason}), but only plain LoRA is read here: use it "
                "with PEFT, or merge it there and load the result"
            )
    if missing := [name for name in ("r", "lora_alpha") if config.get(name) is None]:
        raise ValueError(f"{where} has no {missing[0]} in its configuration: save it again with PEFT")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{where} has {name}={short(config[name])}: it must map names of layers to numbers")


def strength_of(config: dict, path: str) -> tuple[int, float]:
    """Return (r, alpha) of the adapter beside the layer at `path`, with alpha / r as its scaling, for rsLoRA too."""
    r = _of_layer(config.get("rank_pattern"), path, config["r"])
    alpha = _of_layer(config.get("alpha_pattern"), path, config["lora_alpha"])
    check_whole("r", r)
    check_strength(alpha, 0)
    if config.get("use_rslora"):
        alpha *= math.sqrt(r)  # rsLoRA scales by alpha / sqrt(r)
        check_strength(alpha, 0)
    return r, alpha


def pattern_of(path: str) -> str:
    """Return the pattern that matches the layer at `path` and no other."""
    return f"^{re.escape(path)}"


def _is_read(name: str, value) -> bool:
    if name in (*HONOURED, *CHOICES_OF_LAYERS, *WITHOUT_EFFECT):
        return True
    if name in ALLOWED:
        return value in ALLOWED[name]
    return value is None or value is False or value in ([], {}, "")  # off; 0 is not, it may be a number's value


def _of_layer(patterns: dict | None, path: str, otherwise):
    """Return the value of the first pattern that the end of `path` matches."""
    for pattern, value in (patterns or {}).items():
        if ENDLESS.search(pattern) or len(REPEATS.findall(pattern)) > MOST_REPEATS:
            raise ValueError(f"{short(pattern)} in the adapter's configuration can take for ever: name its layers")
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise ValueError(
                f"{pattern!r} in the adapter's configuration is not a pattern of layers: mend it ({error})"
            ) from None
    return otherwise
