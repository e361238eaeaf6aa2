"""Kinds of PEFT folder: each is read with the logits of PEFT's own reload, or refused by a name that its maker knows.

`pytest -rP tests/adapters/test_peft_folders.py` prints the table. PEFT makes and saves every folder.
test_peft_config.py goes through the settings one by one; here are also ways to a folder that no setting records.
"""

import json
import warnings
from copy import deepcopy
from functools import partial

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lab.adapters.adapter import method_of
from qlora_lab.adapters.lora import adapters
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.adapters.targets import linear_layers

IDS = torch.arange(3, 30)[None]
EQUAL = "read, equal to PEFT's"
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
WEIGHTS = "adapter_model.safetensors"


def trained(made, seed=1):
    """Move all that PEFT trains, as steps would."""
    g = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=g)
    return made


def plain(base, adapter_name="default", **settings):
    return trained(peft.get_peft_model(base, peft.LoraConfig(**PLAIN | settings), adapter_name))


# -------------------------------------------------------------------------- ways to a folder: each takes (base, folder)


def by_settings(**settings):
    return lambda base, folder: plain(base, **settings).save_pretrained(folder)


def by_method(config):
    return lambda base, folder: trained(peft.get_peft_model(base, config)).save_pretrained(folder)


def with_save_options(base, folder, **options):
    plain(base).save_pretrained(folder, **options)


def under_a_name(base, folder):
    """PEFT puts it into a subfolder, whose path a user passes on."""
    plain(base, "lora_A").save_pretrained(folder.parent / "run")
    (folder.parent / "run" / "lora_A").rename(folder)


def combined(kind, base, folder):
    """Make one adapter of two."""
    two = plain(base, "first")
    other = {"r": 4 if kind == "linear" else 3, "lora_alpha": 7}
    targets = PLAIN["target_modules"] if kind == "linear" else ["q_proj", "up_proj"]
    two.add_adapter("second", peft.LoraConfig(**PLAIN | other | {"target_modules": targets}))
    two.set_adapter("second")
    trained(two, seed=2).add_weighted_adapter(["first", "second"], [0.5, 0.7], "both", combination_type=kind)
    two.save_pretrained(folder.parent / "run", selected_adapters=["both"])
    (folder.parent / "run" / "both").rename(folder)


def converted(base, folder):
    """Cut another method's change of the weights down to a low rank, another one for each layer."""
    loha = peft.LoHaConfig(r=4, alpha=8, target_modules=PLAIN["target_modules"], task_type="CAUSAL_LM")
    peft.save_as_lora(folder, trained(peft.get_peft_model(base, loha)), rank=0.9)


def by_transformers(base, folder):
    base.add_adapter(peft.LoraConfig(**PLAIN))
    trained(base).save_pretrained(folder)


def of_a_compiled_base(base, folder):
    plain(torch.compile(base)).save_pretrained(folder)


def of_compiled_layers(base, folder):
    base.model.layers = nn.ModuleList(map(torch.compile, base.model.layers))
    plain(base).save_pretrained(folder)


def of_a_base_in_4_bits(base, folder):
    """As QLoRA does it, by bitsandbytes; the head is left alone, and an adapter stands beside it."""
    for path, layer in linear_layers(base).items():
        if path != "lm_head":
            packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            base.set_submodule(path, packed.to("cpu"))  # to quantises
    plain(base, target_modules=["q_proj", "lm_head"]).save_pretrained(folder)


def in_dtype(dtype, base, folder):
    plain(base).to(dtype).save_pretrained(folder)


def without_some_layers(base, folder):
    plain(base).save_pretrained(folder)
    kept = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if ".layers.0." not in key}
    save_file(kept, folder / WEIGHTS)


def with_trained_embeddings(size, base, folder):
    """Train embeddings by hand, a little: no setting records it, but the file holds them if it is asked to."""
    made = plain(base)
    g = torch.Generator().manual_seed(2)
    weight = made.get_input_embeddings().weight
    weight.data *= 1 + size * torch.randn(weight.shape, generator=g)
    made.save_pretrained(folder, save_embedding_layers=True)


