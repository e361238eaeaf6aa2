"""A GGUF file of LLaMA's shape with random weights, so that llama.cpp can be timed on a model that nobody has to fetch.

The packed bytes are random; a block's step is 0.01, so activations stay finite. Embedding and head are Q8_0, as
qlora_lab's own GGUF files have them; norms are 1. Its words are made up, one for each id: ids are all that a bench
hands over.
"""

from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tqdm.auto import tqdm

BLOCK = 32  # weights
FORMATS = {"q4_0": Kind.Q4_0, "q4_1": Kind.Q4_1}
STEP = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)


def write_random(path: Path, format: str, config: dict[str, int], progress: bool = True) -> None:
    """Write `path`. config: sizes by the names of transformers' LlamaConfig. format: one of FORMATS."""
    hidden, middle, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    narrow = hidden // heads * key_heads  # rows of k and v
    layer = {"attn_q": (hidden, hidden), "attn_k": (narrow, hidden), "attn_v": (narrow, hidden)}
    layer |= {"attn_output": (hidden, hidden), "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden)}
    layer |= {"ffn_down": (hidden, middle)}
    matrices = {"token_embd.weight": ((words, hidden), Kind.Q8_0), "output.weight": ((words, hidden), Kind.Q8_0)}
    vectors = ["output_norm.weight"]
    for i in range(config["num_hidden_layers"]):
        matrices |= {f"blk.{i}.{name}.weight": (shape, FORMATS[format]) for name, shape in layer.items()}
        vectors += [f"blk.{i}.{name}.weight" for name in ("attn_norm", "ffn_norm")]
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(middle)
        writer.add_head_count(heads)
        writer.add_head_count_kv(key_heads)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_vocab_size(words)
        writer.add_tokenizer_model("llama")
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]  # llama.cpp looks for them
        writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *(f"word{i}" for i in range(259, words))])
        writer.add_token_scores([0.0] * words)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (words - 259)])  # unknown, control, byte, normal
        for name, (shape, kind) in matrices.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, kind), raw_dtype=kind)
        for name in vectors:
            writer.add_tensor_info(name, (hidden,), np.dtype(np.float32), 4 * hidden)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        g = np.random.default_rng(0)
        for shape, kind in tqdm(list(matrices.values()), "writing GGUF", disable=not progress, leave=False):
            writer.write_tensor_data(_random(shape, kind, g))
        for _ in vectors:
            writer.write_tensor_data(np.ones(hidden, np.float32))


def _nbytes(shape: tuple[int, int], kind: Kind) -> int:
    return shape[0] * shape[1] // BLOCK * gguf.GGML_QUANT_SIZES[kind][1]


def _random(shape: tuple[int, int], kind: Kind, g: np.random.Generator) -> np.ndarray:
    """Blocks of random codes behind a step, and in Q4_1 a minimum of -7.5 steps."""
    size = gguf.GGML_QUANT_SIZES[kind][1]  # bytes of a block
    blocks = g.integers(0, 256, (shape[0] * shape[1] // BLOCK, size), dtype=np.uint8)
    blocks[:, :2] = STEP
    if kind == Kind.Q4_1:
        blocks[:, 2:4] = np.frombuffer(np.float16(-0.075).tobytes(), np.uint8)
    return blocks.reshape(shape[0], -1)
