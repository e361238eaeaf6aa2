"""Each setting of PEFT: PEFT's own logits, or a refusal by the setting's name. PEFT makes and saves what it can."""

import json
import warnings
from copy import deepcopy
from dataclasses import fields

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from qlora_lab.adapters import peft_config
from qlora_lab.adapters.layer_patterns import pattern_of
from qlora_lab.adapters.lora import adapters
from qlora_lab.adapters.peft_config import check_settings, strength_of
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.adapters.targets import linear_layers

IDS = torch.arange(3, 30)[None]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def made_by_peft(model, folder, **settings):
    """An adapter that does something, saved by PEFT; returns PEFT's model."""
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        made = peft.get_peft_model(deepcopy(model), peft.LoraConfig(**wanted))
        move(made)
        made.save_pretrained(folder)
    return made


def move(made):
    """As training does."""
    g = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=g)


def logits_of_peft(model, folder):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(deepcopy(model), folder).double().eval().base_model.model(IDS).logits


def agrees(model, folder):
    """Ours gives PEFT's logits, and PEFT gives them for what we save; the adapter is at work.

    In float64, where the order of products does not show. Norms and rotary angles are float32 in both, and with DoRA
    the lengths of rows in ours.
    """
    limit = 1e-4 if json.loads((folder / CONFIG).read_text()).get("use_dora") else 1e-5
    want = logits_of_peft(model, folder)
    ours = load_adapter(deepcopy(model), folder).double()
    torch.testing.assert_close(ours(IDS).logits, want, rtol=limit, atol=limit)
    save_adapter(ours, folder / "again")
    torch.testing.assert_close(logits_of_peft(model, folder / "again"), want, rtol=1e-5, atol=1e-5)
    assert (want - model(IDS).logits).abs().max() > 0.1
    return ours


def rewrite(folder, **settings):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | settings))


# ------------------------------------------------------------------------------------------------------------ every one


def test_every_field_of_peft_has_a_decision():
    lists = [peft_config.HONOURED, peft_config.CHOICES_OF_LAYERS, peft_config.WITHOUT_EFFECT]
    decided = [name for names in (*lists, peft_config.ALLOWED, peft_config.MUST_BE_OFF) for name in names]
    assert len(decided) == len(set(decided))
    assert {field.name for field in fields(peft.LoraConfig)} <= set(decided)


HONOURED = {
    "true": {"init_lora_weights": True},
    "false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "regex": {"target_modules": r".*layers\.1.*(q_proj|up_proj)"},
    "all linear": {"target_modules": "all-linear"},
    "partial paths": {"target_modules": ["self_attn.q_proj", "layers.0.mlp.up_proj"]},
    "layers": {"layers_to_transform": [1]},
    "layers by pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora of rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"down_proj": 7}},
    "ranks": {"rank_pattern": {"down_proj": 7}},
    "alphas": {"alpha_pattern": {r"layers\.1.*q_proj": 3, "q_proj": 5}},
    "all of them": {"use_rslora": True, "rank_pattern": {"^model.layers.0.*": 2}, "alpha_pattern": {"q_proj": 3}},
    "start of another kind": {"corda_config": peft.tuners.lora.config.CordaConfig()},
    "no task": {"task_type": None},
}


@pytest.mark.long
@pytest.mark.parametrize("name", HONOURED)
def test_what_is_read_gives_logits_of_peft(name, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path, **HONOURED[name])
    agrees(tiny_llama, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"fan_in_fan_out": True},
        {"inference_mode": False},
        {"task_type": "SEQ_2_SEQ_LM"},  # decoders are found with it
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}},
        {"peft_version": "9.0", "megatron_core": "mine", "qalora_group_size": 4},
        {"init_lora_weights": None, "trainable_token_indices": None, "modules_to_save": None},
        {"enable_lora": None, "merge_weights": False},  # of PEFT 0.2
        {"a_switch_of_tomorrow": False, "a_list": [], "a_table": {}},
    ],
)
def test_what_changes_nothing_is_passed_over(settings, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    rewrite(tmp_path, **settings)
    agrees(tiny_llama, tmp_path)


MADE = {
    "velora_config": peft.tuners.lora.config.VeloraConfig(),
    "kasa_config": peft.tuners.lora.config.KasaConfig(),
    "monteclora_config": peft.tuners.lora.config.MontecloraConfig(),
    "alora_invocation_tokens": [5, 6],
    "use_qalora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [0, 2]],
    "ensure_weight_tying": True,
}
WRITTEN = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "use_rslora": "false",
    "use_dora": "true",
    "megatron_config": {"hidden_size": 16},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "a_switch_of_tomorrow": True,
    "a_number_of_tomorrow": 0,
    "a_word_of_tomorrow": "new",
}