def with_more_tokens(base, folder):
    base.resize_token_embeddings(290, mean_resizing=False)
    plain(base).save_pretrained(folder, save_embedding_layers=True)


def of_the_model_without_its_head(base, folder):
    plain(base.model, task_type="FEATURE_EXTRACTION").save_pretrained(folder)


def without_dora(base, folder):
    plain(base, use_dora=True).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": False}))


KINDS = {  # what its maker did -> how, and what we do
    # Targets, however they are written: the file's keys say which layers they chose.
    "targets: last names": (by_settings(), EQUAL),
    "targets: a regular expression": (by_settings(target_modules=r".*layers\.1.*(q_proj|up_proj)"), EQUAL),
    "targets: partial paths": (by_settings(target_modules=["self_attn.q_proj", "layers.0.mlp.up_proj"]), EQUAL),
    "targets: all-linear": (by_settings(target_modules="all-linear"), EQUAL),
    "targets: names that match nothing": (by_settings(target_modules=["q_proj", "query_key_value", "c_attn"]), EQUAL),
    "targets: layers excluded": (by_settings(target_modules="all-linear", exclude_modules=["down_proj"]), EQUAL),
    "targets: excluded by expression": (by_settings(exclude_modules=r".*layers\.0.*"), EQUAL),
    "targets: chosen layers": (by_settings(layers_to_transform=[1], layers_pattern=["layers"]), EQUAL),
    "file: layers taken out later": (without_some_layers, EQUAL),
    # Numbers.
    "r: above the layer's own": (by_settings(r=40), EQUAL),
    "lora_alpha: a fraction": (by_settings(lora_alpha=2.5), EQUAL),
    "lora_dropout": (by_settings(lora_dropout=0.3), EQUAL),
    "rank_pattern": (by_settings(rank_pattern={"down_proj": 7, "v_proj": 2}), EQUAL),
    "rank_pattern: a group": (by_settings(rank_pattern={r"layers\.\d{1,2}\.self_attn\.(q|k)_proj": 3}), EQUAL),
    "rank_pattern: may take for ever": (by_settings(rank_pattern={r"model\.(\w+)+\.q_proj": 3}), "rank_pattern"),
    "rank_pattern: sorted by PEFT": (by_settings(rank_pattern={"q_proj": 3, ".*": 5}), "rank_pattern"),  # it fails, too
    "alpha_pattern: sorted by PEFT": (by_settings(alpha_pattern={"q_proj": 3, ".*": 5}), EQUAL),
    "alpha_pattern": (by_settings(alpha_pattern={r"layers\.1.*q_proj": 3, "q_proj": 5}), EQUAL),
    "alpha_pattern: zero": (by_settings(alpha_pattern={"q_proj": 0}), "alpha_pattern"),
    "use_rslora and both patterns": (
        by_settings(use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1}),
        EQUAL,
    ),
    "lora_alpha: zero": (by_settings(lora_alpha=0), "lora_alpha"),
    "lora_alpha: negative": (by_settings(lora_alpha=-8), "lora_alpha"),
    "lora_dropout: everything": (by_settings(lora_dropout=1.0), "lora_dropout"),
    # LoRA's relatives.
    "use_dora": (by_settings(use_dora=True), EQUAL),
    "use_dora: with dropout": (by_settings(use_dora=True, lora_dropout=0.3), EQUAL),
    "use_dora and use_rslora": (by_settings(use_dora=True, use_rslora=True), EQUAL),
    "use_dora: patterns": (
        by_settings(use_dora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 1}),
        EQUAL,
    ),
    "use_dora: the head": (by_settings(use_dora=True, target_modules=["q_proj", "lm_head"]), EQUAL),
    "use_dora: taken out of the settings": (without_dora, "lora_magnitude_vector"),
    # Other doors to the same folder.
    "an adapter with a name": (under_a_name, EQUAL),
    "transformers' add_adapter": (by_transformers, EQUAL),
    "a base in 4 bits by bitsandbytes": (of_a_base_in_4_bits, EQUAL),
    "torch.compile: the base": (of_a_compiled_base, EQUAL),
    "torch.compile: each layer": (of_compiled_layers, EQUAL),
    "add_weighted_adapter: linear": (partial(combined, "linear"), EQUAL),
    "add_weighted_adapter: cat": (partial(combined, "cat"), EQUAL),
    "add_weighted_adapter: svd": (partial(combined, "svd"), EQUAL),
    "save_as_lora: of LoHa": (converted, EQUAL),
    "stored in bf16": (partial(in_dtype, torch.bfloat16), EQUAL),
    "stored in fp16": (partial(in_dtype, torch.float16), EQUAL),
    "stored in float64": (partial(in_dtype, torch.float64), "float64"),
    "safe_serialization=False": (partial(with_save_options, safe_serialization=False), "safe_serialization"),
    "task_type: without the head": (of_the_model_without_its_head, "task_type"),
    # Head, embeddings, whole modules.
    "targets: the head": (by_settings(target_modules=["q_proj", "lm_head"]), EQUAL),
    "targets: the head by expression": (by_settings(target_modules=r".*(q_proj|lm_head)"), EQUAL),
    "targets: embeddings": (by_settings(target_modules=["q_proj", "embed_tokens"]), "target_modules"),
    "save_embedding_layers: untouched": (partial(with_save_options, save_embedding_layers=True), EQUAL),
    "save_embedding_layers: trained": (partial(with_trained_embeddings, 0.1), "save_embedding_layers"),
    "save_embedding_layers: by 0.01 %": (partial(with_trained_embeddings, 1e-4), "save_embedding_layers"),
    "save_embedding_layers: more tokens": (with_more_tokens, "save_embedding_layers"),
    "modules_to_save: the head": (by_settings(modules_to_save=["lm_head"]), "modules_to_save"),
    "modules_to_save: embeddings": (by_settings(modules_to_save=["embed_tokens"]), "modules_to_save"),
    "modules_to_save: norms": (by_settings(modules_to_save=["norm"]), "modules_to_save"),
    "modules_to_save: none": (by_settings(modules_to_save=[]), EQUAL),
    "task_type: SEQ_CLS": (by_settings(task_type="SEQ_CLS"), "modules_to_save"),  # PEFT adds "score" to it
    "trainable_token_indices": (by_settings(trainable_token_indices=[1, 2]), "trainable_token_indices"),
    "trainable_token_indices: none": (by_settings(trainable_token_indices=[]), "trainable_token_indices"),
    "bias: lora_only": (by_settings(bias="lora_only"), "bias"),
    # More than plain LoRA.
    "lora_bias": (by_settings(lora_bias=True), "lora_bias"),
    "layer_replication": (by_settings(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
    "target_parameters": (by_settings(target_parameters=["mlp.up_proj.weight"]), EQUAL),
    "init_lora_weights: pissa": (by_settings(init_lora_weights="pissa"), "init_lora_weights"),
    "AdaLoRA": (by_method(peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10)), "peft_type"),
    "VeRA": (by_method(peft.VeraConfig(target_modules=["q_proj"])), "peft_type"),
    "IA3": (by_method(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])), "peft_type"),
}


