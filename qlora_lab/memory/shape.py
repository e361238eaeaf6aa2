"""The sizes of a model of the LLaMA family, read from its configuration alone: no weights, no transformers.

In: a known name, a folder with config.json, the file itself, a configuration as a dict or of transformers, or a model.
Out: a Shape. Families: llama, mistral and qwen2, which differ in biases only.
Source: "LLaMA", table 2, for the sizes that its name alone gives; field names and defaults are those of transformers.

Not here: bytes (predict.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lab.model.fetch import KNOWN_MODELS, cache_dir, fetch
from qlora_lab.model.model_files import read_config

FAMILIES = ("llama", "mistral", "qwen2")
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# name: layers, hidden, inner, heads, key and value heads, vocabulary; none ties its head to the embeddings
PUBLISHED = {
    "llama-7b": (32, 4096, 11008, 32, 32, 32000),  # LLaMA-2-7B has the same
    "llama-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama-33b": (60, 6656, 17920, 52, 52, 32000),
    "llama-65b": (80, 8192, 22016, 64, 64, 32000),
    "llama-2-70b": (80, 8192, 28672, 64, 8, 32000),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256),
}


class LinearShape(NamedTuple):
    """A linear layer: its last name, its weight (out_features, in_features), and whether it has a bias."""

    name: str
    out_features: int
    in_features: int
    bias: bool

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Shape:
    """What decides every size. tied: the head is the table of embeddings."""

    name: str
    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def query(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all keys, or of all values, of a token."""
        return self.key_value_heads * self.head_dim

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one layer, in the model's order."""
        d, f, q, kv = self.hidden, self.inner, self.query, self.key_value
        return (
            LinearShape("q_proj", q, d, self.attention_bias),
            LinearShape("k_proj", kv, d, self.attention_bias),
            LinearShape("v_proj", kv, d, self.attention_bias),
            LinearShape("o_proj", d, q, self.output_bias),
            LinearShape("gate_proj", f, d, self.mlp_bias),
            LinearShape("up_proj", f, d, self.mlp_bias),
            LinearShape("down_proj", d, f, self.mlp_bias),
        )

    @property
    def table(self) -> int:
        """Elements of the embeddings, and of a head of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, a tied head not counted twice."""
        linears = sum(one.numel + one.bias * one.out_features for one in self.linears)
        return self.layers * (linears + 2 * self.hidden) + self.hidden + self.table * (2 - self.tied)


def shape_of(model: Any) -> Shape:
    """The Shape of `model` (see the module docstring for what it may be).

    Raises ValueError for a name that is not known, another family, or a field that is missing or no number above 0;
    FileNotFoundError for a folder without config.json.

    >>> shape_of("llama-7b").parameters
    6738415616
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (str, Path)):
        return _from_name(str(model))
    config = getattr(model, "config", model)  # a model has one
    if isinstance(config, Mapping):
        return _from_config(dict(config), "the configuration")
    if hasattr(config, "to_dict"):
        return _from_config(config.to_dict(), type(config).__name__)
    raise ValueError(f"model is a {type(model).__name__}: give a name, a folder, a config.json, or a configuration")


def _from_name(name: str) -> Shape:
    if name in PUBLISHED:
        layers, hidden, inner, heads, key_value_heads, vocabulary = PUBLISHED[name]
        return Shape(
            name, "llama", layers, hidden, inner, heads, key_value_heads, hidden // heads, vocabulary, tied=False
        )
    path = Path(name).expanduser()
    if name in KNOWN_MODELS:
        path = cache_dir() / name
        if not (path / "config.json").is_file():
            path = fetch(name, progress=False)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no config.json: that file alone is needed, no weights")
    if not path.is_file():
        known = ", ".join([*KNOWN_MODELS, *PUBLISHED])
        raise ValueError(f"unknown model {name!r}: known are {known}; a folder or a config.json also works")
    shape = _from_config(read_config(path), str(path))
    return replace(shape, name=name) if name in KNOWN_MODELS else shape


def _from_config(config: dict, where: str) -> Shape:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{where} is of the architecture {family!r}, whose layers are not known here: {', '.join(FAMILIES)} are"
        )
    sizes = {name: _size(config, name, where) for name in NEEDED}
    heads = sizes["num_attention_heads"]
    return Shape(
        name=str(config.get("_name_or_path") or where),
        family=family,
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        inner=sizes["intermediate_size"],
        heads=heads,
        # Configurations leave out what equals transformers' default.
        key_value_heads=_size({"num_key_value_heads": heads} | _given(config), "num_key_value_heads", where),
        head_dim=_size({"head_dim": sizes["hidden_size"] // heads} | _given(config), "head_dim", where),
        vocabulary=sizes["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        output_bias=family == "llama" and bool(config.get("attention_bias", False)),
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
    )


def _given(config: dict) -> dict:
    return {name: value for name, value in config.items() if value is not None}


def _size(config: dict, name: str, where: str) -> int:
    if name not in config:
        raise ValueError(f"{where} has no {name!r}: without it no size is known")
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where} has {name}={value!r}: it is a whole number of at least 1")
    return value
