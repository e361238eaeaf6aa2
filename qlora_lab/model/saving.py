"""What save_pretrained does for a model in 4 bits: it refuses, and names what writes a folder.

transformers would write packed bytes without their constants and say nothing: a folder that neither `from_pretrained`
nor `load` reads.
Not here: a model with adapters, which saves those (adapters/saving.py).
"""

from typing import NoReturn

from torch import nn


def refuse_to_save(model: nn.Module) -> None:
    """Let `model.save_pretrained` raise ValueError. A plain module, which has none, stays as it is."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse  # of the module, so that the model is still copied and pickled


def _refuse(*_, **__) -> NoReturn:
    raise ValueError(
        "save_pretrained would write a folder that nothing reads, because this model has packed layers of QLoRA Lab: "
        "call quantize_folder(name, folder), which writes a model in 4 bits that load and transformers read"
    )
