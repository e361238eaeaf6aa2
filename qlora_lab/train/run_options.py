"""The options of a run beside Settings: model, adapter, data and output; and how a field carries its help text.

The command line and the docs read each default and each help text from the fields. Functions repeat the defaults (load,
add_lora and quantize_folder are in rooms that may not import this one), and a test compares them.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def option(default: Any, text: str, unit: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Make a dataclass field that carries its help text. unit: what the value counts, such as "tokens" or "bytes"."""
    return field(default=default, metadata={"help": text, "unit": unit, "choices": choices})


def same_option(owner: type, name: str) -> Any:
    """Repeat the field `name` of `owner` in another dataclass: default, help text and unit."""
    source = owner.__dataclass_fields__[name]
    return field(default=source.default, metadata=source.metadata)


def documented(owner: type) -> type:
    """Append each field's default and help text to the docstring of the dataclass `owner`, and return it."""
    texts = [(f.name, f.default, f.metadata["help"]) for f in fields(owner) if f.metadata]
    lines = [f"\n    - `{name}` ({default!r}): {text}" for name, default, text in texts]
    owner.__doc__ = "".join([(owner.__doc__ or "").rstrip(), "\n", *lines])  # python -OO keeps no docstring
    return owner


@documented
@dataclass(frozen=True)
class ModelOptions:
    """Which model is trained, and how it is loaded. The defaults are those of `load`."""

    model: str = option("smollm2-135m", "a known name, a local folder, or a hub id such as org/name")
    codebook: str = option("nf4", "data type of the weights: nf4, fp4, int4, ...; none: do not quantise")
    block_size: int = option(64, "weights that share one scaling constant", "weights")
    double_quant: bool = option(True, "quantise the scaling constants to 8 bits")  # saves 0.37 bits per weight at 64
    # a tower is a small part of the bytes, and every answer depends on it
    also: tuple[str, ...] = option(
        (), "parts of a model that sees to quantise too, such as vision_tower or multi_modal_projector"
    )
    # bf16 is chosen only where the machine multiplies it faster than float32
    dtype: str = option(
        "auto",
        "data type for computation; auto: the fastest on this machine",
        choices=("auto", "float32", "bfloat16", "float16"),
    )


# method -> its options; what the functions of adapters/ take
METHOD_OPTIONS = dict.fromkeys(("lora", "rslora", "dora", "pissa"), ("r", "alpha", "dropout", "targets"))
METHOD_OPTIONS |= {"loftq": ("r", "alpha", "dropout", "source")}
RELATIVES = tuple(METHOD_OPTIONS)[1:]  # of lora
VIRTUAL = ("prefix", "prompt")  # put tokens before each row
METHOD_OPTIONS |= {"full": ("parts",), "houlsby": ("size",)}
METHOD_OPTIONS |= {
    "prefix": ("virtual_tokens", "mlp"),
    "prompt": ("virtual_tokens", "start"),
    "bitfit": (),
    "zero_bias": (),
}


@documented
@dataclass(frozen=True)
class AdapterOptions:
    """What learns beside the frozen model. The defaults are those of `add_lora` and `add_adapter`."""

    method: str = option("lora", "what learns beside the frozen model", choices=tuple(METHOD_OPTIONS))
    r: int = option(16, "rank of the adapters")
    alpha: float = option(16, "strength of the adapters, which are scaled by alpha / r; rslora: by alpha / sqrt(r)")
    dropout: float = option(0.0, "dropout on the input of the adapters, from 0 to below 1")  # the paper's for 7B: 0.1
    targets: str | tuple[str, ...] = option(
        "all-linear", "layers to adapt: all-linear, attention, experts, shared-experts, all, or names such as q_proj"
    )
    source: str | None = option(None, "loftq: the model before quantisation, as for --model (default: --model)")
    size: int = option(64, "houlsby: width of the bottleneck after each attention and feed-forward part", "features")
    virtual_tokens: int = option(20, "prefix and prompt: learned tokens before each row", "tokens")
    mlp: int | None = option(None, "prefix: width of an MLP that the prefix comes from in training", "features")
    parts: tuple[str, ...] | None = option(
        None, "full: parts that learn, such as multi_modal_projector; the rest may be in 4 bits (default: all)"
    )
    start: str | None = option(None, "prompt: a text to start from (default: words drawn from the vocabulary)")


@documented
@dataclass(frozen=True)
class DataOptions:
    """What a run learns from, and what it is tested on."""

    data: str = option(
        "docstrings", "docstrings, or a JSONL or parquet file in Alpaca, ShareGPT, messages or completion format"
    )
    skip_bad: bool = option(False, "skip records that cannot be used, and report each with its reason; otherwise stop")
    test_data: str | None = option(None, "held-out examples: docstrings (their test split) or a file like --data")
    held_out: int = option(50, "examples to test on; 0: no test", "examples")


@documented
@dataclass(frozen=True)
class OutputOptions:
    """Where a run is written, and what happens to an earlier run in that folder."""

    out: str = option("runs/first", "folder for the adapter, the log and the settings")
    overwrite: bool = option(False, "replace an earlier run in --out, which is kept until the new run has an adapter")
    resume: bool | int = option(
        False, "resume the run in --out from its newest checkpoint, or from STEP; start if there is no run"
    )
    # sums are rounded in another order, so an adapter differs from that of an uninterrupted run
    other_arithmetic: bool = option(False, "resume even if other versions or processors change the last bits")
