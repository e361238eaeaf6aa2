"""Read the sizes of a LLaMA-like model from its configuration alone, without weights and without transformers.

In: a known name, a folder with config.json, that file, a configuration (a dict, or one of transformers), or a model.
Out: a Shape. Families: llama, mistral and qwen2, which differ only in their biases; qwen3, which normalises each head's
query and key; mixtral, qwen2_moe, qwen3_moe and olmoe, whose layers have experts in place of one MLP; llava, in which
one of these is the language model.
Source: "LLaMA", table 2, for models known by name alone; field names and defaults are those of transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lab.files.home import expanded
from qlora_lab.memory.linear_shape import LinearShape, part_of, size_of
from qlora_lab.memory.sight import Sight, sight_of
from qlora_lab.model.experts import COUNTS
from qlora_lab.model.fetch import KNOWN_MODELS, cache_dir, fetch
from qlora_lab.model.model_files import read_config

# The name of f, inside one expert.
MIXTURES = {"mixtral": "intermediate_size", "olmoe": "intermediate_size"}
MIXTURES |= dict.fromkeys(("qwen2_moe", "qwen3_moe"), "moe_intermediate_size")
HEAD_NORMS = ("qwen3", "qwen3_moe")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *MIXTURES)
SEEING = "llava"
WEIGHTS_ALONE = "qlora_lab.memory.weights counts the weights of any"
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# name: layers, hidden, inner, heads, key and value heads, vocabulary. None ties its head to the embeddings.
PUBLISHED = {
    "llama-7b": (32, 4096, 11008, 32, 32, 32000),  # so has LLaMA-2-7B
    "llama-13b": (40, 5120, 13824, 40, 40, 32000),
    "llama-33b": (60, 6656, 17920, 52, 52, 32000),
    "llama-65b": (80, 8192, 22016, 64, 64, 32000),
    "llama-2-70b": (80, 8192, 28672, 64, 8, 32000),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256),
}


@dataclass(frozen=True)
class Shape:
    """The numbers that decide the size of every tensor."""

    name: str
    family: str  # one of FAMILIES
    layers: int
    hidden: int  # d, the width of the residual stream
    inner: int  # f, the width between up_proj and down_proj
    heads: int  # of queries
    key_value_heads: int  # fewer than heads where several queries share a key
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the table of embeddings
    attention_bias: bool = False  # of q_proj, k_proj and v_proj
    output_bias: bool = False  # of o_proj
    mlp_bias: bool = False  # of gate_proj, up_proj and down_proj
    head_norms: bool = False  # q_norm and k_norm, over the head_dim numbers of each head
    whole_norms: bool = False  # q_norm and k_norm, over all heads at once
    experts: int = 0  # E in each layer, 0 in a dense model; then f is the width inside one of them
    experts_per_token: int = 0  # k
    normalised: bool = False  # the k weights of a token are divided by their sum
    shared: int = 0  # the width inside a shared expert, which all tokens pass; 0 without one
    sight: Sight | None = None  # of a model that sees: what stands beside its language model

    @property
    def query(self) -> int:
        """Width of all queries of one token."""
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of all keys of one token, and of all its values."""
        return self.key_value_heads * self.head_dim

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one layer, attention first; those of a mixture are its attention's and shared expert's.

        All tokens pass them. A shared expert has the names of an MLP.
        """
        attention = (
            LinearShape("q_proj", self.query, self.hidden, self.attention_bias),
            LinearShape("k_proj", self.key_value, self.hidden, self.attention_bias),
            LinearShape("v_proj", self.key_value, self.hidden, self.attention_bias),
            LinearShape("o_proj", self.hidden, self.query, self.output_bias),
        )
        width = self.shared if self.experts else self.inner
        if not width:
            return attention
        return (
            *attention,
            LinearShape("gate_proj", width, self.hidden, self.mlp_bias),
            LinearShape("up_proj", width, self.hidden, self.mlp_bias),
            LinearShape("down_proj", self.hidden, width, self.mlp_bias),
        )

    @property
    def expert(self) -> tuple[LinearShape, ...]:
        """The two matrices of one expert; transformers keeps gate and up in one."""
        if not self.experts:
            return ()
        up = LinearShape("gate_up_proj", 2 * self.inner, self.hidden, bias=False)
        return up, LinearShape("down_proj", self.hidden, self.inner, bias=False)

    @property
    def router(self) -> int:
        """Weights of one layer's router, (E, d), and of the gate of its shared expert, (1, d)."""
        return (self.experts + bool(self.shared)) * self.hidden

    @property
    def inner_norms(self) -> tuple[tuple[str, int, int], ...]:
        """Norms after q_proj and k_proj: the layer's name, how wide a norm is, and how often a token passes it."""
        if self.head_norms:
            return ("q_proj", self.head_dim, self.heads), ("k_proj", self.head_dim, self.key_value_heads)
        return (("q_proj", self.query, 1), ("k_proj", self.key_value, 1)) * self.whole_norms

    @property
    def norms(self) -> int:
        """Weights of all norms: two in each layer and one after the last, and those of queries and keys."""
        return (2 * self.layers + 1) * self.hidden + self.layers * sum(width for _, width, _ in self.inner_norms)

    @property
    def table(self) -> int:
        """Elements of the embeddings, and of a head that is not tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, a vision tower's included; a tied head counts once."""
        beside = self.sight.parameters if self.sight else 0
        linears = sum(linear.numel + linear.bias * linear.out_features for linear in self.linears)
        experts = self.experts * sum(matrix.numel for matrix in self.expert) + self.router
        return self.layers * (linears + experts) + self.norms + self.table * (2 - self.tied) + beside


