"""Which model families load, train and make adapters that PEFT reads: docs/families.md. Renewed by

    python -m tools.families

A family is a configuration of transformers at toy size. Each is saved by transformers, loaded here, and compared.
"""

import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import qlora_lab as ql
from qlora_lab.finetune.fetch import ModelError
from qlora_lab.finetune.share import in_4_bits

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
IDS = torch.tensor([[3, 17, 5, 40, 8, 21, 2, 33, 11, 6]])
WORDS = 64  # in the vocabulary


@dataclass(frozen=True)
class Family:
    """name: as the table has it. config: its class in transformers. options: what that class needs besides SMALL."""

    name: str
    config: str
    options: dict = field(default_factory=dict)


SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16}
DEEPSEEK |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
DEEPSEEK |= {"num_key_value_heads": 4, "first_k_dense_replace": 1}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

FAMILIES = [
    Family("Llama", "LlamaConfig"),
    Family("Mistral", "MistralConfig"),
    Family("Qwen2", "Qwen2Config"),
    Family("Qwen3", "Qwen3Config", {"head_dim": 8}),
    Family("Phi", "PhiConfig"),
    Family("Phi-3", "Phi3Config"),
    Family("Gemma", "GemmaConfig", {"head_dim": 8}),
    Family("Gemma 2", "Gemma2Config", {"head_dim": 8} | TWO_KINDS),
    Family("Gemma 3, text", "Gemma3TextConfig", {"head_dim": 8} | TWO_KINDS),
    Family("OLMo", "OlmoConfig"),
    Family("OLMo 2", "Olmo2Config"),
    Family("SmolLM3", "SmolLM3Config"),
    Family("StableLM", "StableLmConfig"),
    Family("StarCoder2", "Starcoder2Config"),
    Family("Cohere", "CohereConfig"),
    Family("Granite", "GraniteConfig"),
    Family("Nemotron", "NemotronConfig"),
    Family("GLM", "GlmConfig", {"head_dim": 8}),
    Family("Ernie 4.5", "Ernie4_5Config", {"head_dim": 8}),
    Family("Falcon", "FalconConfig"),
    Family("MPT", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    Family("BLOOM", "BloomConfig", {"n_layer": 2, "n_head": 4}),
    Family("OPT", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    Family("BioGPT", "BioGptConfig"),
    Family("XGLM", "XGLMConfig", {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    Family("GPT-2", "GPT2Config", GPT2),
    Family("GPT-Neo", "GPTNeoConfig", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    Family("GPT-J", "GPTJConfig", GPT2 | {"rotary_dim": 4}),
    Family("GPT-NeoX", "GPTNeoXConfig"),
    Family("GPTBigCode", "GPTBigCodeConfig", GPT2),
    Family("CodeGen", "CodeGenConfig", GPT2 | {"rotary_dim": 4}),
    Family("CTRL", "CTRLConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "dff": 48}),
    Family("RecurrentGemma", "RecurrentGemmaConfig", {"lru_width": 32, "head_dim": 8, "attention_window_size": 16}),
    Family("Mamba", "MambaConfig", {"state_size": 8}),
    Family("RWKV", "RwkvConfig", {"attention_hidden_size": 32}),
    Family("Mixtral", "MixtralConfig", EXPERTS),
    Family("Qwen2-MoE", "Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 48}),
    Family("Qwen3-MoE", "Qwen3MoeConfig", EXPERTS | {"head_dim": 8}),
    Family("OLMoE", "OlmoeConfig", EXPERTS),
    Family("DeepSeek-V2", "DeepseekV2Config", DEEPSEEK),
    Family("DeepSeek-V3", "DeepseekV3Config", DEEPSEEK),
    Family("GPT-OSS", "GptOssConfig", EXPERTS | {"head_dim": 8} | TWO_KINDS),
    Family("Llama 4, text", "Llama4TextConfig", EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48}),
    Family("Gemma 3, with images", "Gemma3Config"),
    Family("Llava", "LlavaConfig"),
]
