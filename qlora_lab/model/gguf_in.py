"""Convert a GGUF file of the LLaMA family to an ordinary Hugging Face folder, without loading any model class.

In:  one `.gguf` file (architecture "llama", GPT-2 style tokenizer with the "smollm" pre-tokenizer).
Out: a folder with config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json and
     tokenizer_config.json with the chat template, which `AutoModelForCausalLM` and `AutoTokenizer` read as it is.

The formats differ in three things, and each mistake gives fluent nonsense:

1. Blocks. Q4_1 stores 32 weights as 32 four-bit codes q, a float16 step d and a float16 minimum m: w = d * q + m.
   `gguf.dequantize` gives that in float32.
2. Row order of q_proj and k_proj. LLaMA's rotary embedding turns neighbouring rows (0, 1), (2, 3), ... of a head, and
   so do GGUF files (llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.permute`); transformers turns row i with row
   i + head_dim / 2: `neighbours_to_halves`.
3. The tokenizer. GGUF names its text-splitting rule ("smollm") but does not contain it, so it is rebuilt here: every
   digit alone, then GPT-2's byte-level regular expression.

Why bfloat16 on disk when the weights come out as float32: the originals are bfloat16, so the norms, stored in full,
come back bit for bit. Dequantised weights are not on bfloat16's grid, but on SmolLM2-135M rounding them adds an error
of 0.13 % (root mean square) to the 8.2 % of Q4_1, and perplexity stays at 14.705 (float32 arithmetic, first 8 x 512
tokens of pydoc_data.topics). Float32 would double the file to keep noise that no loader needs.

Not here: other architectures, SentencePiece tokenizers, rope scaling, experts, biases: each is an error that names it.
"""

import json
from pathlib import Path
from reprlib import repr as short
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm

from qlora_lab.files import disk
from qlora_lab.files.tensor_file import save_tensors

# GGUF's part of a layer -> transformers' part of it. Names around them: `_hf_name`.
LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(gguf_path: Path, folder: Path, *, progress: bool = True) -> None:
    """Write the model in `gguf_path` as a Hugging Face folder; `folder` is created and must not exist yet.

    Raises ValueError, naming the file, for a truncated file and for all that "Not here" above lists. Nothing is written
    until the whole file has been read; the caller makes the writing atomic (`fetch`).
    """
    reader = open_gguf(gguf_path)  # maps the file; nothing is read yet
    try:
        meta = {key: field.contents() for key, field in reader.fields.items()}
        check_metadata(meta)  # first: what follows trusts it
        config = llama_config(meta, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        settings = {
            "config": config,
            "generation_config": special_ids(meta),
            "tokenizer_config": tokenizer_config(meta),
        }
        tokenizer = build_tokenizer(meta)
        weights = read_weights(reader, config, progress=progress)
    except KeyError as error:
        raise ValueError(f"{gguf_path} cannot be converted: its metadata lacks {error}") from error
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{gguf_path} cannot be converted: {error}") from error
    _write(folder, settings, tokenizer, weights)


def _write(folder: Path, settings: dict[str, dict], tokenizer: Tokenizer, weights: dict[str, torch.Tensor]) -> None:
    disk.make_folder(folder)
    for name, content in settings.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        disk.write_text(folder / f"{name}.json", text)
    disk.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    save_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    disk.copy_mode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read it


class _Reader(gguf.GGUFReader):
    """gguf's own reader, with an error at the end of the file: else it reads on, up to an array's claimed length."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> np.ndarray:
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"the value at byte {offset:,} extends past the end of the file")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> gguf.GGUFReader:
    try:
        return _Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as error:  # of a short or foreign file
        raise ValueError(f"{path} is not a readable GGUF file, perhaps truncated ({error}): fetch it again") from error


SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
MORE_SIZES = ("attention.head_count_kv", "attention.key_length")  # optional
NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
IDS = ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id")
TEXTS = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")


def check_metadata(meta: dict[str, Any]) -> None:
    """Raise ValueError for a value whose type or range is wrong for its key, and KeyError for a missing one."""
    for key in TEXTS:
        if not isinstance(meta[key], str):
            raise ValueError(f"{key} is {short(meta[key])}, but must be text")
    if meta["general.architecture"] != "llama":
        raise ValueError(f"its architecture is {short(meta['general.architecture'])}; only 'llama' is read here")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = meta["tokenizer.ggml.merges"]
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise ValueError("some of its tokens or merges are not text")
    sizes = {f"llama.{name}": 2**31 for name in (*SIZES, *MORE_SIZES)}  # key -> one past the largest value
    ids = {f"tokenizer.ggml.{name}": len(tokens) for name in IDS}
    for key, limit in (sizes | ids).items():
        value = meta.get(key, 1) if key.removeprefix("llama.") in MORE_SIZES else meta[key]
        if type(value) is not int or not (key in sizes) <= value < limit:
            rule = f"must be a whole number from {int(key in sizes)} to {limit - 1:,}"
            raise ValueError(f"{key} is {short(value)}, but {rule}")
    for name in NUMBERS:
        value = meta.get(f"llama.{name}", 1.0)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise ValueError(f"llama.{name} is {short(value)}, but must be a finite float above 0")


def llama_config(meta: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Make the config.json of transformers' LlamaConfig from GGUF metadata. tied: no separate output matrix."""
    if scaled := [key for key in meta if key.startswith("llama.rope.scaling.")]:
        raise ValueError(f"rope scaling ({scaled[0]}) is not read here; use the original model folder")
    hidden = meta["llama.embedding_length"]
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.attention.key_length", hidden // heads),
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        # float32 in the file: seven digits turn 9.999999747378752e-06 back into the 1e-05 that was meant
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,  # the head is the embedding
        "torch_dtype": "bfloat16",  # of the safetensors file beside it
        **special_ids(meta),
    }