@pytest.mark.parametrize("name", MADE)
def test_what_peft_makes_of_another_kind_is_refused_by_name(name, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path, **{name: MADE[name]})
    refuses(tiny_llama, tmp_path, f"has {name}=")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_setting_that_is_not_known_is_never_ignored(name, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    rewrite(tmp_path, **{name: WRITTEN[name]})
    refuses(tiny_llama, tmp_path, f"has {name}={WRITTEN[name]!r} ")


def test_no_refusal_is_untested():
    assert {*peft_config.MUST_BE_OFF, *peft_config.ALLOWED} <= {*MADE, *WRITTEN, "init_lora_weights"}


def refuses(model, folder, message):
    before = model(IDS).logits
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    assert message in str(caught.value) and "but only LoRA, rsLoRA and DoRA are read here: use it" in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(folder)) and "\n" not in str(caught.value)
    assert torch.equal(model(IDS).logits, before) and not any(p.grad_fn for p in model.parameters())


# ----------------------------------------------------------------------------------------------- starts that cut a base


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_takes_weights_out_of_the_base_is_refused(start, tmp_path, tiny_llama):
    """PEFT cuts the base again when it loads the adapter; as plain LoRA it would be another model."""
    made_by_peft(tiny_llama, tmp_path, init_lora_weights=start)
    right = logits_of_peft(tiny_llama, tmp_path)
    refuses(deepcopy(tiny_llama), tmp_path, f"has init_lora_weights={start!r} (not known to leave the weights of the")
    rewrite(tmp_path, init_lora_weights=True)
    assert (load_adapter(tiny_llama, tmp_path)(IDS).logits - right).abs().max() > 0.1


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "mica", "a_start_of_tomorrow", 2])
def test_any_other_start_is_refused(start, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    rewrite(tmp_path, init_lora_weights=start)
    refuses(tiny_llama, tmp_path, f"has init_lora_weights={start!r} ")


def test_what_peft_converts_to_plain_lora_is_read(tmp_path, tiny_llama):
    """Twice the rank, here more than the layers have: A and B after training beside those before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = peft.LoraConfig(r=10, lora_alpha=10, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
        theirs = peft.get_peft_model(deepcopy(tiny_llama), start)
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        move(theirs)
        theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = agrees(tiny_llama, tmp_path / "end")
    assert {layer.r for layer in adapters(ours).values()} == {20}
    # the singular value decomposition and its way back, in float32
    torch.testing.assert_close(ours(IDS).logits, theirs.double()(IDS).logits, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------- r and alpha


@pytest.mark.parametrize(
    ("settings", "path", "strength"),
    [
        ({}, "a.q_proj", (4, 8)),
        ({"rank_pattern": {"q_proj": 2}}, "a.q_proj", (2, 8)),
        ({"rank_pattern": {"q_proj": 2}}, "a.big_q_proj", (4, 8)),  # a whole name
        ({"rank_pattern": {"^q_proj": 2}}, "a.q_proj", (4, 8)),
        ({"alpha_pattern": {"v_proj": 1, "q_proj": 2, "a.q_proj": 3}}, "a.q_proj", (4, 2)),  # the first that matches
        ({"use_rslora": True}, "a.q_proj", (4, 8)),
        ({"use_rslora": True, "use_dora": True}, "a.q_proj", (4, 16.0)),  # 8 / sqrt(4) = 16 / 4
        ({"use_rslora": True, "use_dora": True, "rank_pattern": {"q_proj": 16}}, "a.q_proj", (16, 32.0)),
        ({"rank_pattern": {pattern_of("layers.1.q"): 2}}, "layers.1.q", (2, 8)),
        ({"rank_pattern": {pattern_of("layers.1.q"): 2}}, "layers.11.q", (4, 8)),
        ({"rank_pattern": {pattern_of("layers.1.q"): 2}}, "model.layers.1.q", (4, 8)),
        ({"rank_pattern": {pattern_of("layers.1.q"): 2}}, "layersx1.q", (4, 8)),
        ({"alpha_pattern": {r".*\.(?:0|1)\.(?:q|k)(?:_proj)?": 3}}, "layers.1.k_proj", (4, 3)),
    ],
)
def test_strength_of_a_layer(settings, path, strength):
    assert strength_of({"r": 4, "lora_alpha": 8} | settings, path) == strength


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r=0 is not allowed"),
        ({"lora_alpha": -1}, "^lora_alpha=-1 is not allowed"),
        ({"lora_alpha": True}, "^lora_alpha=True is not allowed"),
        ({"lora_alpha": 1e6, "use_dora": True}, r"^use_rslora with lora_alpha \* sqrt\(r\)=2000000.0 is not allowed"),
        ({"rank_pattern": {"q_proj": "4"}}, r"^rank_pattern\['q_proj'\]='4' is not allowed"),
        ({"rank_pattern": {"q_proj": None}}, r"^rank_pattern\['q_proj'\]=None is not allowed"),
        ({"rank_pattern": {"q_proj": 4.0}}, r"^rank_pattern\['q_proj'\]=4.0 is not allowed"),
        ({"alpha_pattern": {"q_proj": [8]}}, r"^alpha_pattern\['q_proj'\]=\[8\] is not allowed"),
        (
            {"rank_pattern": {"((.+)+)+x": 4}},
            r"^rank_pattern\['\(\(\.\+\)\+\)\+x'\] can take very long to match: name its layers",
        ),
        ({"alpha_pattern": {".*.*.*.*x": 4}}, r"^alpha_pattern\['\.\*\.\*\.\*\.\*x'\] can take very long to match"),
        ({"alpha_pattern": {".?" * 30 + r"\d": 4}}, r"^alpha_pattern\['\.\?.*'\] can take very long to match"),
        ({"alpha_pattern": {"(.|..)" * 30 + r"\d": 4}}, r"^alpha_pattern\['\(.*'\] can take very long to match"),
        ({"rank_pattern": {"(" * 3000 + ")" * 3000: 4}}, r"^rank_pattern\['\(\(.*'\] can take very long to match"),
        (
            {"rank_pattern": {"q{99999999999}": 4}},
            r"^rank_pattern\['q.*'\] is not a pattern of layers: mend it \(the rep",
        ),
        ({"rank_pattern": {"(": 4}}, r"^rank_pattern\['\('\] is not a pattern of layers: mend it"),
    ],
)
def test_strengths_that_are_none(settings, message):
    with pytest.raises(ValueError, match=message):
        strength_of({"r": 4, "lora_alpha": 8, "use_rslora": True} | settings, "a.q_proj")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has peft_type=None"),
        ({"peft_type": "LOHA", "alpha": 8}, "has peft_type='LOHA' "),
        ({"peft_type": "LORA", "lora_alpha": 8}, "has no r in its configuration"),
        ({"peft_type": "LORA", "r": 8, "lora_alpha": None}, "has no lora_alpha in its configuration"),
        ({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": "x"}, "has rank_pattern='x': it must map"),
        ({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "alpha_pattern": [1]}, r"has alpha_pattern=\[1\]: it must map"),
    ],
)
def test_a_configuration_that_is_none(config, message):
    with pytest.raises(ValueError, match=f"^the adapter {message}"):
        check_settings(config, "the adapter")


# -------------------------------------------------------------------------------------------------- keys of the tensors


def edit(folder, change):
    stored = load_file(folder / WEIGHTS)
    change(stored)
    save_file(stored, folder / WEIGHTS)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_head_comes_with_a_copy_of_the_base(tied, tmp_path, tiny_llama):
    """PEFT stores the head's own weight, too: it is compared, to within a rounding to bf16, and not loaded."""
    key = "base_model.model.lm_head.base_layer.weight"
    if tied:
        tiny_llama.config.tie_word_embeddings = True
        tiny_llama.tie_weights()
    made_by_peft(tiny_llama, tmp_path, target_modules=["up_proj", "lm_head"])
    assert key in load_file(tmp_path / WEIGHTS)
    agrees(tiny_llama, tmp_path)
    load_adapter(deepcopy(tiny_llama).bfloat16(), tmp_path)
    edit(tmp_path, lambda stored: stored[key][7].mul_(1.01))
    with pytest.raises(ValueError, match=f"holds {key}, but this model has other values"):
        load_adapter(tiny_llama, tmp_path)


@pytest.mark.parametrize("size", [280, 290])
def test_embeddings_beside_an_adapter_are_compared(size, tmp_path, tiny_llama):
    """PEFT saves them when it is asked to, or finds that the vocabulary was extended: that is another base."""
    theirs = deepcopy(tiny_llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.resize_token_embeddings(size)
        made = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q_proj"], r=4))
        move(made)
        made.save_pretrained(tmp_path, save_embedding_layers=True)
    assert sum("lora_" not in key for key in load_file(tmp_path / WEIGHTS)) == 2
    if size == 280:
        agrees(tiny_llama, tmp_path)
    else:
        with pytest.raises(
            ValueError, match=r"embed_tokens.weight, but this model has other values: they were trained"
        ):
            load_adapter(tiny_llama, tmp_path)


def test_an_adapter_of_an_embedding_is_refused(tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(
        ValueError, match="lora_embedding_A, .*but adapters of embeddings \\(target_modules\\) are not read"
    ):
        load_adapter(tiny_llama, tmp_path)


def test_layers_of_another_type_are_named(tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    path = "model.layers.0.self_attn.q_proj"
    tiny_llama.set_submodule(path, nn.Conv1d(16, 16, 1))
    with pytest.raises(ValueError, match=f"{path} is of type Conv1d here: only linear layers and experts are adapted"):
        load_adapter(tiny_llama, tmp_path)


def test_a_gate_of_one_expert_takes_any_rank(tmp_path):
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 8,
        "num_experts": 2,
        "vocab_size": 280,
    }
    sizes |= {"shared_expert_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moe = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(num_key_value_heads=2, num_experts_per_tok=1, initializer_range=1.0, **sizes)
        ).eval()
    moe.set_experts_implementation("eager")  # the grouped product knows no float64
    assert linear_layers(moe)["model.layers.0.mlp.shared_expert_gate"].out_features == 1
    made_by_peft(moe, tmp_path, target_modules=["q_proj", "shared_expert_gate"])
    agrees(moe, tmp_path)


def test_keys_of_no_layer_are_named_at_most_three(tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path, target_modules="all-linear")
    half = deepcopy(tiny_llama)
    half.model.layers = half.model.layers[:1]
    with pytest.raises(ValueError) as caught:
        load_adapter(half, tmp_path)
    assert str(caught.value).count("base_model.model.model.layers.1.") == 3
    fix = "load the model that the adapter was trained on"
    assert f" and 11 more, but this model has no such layer: {fix}" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_widened_exactly(dtype, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    edit(tmp_path, lambda stored: stored.update({key: tensor.to(dtype) for key, tensor in stored.items()}))
    ours, stored = adapters(load_adapter(tiny_llama, tmp_path)), load_file(tmp_path / WEIGHTS)
    for path, layer in ours.items():
        for name, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, stored[f"base_model.model.{path}.{name}.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype, tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    edit(tmp_path, lambda stored: stored.update({key: tensor.to(dtype) for key, tensor in stored.items()}))
    with pytest.raises(ValueError, match=f"lora_A in {dtype}: save it in float32, bf16 or fp16"):
        load_adapter(tiny_llama, tmp_path)


def test_a_rank_that_the_configuration_does_not_have(tmp_path, tiny_llama):
    made_by_peft(tiny_llama, tmp_path)
    rewrite(tmp_path, r=8)
    with pytest.raises(ValueError, match=r"q_proj.lora_A has shape \(4, 16\), but with r=8 this model's layer needs"):
        load_adapter(tiny_llama, tmp_path)