def logits_of_peft(make, base, folder):
    """Read the folder by PEFT, upon a base of the kind that it was made on."""
    if make is of_a_compiled_base:
        base = torch.compile(base)
    if make is of_compiled_layers:
        base.model.layers = nn.ModuleList(map(torch.compile, base.model.layers))
    inner = peft.PeftModel.from_pretrained(base, folder).double().eval().base_model.model
    for module in inner.modules():
        for name, child in module.named_children():
            setattr(module, name, getattr(child, "_orig_mod", child))  # the same layers, not compiled: in seconds
    return getattr(inner, "_orig_mod", inner)(IDS).logits


def verdict(make, base, folder):
    """Say what load_adapter does with the folder: EQUAL, or the whole refusal. Anything else is an error here."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # PEFT's own
        make(deepcopy(base), folder)
        before = base(IDS).logits
        ours = deepcopy(base)
        try:
            load_adapter(ours, folder)
        except (ValueError, FileNotFoundError) as error:
            assert torch.equal(ours(IDS).logits, before) and not any(p.grad_fn for p in ours.parameters())
            return str(error)
        want = logits_of_peft(make, deepcopy(base), folder)
        # In float64, where the order of products does not show; norms and rotary angles are float32 in both, and with
        # DoRA the lengths of rows in ours.
        limit = 1e-4 if method_of(ours) == "dora" else 1e-5
        torch.testing.assert_close(ours.double()(IDS).logits, want, rtol=limit, atol=limit)
        assert (want - before).abs().max() > 0.1, "the adapter does nothing"
    return EQUAL


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "head tied to the embeddings"])
def test_every_kind_is_read_as_peft_reads_it_or_refused_by_name(tied, tmp_path, tiny_llama):
    if tied:
        tiny_llama.config.tie_word_embeddings = True
        tiny_llama.tie_weights()
    tiny_llama.eval()
    found = {}
    for number, (kind, (make, wanted)) in enumerate(KINDS.items()):
        folder = tmp_path / str(number) / "adapter"
        said = verdict(make, tiny_llama, folder)
        by_name = wanted != EQUAL and wanted in said.replace(str(tmp_path), "") and "\n" not in said
        found[kind] = wanted if by_name else said
        print(f"{kind:36}{f'refused by {wanted!r}' if by_name else said}")
    assert found == {kind: wanted for kind, (_, wanted) in KINDS.items()}


def test_the_table_has_what_was_promised():
    assert len(KINDS) >= 30 and sum(wanted == EQUAL for _, wanted in KINDS.values()) >= 20


def test_a_compiled_model_takes_an_adapter_and_gives_it_back(tmp_path, tiny_llama):
    """No path names the wrapper: PEFT reads the folder upon a model that is not compiled."""
    by_settings()(deepcopy(tiny_llama), tmp_path / "theirs")
    compiled = torch.compile(tiny_llama)
    assert load_adapter(compiled, tmp_path / "theirs") is compiled and len(adapters(compiled)) == 4
    save_adapter(compiled, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def saved(tmp_path, tiny_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_settings()(deepcopy(tiny_llama), tmp_path / "adapter")
    return tmp_path / "adapter"


def refuses(model, folder, message):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError) as caught:
        load_adapter(model, folder)
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut_off_is_named(kept, saved, tiny_llama):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:kept])
    refuses(tiny_llama, saved, f"cannot be read ({WEIGHTS}: ")


@pytest.mark.parametrize("size", [0, 2**40, 2**64 - 1])
def test_a_header_that_lies_about_its_length_is_named(size, saved, tiny_llama):
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(size.to_bytes(8, "little") + whole[8:])
    refuses(tiny_llama, saved, f"cannot be read ({WEIGHTS}: ")


def test_tensors_of_other_shapes_are_named(saved, tiny_llama):
    """As many numbers in another shape, one dimension more, and none."""
    stored = load_file(saved / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    others = {"(16, 4)": stored[key].t().contiguous(), "(1, 4, 16)": stored[key][None], "()": torch.tensor(1.0)}
    for shape, tensor in others.items():
        save_file(stored | {key: tensor}, saved / WEIGHTS)
        refuses(tiny_llama, saved, f"q_proj.lora_A has shape {shape}, but with r=4 this model's layer needs (4, 16)")


def test_two_adapters_of_one_layer_are_named(saved, tiny_llama):
    stored = load_file(saved / WEIGHTS)
    compiled = {key.replace(".model.layers.", ".model.layers._orig_mod."): tensor + 1 for key, tensor in stored.items()}
    save_file(stored | compiled, saved / WEIGHTS)
    refuses(tiny_llama, saved, "adapts a layer twice, with '_orig_mod.' in its name and without")
