"""Check a run before its model is loaded: a typo should not cost a minute.

Settings checks itself when it is made; add_lora checks the names of layers, which only a model has. check_method holds
what a method forbids in a run; the trainer asks it again, for models that no command line made.
"""

from dataclasses import fields

from qlora_lab.adapters.strength import check_strength
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.run_options import METHOD_OPTIONS, RELATIVES, VIRTUAL, AdapterOptions, ModelOptions
from qlora_lab.train.settings import Settings

USUAL = Settings()  # a run with the defaults


def check_run(
    model: ModelOptions,
    adapter: AdapterOptions,
    settings: Settings = USUAL,
    *,
    held_out: int = 0,
    resume: bool | int = False,
) -> None:
    """Raise ValueError for the first option that is not allowed, before anything is loaded.

    held_out: number of examples to test on. resume: a step, or whether to resume at all.
    """
    _check_options(adapter)
    check_method(adapter.method, settings)
    # parts that learn may stand beside packed ones; which they are, only the model says
    if adapter.method == "full" and adapter.parts is None and model.codebook != "none":
        raise ValueError("method full needs weights that are not quantised: add codebook none (--codebook none)")
    if adapter.method == "loftq" and model.codebook == "none":
        raise ValueError("method loftq makes up for quantisation, but the codebook is none: choose one, such as nf4")
    check_strength(adapter.alpha, adapter.dropout)
    if model.codebook != "none":  # none: the weights stay as they are
        codebook(model.codebook)
    check_block_size(model.block_size)
    for name in ("r", "size", "virtual_tokens"):
        check_whole(name, getattr(adapter, name))
    if adapter.mlp is not None:
        check_whole("mlp", adapter.mlp)
    check_whole("held-out", held_out, 0)
    if not isinstance(resume, bool):  # True and False are no steps, though Python counts with them
        check_whole("resume", resume)


def check_method(method: str, settings: Settings) -> None:
    """Raise ValueError for a setting that `method` cannot train with."""
    if settings.lora_plus != 1 and method not in ("lora", *RELATIVES):
        raise ValueError(f"lora_plus={settings.lora_plus} is for lora_B, but method {method} has none: set lora_plus=1")
    if settings.packing and method in VIRTUAL:
        why = "its virtual tokens would come before the first example of a row only"
        raise ValueError(f"method {method} cannot train on packed rows, {why}: leave out packing (--packing)")
    if settings.gradient_checkpointing and method == "prefix":
        why = "transformers then drops keys and values"
        raise ValueError(f"method prefix cannot checkpoint gradients, {why}: leave out --gradient-checkpointing")
    if settings.shard and method == "full":
        raise ValueError("shard spreads frozen weights over processes, but method full freezes none: leave it out")
    if settings.expert_parallel and method == "full":
        raise ValueError("expert_parallel spreads frozen experts, but method full freezes none: leave it out")


def _check_options(adapter: AdapterOptions) -> None:
    """Raise ValueError for a value that was changed although the method has no such option."""
    if adapter.method not in METHOD_OPTIONS:
        raise ValueError(f"method is {adapter.method!r}, but it must be one of {', '.join(METHOD_OPTIONS)}")
    own = METHOD_OPTIONS[adapter.method]
    for field in fields(adapter):
        if field.name not in ("method", *own) and getattr(adapter, field.name) != field.default:
            options = f"its options are {', '.join(own)}" if own else "it has none"
            raise ValueError(f"{field.name} is no option of method {adapter.method}: {options}")