def shape_of(model: Any) -> Shape:
    """Read the Shape of `model` (see the module docstring for what it may be).

    Raises ValueError for an unknown name, another family, and a field that is missing or not a whole number above 0;
    FileNotFoundError for a folder without config.json.

    >>> shape_of("llama-7b").parameters
    6738415616
    """
    if isinstance(model, Shape):
        return model
    if isinstance(model, (str, Path)):
        return _from_name(str(model))
    config = getattr(model, "config", model)  # a model has a configuration; a configuration has no such attribute
    if isinstance(config, Mapping):
        return _from_config(dict(config), "the configuration")
    if hasattr(config, "to_dict"):
        return _from_config(config.to_dict(), type(config).__name__)
    raise ValueError(f"model is a {type(model).__name__}: give a name, a folder, a config.json or a configuration")


def _from_name(name: str) -> Shape:
    if name in PUBLISHED:
        *sizes, vocabulary = PUBLISHED[name]
        _, hidden, _, heads, _ = sizes
        return Shape(name, "llama", *sizes, hidden // heads, vocabulary, tied=False)
    path = expanded(name)
    if name in KNOWN_MODELS:
        path = cache_dir() / name
        if not (path / "config.json").is_file():
            path = fetch(name, progress=False)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no config.json: add that file; weights are not needed")
    if not path.is_file():
        names = ", ".join([*KNOWN_MODELS, *PUBLISHED])
        raise ValueError(f"unknown model {name!r}: choose one of {names}, or give a folder or a config.json")
    shape = _from_config(read_config(path), str(path))
    return replace(shape, name=name) if name in KNOWN_MODELS else shape


def _from_config(config: dict, where: str) -> Shape:
    family = config.get("model_type")
    if family == SEEING:
        return _seeing(config, where)
    if family not in FAMILIES:
        raise ValueError(
            f"{where} has the architecture {family!r}, whose layers are unknown here: choose from {', '.join(FAMILIES)}"
            f", {SEEING}; {WEIGHTS_ALONE}"
        )
    sizes = {name: size_of(config, name, where) for name in NEEDED}
    mixture = _mixture(config, family, where) if family in MIXTURES else {"inner": sizes["intermediate_size"]}
    heads = sizes["num_attention_heads"]
    # Configurations omit fields that equal the default of transformers, or set them to null.
    defaults = {"num_key_value_heads": heads, "head_dim": sizes["hidden_size"] // heads}
    filled = defaults | {name: value for name, value in config.items() if value is not None}
    return Shape(
        name=str(config.get("_name_or_path") or where),
        family=family,
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        heads=heads,
        key_value_heads=size_of(filled, "num_key_value_heads", where),
        head_dim=size_of(filled, "head_dim", where),
        vocabulary=sizes["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or bool(config.get("attention_bias", config.get("qkv_bias", False))),
        # transformers gives o_proj a bias in these; in mistral and qwen2 it has none whatever the configuration says
        output_bias=family in ("llama", "olmoe", *HEAD_NORMS) and bool(config.get("attention_bias", False)),
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        head_norms=family in HEAD_NORMS,
        whole_norms=family == "olmoe",
        **mixture,
    )


def _seeing(config: dict, where: str) -> Shape:
    """Return the Shape of the language model, with what stands beside it."""
    text = {"model_type": "llama"} | part_of(config, "text_config", where)
    if text["model_type"] == SEEING:
        raise ValueError(f"{where} has a {SEEING} as its language model: it is one of {', '.join(FAMILIES)}")
    if text["model_type"] == "llama":  # configurations omit what equals the default of LlamaConfig, a LLaMA-7B
        text = dict(zip(NEEDED, (4096, 11008, 32, 32, 32000), strict=True)) | text
    shape = _from_config(text, f"{where}, text_config")
    tied = shape.tied or bool(config.get("tie_word_embeddings", False))
    name = str(config.get("_name_or_path") or where)
    return replace(shape, name=name, tied=tied, sight=sight_of(config, where, shape.hidden))


def _mixture(config: dict, family: str, where: str) -> dict[str, int | bool]:
    """Return the fields of a mixture. Raises ValueError for layers that differ, and for noise in a router's input."""
    # The ledger multiplies one layer by the number of layers, so a mixture with dense layers would come out wrong.
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(f"{where} has layers without experts, which the ledger does not tell apart: {WEIGHTS_ALONE}")
    for option in ("router_jitter_noise", "clip_qkv"):
        if config.get(option):
            raise ValueError(f"{where} has {option}, whose activations are not counted: {WEIGHTS_ALONE}")
    # num_experts on the hub becomes num_local_experts where transformers writes it
    number = next((name for name in COUNTS if name in config), COUNTS[0])
    fields = {"inner": MIXTURES[family], "experts": number, "experts_per_token": "num_experts_per_tok"}
    fields |= {"shared": "shared_expert_intermediate_size"} if family == "qwen2_moe" else {}
    sizes = {field: size_of(config, name, where) for field, name in fields.items()}
    if sizes["experts_per_token"] > sizes["experts"]:
        raise ValueError(
            f"{where} routes a token to {sizes['experts_per_token']} of {sizes['experts']} experts: give fewer"
        )
    return sizes | {"normalised": family == "mixtral" or bool(config.get("norm_topk_prob", False))}
