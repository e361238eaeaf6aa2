"""Adapters of the other methods on disk, in the files that LoRA's have: a configuration and tensors.

Prompts and prefixes are PEFT's format: one tensor, `prompt_embeddings`. PEFT has no Houlsby adapters and no BitFit; for
those the configuration has a peft_type of ours, and a tensor's key is `base_model.model.PATH.NAME`.
Source: PEFT 0.21, utils/save_and_load.py and peft_model.py.
A prefix that came from an MLP is stored as the keys and values that it gave: the paper drops the MLP after training.
Not here: reading and writing files (peft_format.py).
"""

from typing import Any

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter, adapters, has_adapters, method_of, put_into
from qlora_lab.adapters.add_adapter import MAKERS
from qlora_lab.adapters.layer_patterns import uncompiled
from qlora_lab.adapters.prefix_tuning import Prefix
from qlora_lab.quant.finite import is_finite
from qlora_lab.quant.numbers import check_whole
from qlora_lab.quant.quantize import WEIGHT_DTYPES

PROMPTS = "prompt_embeddings"
PEFT_TYPE = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
PEFT_TYPE |= {method: method.upper() for method in ("full", "houlsby", "bitfit", "zero_bias")}  # these are ours
METHOD = {peft_type: method for method, peft_type in PEFT_TYPE.items()}
SIZES = {"houlsby": {"size": "size"}, "prompt": {"virtual_tokens": "num_virtual_tokens"}}  # option -> its setting
SIZES |= {"prefix": SIZES["prompt"], "full": {}, "bitfit": {}, "zero_bias": {}}


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return what adapter_config.json says of the adapters of `model`, which are not LoRA's."""
    method = method_of(model)
    adapter = next(iter(adapters(model).values()))
    adapter.learned()  # raises where nothing can be saved
    config = {"peft_type": PEFT_TYPE[method], "task_type": "CAUSAL_LM"}
    config |= {setting: adapter.settings()[option] for option, setting in SIZES[method].items()}
    if method == "full":
        config |= {name: list(parts) for name, parts in adapter.settings().items()}
    if method == "prompt":
        config |= {"token_dim": adapter.prompt.shape[1], "num_transformer_submodules": 1}
    if method == "prefix":
        tokens, twice, heads, head_dim = adapter.shape
        config |= {"token_dim": heads * head_dim, "num_attention_heads": heads, "num_layers": twice // 2}
        config |= {"num_transformer_submodules": 1, "prefix_projection": False}
    return config | {"inference_mode": True}


def tensors_of(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return key -> tensor, as files hold them. prefix: what the keys of layers begin with."""
    return _keyed(adapters(model), method_of(model), prefix)


def load_method(model: nn.Module, config: dict, tensors: dict[str, torch.Tensor], prefix: str, where: str) -> None:
    """Put adapters with these settings and tensors into `model`, or give its own these values.

    Raises ValueError for settings, keys or shapes that do not fit; the model is then left as it was.
    """
    method = METHOD[config["peft_type"]]
    # only sizes decide shapes; what learned replaces whatever a method would draw
    options = {option: config.get(setting) for option, setting in SIZES[method].items()}
    for option, size in options.items():
        check_whole(f"{SIZES[method][option]} of {where}", size)
    if method == "full" and "parts" in config:
        options["parts"] = _parts(config["parts"], where)
    if has_adapters(model):
        made = adapters(model)
        _check_own(model, method, options, where)
    else:
        made = MAKERS[method](model, **options)
    own = _keyed(made, method, prefix)  # shares memory with the adapters
    _check_tensors(tensors, own, where)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
    if not has_adapters(model):  # last, so that an error above has changed nothing
        put_into(model, lambda: made)


def _keyed(made: dict[str, Adapter], method: str, prefix: str) -> dict[str, torch.Tensor]:
    if method == "prompt":
        return {PROMPTS: next(iter(made.values())).prompt.data}
    if method == "prefix":
        return {PROMPTS: next(iter(made.values())).flat.detach()}
    named = {name: p.data for path, adapter in made.items() for name, p in adapter.named(path).items()}
    return {f"{prefix}{uncompiled(name)}": tensor for name, tensor in named.items()}


def _parts(parts: Any, where: str) -> tuple[str, ...]:
    """Return what learned, by the names of modules. Raises ValueError for anything but a list of texts."""
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where} has parts={parts!r:.60}: it must be a list of names of modules")
    return tuple(parts)


def _check_own(model: nn.Module, method: str, options: dict[str, int], where: str) -> None:
    own = next(iter(adapters(model).values()))
    if own.method != method:
        raise ValueError(f"{where} is of method {method}, but the model's own is {own.method}: load the model anew")
    if isinstance(own, Prefix) and own.width is not None:
        raise ValueError(f"{where} holds a prefix, but the model's own comes from an MLP: load the model without it")
    for option, size in options.items():
        if (found := own.settings().get(option)) != size:
            raise ValueError(f"{where} has {option}={size}, but the model's own has {found}: load the model without it")


def _check_tensors(tensors: dict[str, torch.Tensor], own: dict[str, torch.Tensor], where: str) -> None:
    for key in sorted(tensors.keys() ^ own.keys()):
        fault = "lacks" if key in own else "holds"
        raise ValueError(f"{where} {fault} {key}, unlike an adapter of this model: load the model it was trained on")
    for key, tensor in own.items():
        stored = tensors[key]
        if stored.shape != tensor.shape:
            shapes = f"{tuple(stored.shape)}, but this model needs {tuple(tensor.shape)}"
            raise ValueError(f"{where} does not fit: {key} has shape {shapes}; load the model it was trained on")
        if stored.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{where} has {key} in {stored.dtype}: save it in float32, bf16 or fp16")
        if not is_finite(stored):
            raise ValueError(f"{where} has NaN or infinity in {key}: use the adapter of an earlier step")