def special_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def read_weights(reader: gguf.GGUFReader, config: dict[str, Any], *, progress: bool) -> dict[str, torch.Tensor]:
    """Return all tensors by transformers' names, bfloat16, each (out_features, in_features) or (hidden_size,)."""
    if (layers := config["num_hidden_layers"]) > len(reader.tensors):
        raise ValueError(f"it has {len(reader.tensors)} tensors for {layers} layers")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tqdm(reader.tensors, desc="GGUF to safetensors", unit="tensor", disable=not progress):
        name = _hf_name(tensor.name)
        part = tensor.name.split(".")[-2]  # "attn_q" of "blk.0.attn_q.weight"
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)  # (out_features, in_features), float32
        if part in heads:
            weight = neighbours_to_halves(weight, heads[part])
        # torch.tensor copies: the map may go
        weights[name] = torch.tensor(weight, dtype=torch.float32).to(torch.bfloat16)
    if missing := sorted(_expected_names(config) - weights.keys()):
        raise ValueError(f"it lacks {len(missing)} tensors, {missing[0]} first")
    return weights


def neighbours_to_halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder rows of q_proj or k_proj: GGUF's rotary order x0 y0 x1 y1 ... becomes x0 x1 ... y0 y1 ..."""
    pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])  # (n_heads, head_dim / 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(weight.shape)  # (n_heads, 2, head_dim / 2, in_features) -> as it came


def _hf_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in LAYER_PARTS:
            return f"model.layers.{layer}.{LAYER_PARTS[part]}.weight"
        case [part, "weight"] if part in OUTER_PARTS:
            return f"{OUTER_PARTS[part]}.weight"
    raise ValueError(f"tensor {name!r} has no place in a plain LLaMA; use the original model folder")


def _expected_names(config: dict[str, Any]) -> set[str]:
    layers = range(config["num_hidden_layers"])  # blk.0 ...
    outer = set(OUTER_PARTS) - ({"output"} if config["tie_word_embeddings"] else set())
    names = {f"blk.{layer}.{part}.weight" for layer in layers for part in LAYER_PARTS}
    return {_hf_name(name) for name in names | {f"{part}.weight" for part in outer}}


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Build SmolLM2's tokenizer as upstream's tokenizer.json defines it: BPE over bytes, each digit its own token.

    21 of the 256 bytes have no token (0xF1, 0xF2, six control characters, 13 that UTF-8 never uses), and there is no
    unknown token: upstream drops these bytes silently, and so does this. Everything else survives a round trip.
    """
    if (kind := (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise ValueError(f"its tokenizer is {kind}; only ('gpt2', 'smollm') is rebuilt here")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    try:
        bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"its tokens and merges do not fit together: {error}") from None
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # bytes back to text
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    """Make the tokenizer_config.json: the chat template and the special tokens' roles."""
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # upstream's loses the digits' rule: see tokenizer_of
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
    }
