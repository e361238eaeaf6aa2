"""Tiny models of many families of transformers, drawn with seed 0: 64 tokens, 64 positions where there is a limit."""

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_lab.export.layerwise import as_float
from qlora_lab.model.experts import is_stack
from qlora_lab.model.layer_kinds import turned
from qlora_lab.model.packed_module import PackedModule

LIKE_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LIKE_LLAMA |= {"max_position_embeddings": 64}
LIKE_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
STATE_SPACE = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
GROUPED = LIKE_LLAMA | {"num_key_value_heads": 2, "head_dim": 8}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}
# Experts that are not known here. Only tests that name these take them: each costs every test over all families.
UNKNOWN_EXPERTS = {
    "JetMoe": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "LongcatFlash": LIKE_LLAMA
    | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32}
    | {"num_layers": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 2},
}
# Likewise, those that differ from a family below in one place: no experts, or norms over all heads.
BY_NAME = {"Qwen3": GROUPED}
BY_NAME |= {"Olmoe": LIKE_LLAMA | {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}}
FAMILIES = {
    "BioGpt": LIKE_LLAMA,
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "CTRL": LIKE_GPT2 | {"dff": 32},
    "CodeGen": LIKE_GPT2 | {"n_head": 4, "rotary_dim": 4},
    "Falcon": LIKE_LLAMA,
    "GPT2": LIKE_GPT2,
    "GPTBigCode": LIKE_GPT2,
    "GPTJ": LIKE_GPT2 | {"rotary_dim": 4},
    "GPTNeoX": LIKE_LLAMA,
    "Gemma2": GROUPED | {"sliding_window": 4},
    "GptOss": GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    "Jamba": LIKE_LLAMA
    | {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
    | {"mamba_d_state": 4, "use_mamba_kernels": False},
    "Lfm2": GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Llama": LIKE_LLAMA,
    "Mamba": STATE_SPACE,
    "Mamba2": STATE_SPACE | {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "Mistral": GROUPED | {"sliding_window": 4},
    "Mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4Text": GROUPED | {"intermediate_size_mlp": 32, "num_local_experts": 4, "num_experts_per_tok": 1},
    "Mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "OPT": OPT | {"max_position_embeddings": 64},
    "Phi3": LIKE_LLAMA,
    "Qwen2Moe": GROUPED
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": GROUPED | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": LIKE_LLAMA | {"num_key_value_heads": 2},
    "RecurrentGemma": {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 8, "lru_width": 16, "attention_window_size": 4},
    "Rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 64},
}


def with_decoded_weights(theirs: PreTrainedModel, ours: PreTrainedModel) -> PreTrainedModel:
    """Transformers' own model with the weights that the 4-bit model `ours` stands for, with adapters or without."""
    for path, module in ours.named_modules():
        if isinstance(module, PackedModule):
            path = path.removesuffix(".base")
            name = path if is_stack(theirs, path) else f"{path}.weight"
            theirs.get_parameter(name).data = turned(theirs, name, as_float(module.weight)).contiguous()
    return theirs


def tiny(family: str, dtype: torch.dtype = torch.float32, **options) -> PreTrainedModel:
    """The causal model of `family`, frozen, drawn wide enough that attention decides."""
    own = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    own = (FAMILIES | UNKNOWN_EXPERTS | BY_NAME)[family] | own
    config = getattr(transformers, f"{family}Config")(**own | {"initializer_range": 0.5} | options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()
