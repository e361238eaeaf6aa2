"""Choose a method: what learns beside the frozen model.

    add_adapter(model, "houlsby", size=64)

Not here: the methods, each in the file of its name.
"""

import inspect
from functools import partial
from typing import Any

from torch import nn

from qlora_lab.adapters.adapter import put_into
from qlora_lab.adapters.bitfit import bitfit, zero_bias
from qlora_lab.adapters.dora import DoRALinear
from qlora_lab.adapters.full import full
from qlora_lab.adapters.houlsby import houlsby
from qlora_lab.adapters.loftq import loftq
from qlora_lab.adapters.lora import maker_of
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.pissa import pissa
from qlora_lab.adapters.prefix_tuning import prefix
from qlora_lab.adapters.prompt_tuning import prompt
from qlora_lab.adapters.rslora import RsLoRALinear

# method -> what makes its adapters: path -> adapter
KINDS = {kind.method: maker_of(kind) for kind in (LoRALinear, RsLoRALinear, DoRALinear)}
LORA = KINDS | {"pissa": pissa, "loftq": loftq}  # and its relatives
MAKERS = {
    "full": full,
    "houlsby": houlsby,
    "prefix": prefix,
    "prompt": prompt,
    "bitfit": bitfit,
    "zero_bias": zero_bias,
}
METHODS = (*LORA, *MAKERS)


def add_adapter(
    model: nn.Module, method: str = "lora", *, seed: int = 0, progress: bool = True, **options: Any
) -> nn.Module:
    """Put adapters of `method` into `model`, in place, and freeze everything else. Returns `model`.

    - "lora": r, alpha, dropout, targets; see add_lora. So do its relatives: "rslora", scaled by alpha / sqrt(r);
      "dora", with a magnitude for each row; "pissa", which starts as the largest part of the weight; "loftq", which
      starts as what quantisation lost in each 4-bit layer: source names the original (default: the model's name).
    - "full": every weight, of a model that is not quantised; parts: names of the modules that learn, such as
      "multi_modal_projector", which may stand beside packed layers.
    - "houlsby": size of the bottleneck after each sublayer (default 64).
    - "prefix": virtual_tokens (20), keys and values in every layer; mlp: width of an MLP they come from.
    - "prompt": virtual_tokens (20), vectors before the embeddings; start, a text, and tokenizer: its embeddings.
    - "bitfit": the biases of a model that has some. "zero_bias": biases of zero, for a model without any.

    seed: for what is drawn. progress: show a bar where it takes more than two seconds. Raises ValueError for an unknown
    method or option, a model that the method cannot be used on, or one that has adapters already.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but it must be one of {', '.join(METHODS)}")
    make = (LORA | MAKERS)[method]
    common = {"seed": seed, "progress": progress}
    known = list(inspect.signature(make).parameters)[1:]  # after the model
    if unknown := [name for name in options if name not in known]:
        shown = ", ".join(name for name in known if name not in common) or "none"
        raise ValueError(f"{method} has no option {unknown[0]!r}: its options are {shown}")
    return put_into(model, partial(make, model, **options, **{name: common[name] for name in common if name in known}))
