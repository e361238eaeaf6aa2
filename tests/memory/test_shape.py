"""Sizes are read from a configuration alone; what is missing or not known is named."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from qlora_lab.memory.shape import MIXTURES, PUBLISHED, shape_of

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 500}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "head_dim": LlamaConfig(**SIZES, head_dim=8, num_key_value_heads=1),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, attention_bias=True),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    "olmoe": OlmoeConfig(**SIZES, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, attention_bias=True),
    "qwen2_moe": Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=6, moe_intermediate_size=24, shared_expert_intermediate_size=40
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_builds_a_model_of_that_size(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert shape_of(CONFIGS[name]).parameters == sum(p.numel() for p in model.parameters())
    assert shape_of(model) == shape_of(CONFIGS[name])
    layer = model.model.layers[0]
    found = {n.split(".")[-1]: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    for one in shape_of(model).linears:
        linear = found[one.name]
        assert (linear.out_features, linear.in_features) == (one.out_features, one.in_features)
        assert (linear.bias is not None) == one.bias


def test_a_file_a_folder_a_dict_and_a_configuration_are_the_same(tmp_path):
    config = CONFIGS["llama"]
    (tmp_path / "config.json").write_text(config.to_json_string())
    shapes = [shape_of(one) for one in (tmp_path, str(tmp_path / "config.json"), config.to_dict(), config)]
    assert len({(s.layers, s.hidden, s.inner, s.key_value, s.vocabulary, s.tied, s.linears) for s in shapes}) == 1


def test_published_sizes_are_what_their_names_say():
    """In billions, as LLaMA's table 2 and the model cards of LLaMA 2 and 3 have them."""
    known = {"llama-7b": 6.7, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.2, "llama-2-70b": 69.0}
    known |= {"llama-3-8b": 8.0}
    assert set(known) == set(PUBLISHED)
    for name, billions in known.items():
        assert shape_of(name).parameters / 1e9 == pytest.approx(billions, abs=0.1)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_have_the_shapes_that_transformers_gives_them(name):
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(CONFIGS[name]).model.layers[0].mlp.experts
    shape = shape_of(CONFIGS[name])
    for matrix in shape.expert:
        stack = getattr(experts, matrix.name)
        assert stack.shape == (shape.experts, matrix.out_features, matrix.in_features)
    # config.json on the hub says num_experts, transformers writes num_local_experts
    config = CONFIGS[name].to_dict()
    config["num_experts"] = config.pop("num_local_experts", shape.experts)
    assert replace(shape_of(config), name=shape.name) == shape


@pytest.mark.parametrize(
    "field, message",
    [
        (
            {"mlp_only_layers": [1]},
            "has layers without experts, which the ledger does not tell apart: .*memory.weights",
        ),
        ({"decoder_sparse_step": 2}, "has layers without experts"),
        ({"router_jitter_noise": 0.1}, "has router_jitter_noise, whose activations are not counted"),
        ({"clip_qkv": 8.0}, "has clip_qkv, whose activations are not counted"),  # OLMoE may have it
        ({"num_experts_per_tok": 7}, "routes a token to 7 of 6 experts: give fewer"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok=None: it is a whole number of at least 1"),
    ],
)
def test_a_mixture_that_would_be_counted_wrong_is_refused(field, message):
    with pytest.raises(ValueError, match=message):
        shape_of(CONFIGS["qwen3_moe"].to_dict() | field)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_named(tmp_path, field):
    config = CONFIGS["llama"].to_dict()
    del config[field]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json has no '{field}'"):
        shape_of(tmp_path)


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="'gpt2'.*llama, mistral, qwen2"):
        shape_of({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="hidden_size=0: it is a whole number"):
        shape_of(CONFIGS["llama"].to_dict() | {"hidden_size": 0})
    with pytest.raises(ValueError, match="unknown model 'nosuch': choose one of smollm2-135m, llama-7b"):
        shape_of("nosuch")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json, line 1, column 2: it ends too early"):
        shape_of(tmp_path)
    with pytest.raises(ValueError, match="model is a int"):
        shape_of(7)
