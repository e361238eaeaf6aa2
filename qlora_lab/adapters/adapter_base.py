"""Compare the base model that an adapter was trained on with the one it is put on, and warn if they differ.

In: adapter_config.json and the metadata of the tensors' file. Out: warnings. An adapter of another base of the same
shape loads, and the model then answers wrongly; nothing else would tell the user.

Two things are compared: the name of the base, which PEFT records too, and the code table of the adapted weights,
because an adapter also learns to make up for what quantisation lost. The table is recorded in the metadata, since PEFT
warns of settings that it does not know.
But: double quantization is not compared. It moves weights far less than the table does.
"""

import os
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable

from torch import nn

from qlora_lab.model.load import public_name
from qlora_lab.quant.codebook import CUSTOM
from qlora_lab.quant.stack import Quantized

WEIGHTS_KEY = "base_weights"  # in the metadata of the safetensors file


def warn_of_base(model: nn.Module, weights: Iterable, config: dict, metadata: dict, where: str) -> None:
    """Warn if the adapter `where` was trained on another model than `model`, or beside other weights than `weights`.

    What only one side records is not compared.
    """
    theirs = config.get("base_model_name_or_path")
    ours = getattr(model, "name_or_path", None)
    revision = config.get("revision")  # PEFT's own field
    if theirs and ours and not same_model(theirs, ours):
        _warn(f"{where} was trained on {theirs}, but this model is {ours}: load {theirs}, unless they are the same")
    elif revision not in (None, "", "main"):
        _warn(f"{where} was trained on revision {revision} of {theirs}: make sure that this model is the same")
    stored = metadata.get(WEIGHTS_KEY)
    own = weights_of(weights)
    if stored and stored != own:
        _warn(
            f"{where} was trained beside weights in {stored}, but here they are in {own}: load the model as it was, or "
            "expect slightly different answers"
        )


def same_model(a: str, b: str) -> bool:
    """Tell whether two names can mean one model: hub ids, known names, or folders, also of the hub's cache."""
    return _last_name(a) == _last_name(b)


def weights_of(weights: Iterable) -> str:
    """Say how layers store their weights: "nf4, block size 64", "16 or 32 bits", or a count of each."""
    counts = Counter(_stored_in(weight) for weight in weights)  # a plan mixes data types
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))


def _stored_in(weight) -> str:
    if isinstance(weight, Quantized):
        table = f" {zlib.crc32(weight.levels.cpu().numpy().tobytes()):08x}" if weight.codebook == CUSTOM else ""
        return f"{weight.codebook}{table}, block size {weight.block_size}"
    return "16 or 32 bits" if weight.is_floating_point() else type(weight).__name__  # bitsandbytes' packed integers


def _last_name(name: str) -> str:
    name = str(name).replace("\\", "/")
    if cached := re.search(r"models--[^/]+--([^/]+)/snapshots/", name):  # the hub's cache
        name = cached[1]
    last = os.path.basename(os.path.abspath(public_name(name)))  # abspath: "." has a name too
    last = public_name(last).split("/")[-1].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")  # copies on the hub that many adapters name


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)  # the caller of load_adapter
