"""A merged folder is the adapter model: read by transformers and by load, and measured by the gate."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import LoRALinear, add_lora
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.cli import merge as command
from qlora_lab.export import merge as merging, parity
from qlora_lab.export.layerwise import in_another_order, layerwise
from qlora_lab.export.merge import TARGETS, merge
from qlora_lab.export.merge_folders import Folders, merge_folders
from qlora_lab.files import tensor_file
from qlora_lab.model import quantized_folder
from qlora_lab.model.load import load
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.quant.quantize import dequantize, quantize
from tests.model.families import tiny

PATHS = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"}
PATHS |= {f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("gate", "up", "down")}
IDS = torch.arange(3, 40)[None]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*are in 4 bits;"),  # a toy is mostly embedding
]


@pytest.fixture
def folder(tmp_path, tiny_llama, tokenizer):
    """In bf16, in several files."""
    tiny_llama.bfloat16().save_pretrained(tmp_path / "model", max_shard_size="6KB")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def adapted(folder, *options, scale=0.1, **changes):
    """The model of `folder` in 4 bits with an adapter that changes its answers."""
    model, _ = load(folder, *options, dtype=torch.float32, progress=False)
    return learned(add_lora(model, **{"r": 2, "alpha": 8} | changes), scale)


def learned(model, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.data.normal_(std=scale, generator=generator)
    return model


def change(layer):
    return layer.scaling * (layer.lora_B @ layer.lora_A).detach()


def layers(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def moved(model, generator):
    """The logits of `model` after each adapted weight has moved by 2^-9 of itself, up or down at random."""
    for path in sorted(PATHS):  # the same draws in every process
        weight = model.get_submodule(path).weight
        weight.data *= 1 + 2**-9 * (2 * torch.randint(0, 2, weight.shape, generator=generator) - 1)
    return logits(model)


@pytest.mark.long
def test_dequantised_is_what_was_trained(folder, tmp_path):
    """Rounding to bf16 moves a weight by at most 2^-9 of itself, so the answers by less than moves of that size do."""
    model = adapted(folder)
    merge(model, tmp_path / "out", progress=False)
    stored = weights(tmp_path / "out")
    exact = {
        path: dequantize(layer.base.weight, torch.float32) + change(layer) for path, layer in layers(model).items()
    }
    assert exact.keys() == PATHS and all(torch.equal(stored[f"{p}.weight"], w.bfloat16()) for p, w in exact.items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, _ = load(tmp_path / "out", codebook=None, dtype=torch.float32, progress=False)
    merged = logits(theirs)
    assert torch.equal(merged, logits(ours)) and torch.equal(merged, logits(layerwise(tmp_path / "out")))
    for path, weight in exact.items():
        theirs.get_submodule(path).weight.data = weight
    expected = logits(model)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-3, atol=1e-3)  # float32 sums in another order
    off = (merged - expected).norm()
    assert 0 < off < (moved(theirs, torch.Generator().manual_seed(0)) - expected).norm()


@pytest.mark.long
def test_original_is_the_originals_weights_and_the_adapter(folder, tmp_path, tiny_llama):
    model = adapted(folder)
    report = merge(model, tmp_path / "out", "original", anyway=True, progress=False)
    stored = weights(tmp_path / "out")
    for path, layer in layers(model).items():
        exact = tiny_llama.get_submodule(path).weight.float() + change(layer)
        assert torch.equal(stored[f"{path}.weight"], exact.bfloat16())
    assert torch.equal(stored["model.norm.weight"], tiny_llama.model.norm.weight)
    assert report.target == "original" and report.kl > 0  # W16 is not what was trained
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("options", [(), ("fp4", 32, False), ("int4", 64, True)])
@pytest.mark.parametrize("from_copy", [False, True])
def test_requantised_is_quantize_of_the_merged_weights(folder, tmp_path, options, from_copy):
    source = quantize_folder(folder, tmp_path / "copy", *options, progress=False) if from_copy else folder
    model = adapted(source, *(() if from_copy else options))
    report = merge(model, tmp_path / "out", "requantised", anyway=True, progress=False)
    again, _ = load(tmp_path / "out", dtype=torch.float32, progress=False)
    for path, layer in layers(model).items():
        base, stored = layer.base.weight, again.get_submodule(path).weight
        exact = dequantize(base, torch.float32) + change(layer)
        expected = quantize(exact, base.codebook, base.block_size, base.double_quant)
        assert torch.equal(stored.packed, expected.packed) and torch.equal(stored.absmax, expected.absmax)
        assert (stored.codebook, stored.block_size, stored.dtype) == (base.codebook, base.block_size, base.dtype)
        shares = report.layers[path].nibbles_changed, (stored.codes != base.codes).float().mean().item()
        assert shares[0] == shares[1]
    assert report.kl > 0 and 0 < report.cosine < 1 and 0 < report.nibbles_changed < 1


@pytest.mark.long
def test_a_folder_has_all_that_a_model_needs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantized_folder, "PIECE", 4096)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "max_length": 77}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    model = adapted(folder)
    for target in TARGETS:
        report = merge(model, tmp_path / target, target, anyway=True, progress=False)
        names = {path.name for path in (tmp_path / target).iterdir()}
        files = sorted(name for name in names if name.startswith("model-"))
        assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
        index = json.loads((tmp_path / target / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == weights(tmp_path / target).keys()
        config = json.loads((tmp_path / target / "config.json").read_text())
        assert ("quantization_config" in config) == (target == "requantised")
        theirs = AutoTokenizer.from_pretrained(tmp_path / target)
        assert theirs.chat_template["tools"] and theirs.apply_chat_template([{"role": "user", "content": "a"}])
        stored = json.loads((tmp_path / target / "parity.json").read_text())
        assert stored["kl"] == report.kl and stored["layers"].keys() == PATHS
        assert cli.main(["verify", str(tmp_path / target)]) == 0
        assert len({path.stat().st_mode for path in (tmp_path / target).iterdir() if path.is_file()}) == 1
        again, _ = load(tmp_path / target, dtype=torch.float32, progress=False)
        assert again.generation_config.max_length == 77
    assert not list(tmp_path.glob(".*"))


def test_the_model_stays_as_it_was(folder, tmp_path):
    model = adapted(folder)
    before = logits(model)
    for target in TARGETS:
        merge(model, tmp_path / target, target, anyway=True, progress=False)
    assert torch.equal(logits(model), before) and len(layers(model)) == 14


# ------------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.long
def test_an_adapter_that_changes_nothing_merges_to_the_base(folder, tmp_path):
    """lora_B = 0: the same nibbles, no direction to compare, and 4 bits again lose nothing."""
    model = add_lora(load(folder, "nf4", 64, False, dtype=torch.float32, progress=False)[0], r=2)
    report = merge(model, tmp_path / "out", "requantised", progress=False)
    assert report.nibbles_changed == 0 and report.cosine is None and report.agreement == 1
    assert report.kl < 1e-5  # the adapter's zeros are summed in another order in float32
    assert report.verdict == "cannot be told" and report.adapter_kl <= report.rounding_kl
    again, _ = load(tmp_path / "out", dtype=torch.float32, progress=False)
    for path, layer in layers(model).items():
        assert torch.equal(again.get_submodule(path).weight.packed, layer.base.weight.packed)


@pytest.mark.long
def test_the_gate_fires_and_leaves_nothing(folder, tmp_path):
    """Four bits for a large change of a model whose answers hang on each weight."""
    model = adapted(folder)
    message = r"by a KL of \d.* nats a token, but at most 0.05 is allowed .*target 'dequantised', or keep it .*--anyway"
    with pytest.raises(ValueError, match=message):
        merge(model, tmp_path / "out", "requantised", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert merge(model, tmp_path / "out", "requantised", anyway=True, progress=False).kl > parity.MOST_KL


def test_a_broken_merge_is_caught(folder, tmp_path, monkeypatch):
    """The gate compares with the adapter's own answers, not with what the merge computed."""
    model = adapted(folder)
    monkeypatch.setattr(merging, "_merged", lambda work, name, base: (merging._kept(work, name, base), None))
    with pytest.raises(ValueError, match="differs from the adapter model"):
        merge(model, tmp_path / "out", progress=False)


@pytest.mark.slow
def test_an_erased_adapter_is_refused_however_small_it_is(tmp_path, tokenizer, tiny_llama):
    """No weight reaches a midpoint: the merge is the base, but for its constants. In 16 bits the change is there."""
    folder = saved(tmp_path, tokenizer, tiny_llama.half())
    model = adapted(folder, scale=1e-3)
    with pytest.raises(ValueError, match="the merge has erased the adapter: .*target 'dequantised', or keep it"):
        merge(model, tmp_path / "out", "requantised", progress=False)
    assert not (tmp_path / "out").exists()
    report = merge(model, tmp_path / "out", "requantised", anyway=True, progress=False)
    assert report.rounding_kl < report.adapter_kl < parity.LEAST_KL and report.kl < parity.LEAST_KL
    assert report.verdict == "erased" and json.loads((tmp_path / "out/parity.json").read_text())["verdict"] == "erased"
    save_adapter(model, tmp_path / "adapter")
    folders = Folders(folder, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the merge has erased the adapter"):
        merge_folders(folders, tmp_path / "again", "requantised", progress=False)
    wide = merge_folders(folders, tmp_path / "again", progress=False)
    assert wide.verdict == "kept" and report.arrived < 0.1 and wide.arrived == pytest.approx(1, abs=0.1)


@pytest.mark.long
def test_a_change_as_small_as_rounding_cannot_be_told(tmp_path, tokenizer, tiny_llama):
    folder = saved(tmp_path, tokenizer, tiny_llama.half())
    report = merge(adapted(folder, scale=1e-8), tmp_path / "out", progress=False)
    assert 0 < report.adapter_kl < report.rounding_kl and report.verdict == "cannot be told" and report.passes


def answers(base, adapter, merged):
    """Of two positions, from probabilities."""
    rows = (torch.tensor([row]).log() for row in (base, adapter, merged))
    return parity.Answers(torch.tensor([[0, 1]]), *rows)


def test_kl_and_agreement_of_known_distributions():
    even, left, right = [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]
    report = parity.compare(answers([even, even], [even, left], [even, right]), "original", {})
    assert report.kl == pytest.approx(0.5 * math.log(3) / 2)  # 0.75 log 3 - 0.25 log 3, at one of two positions
    assert report.adapter_kl == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    assert report.agreement == 0.5 and report.perplexity_before == pytest.approx(2) and not report.passes
    with pytest.raises(ValueError, match="the merged model answers with NaN"):
        parity.compare(answers([even, even], [even, left], [[math.nan] * 2] * 2), "original", {})


@pytest.mark.parametrize("arrived, verdict", [(1.0, "kept"), (0.6, "kept"), (0.4, "erased"), (-3.0, "erased")])
def test_where_rounding_hides_the_change_in_the_answers_the_weights_tell(arrived, verdict):
    """The merge is 1e-3 away from both, at a right angle to a change of 1e-5; one way or the other says nothing."""
    for side in (1e-6, -1e-6):
        rows = ([[x, y, 1 - x - y]] * 2 for x, y in ((0.3, 0.3), (0.3 + 1e-5, 0.3), (0.3 + side, 0.3 + 1e-3)))
        double = (torch.tensor([row], dtype=torch.float64).log() for row in rows)
        changes = {"q_proj": parity.Change(0.01, None, arrived), "k_proj": parity.Change(None)}
        report = parity.compare(parity.Answers(torch.tensor([[0, 1]]), *double), "dequantised", changes)
        assert 1e4 * report.adapter_kl < 10 * report.kl < 1e-4 and report.verdict == verdict


@pytest.mark.parametrize("distance", [1e-2, 1e-5])
@pytest.mark.parametrize("back, verdict", [(0.0, "kept"), (0.4, "kept"), (0.6, "erased"), (1.0, "erased")])
def test_a_small_change_is_judged_by_what_is_left(distance, back, verdict):
    """KL of 2e-4 and 2e-10, which float32 does not tell from 0; within what rounding does, nothing is told."""
    rows = ([[x, 1 - x]] * 2 for x in (0.5, 0.5 + distance, 0.5 + (1 - back) * distance))
    double = (torch.tensor([row], dtype=torch.float64).log() for row in rows)
    given = parity.Answers(torch.tensor([[0, 1]]), *double)
    report = parity.compare(given, "requantised", {})
    assert report.adapter_kl == pytest.approx(2 * distance**2, rel=0.1) and report.verdict == verdict
    assert parity.compare(given, "requantised", {}, 2 * report.adapter_kl).verdict == "cannot be told"


def small(kl, base_kl, adapter_kl, rounding_kl=0.0, **layers):
    changes = {path: parity.Change(None, None, arrived) for path, arrived in layers.items()}
    return parity.Parity(
        "dequantised", kl, adapter_kl, 1.0, 9.0, 9.0, 8, parity.LEAST_KL, changes, base_kl, rounding_kl
    )


def test_the_weights_tell_what_is_lost_also_where_the_answers_do_not():
    """rounding_kl of a model that computes in bf16 holds the whole way to float32."""
    lost = small(5e-5, 4e-5, 2e-4, 3e-4, q_proj=0.0001)
    assert lost.verdict == "erased" and not lost.passes
    assert small(5e-5, 4e-5, 2e-4, 3e-4, q_proj=1.0).verdict == "cannot be told"
    assert small(5e-5, 4e-5, 2e-4, 3e-4).verdict == "cannot be told"


@pytest.mark.parametrize("part", [0.0101, 0.0125, 0.05, 0.1, 0.2, 0.2499])
def test_a_change_that_arrived_in_the_weights_is_kept_wherever_rounding_moves_the_answers(part):
    """adapter_kl from 1 % to 25 % of what rounding moves: the answers lie on the base's side by chance."""
    kl, base_kl = 9.8e-5, 9.6e-5
    assert small(kl, base_kl, part * base_kl, q_proj=0.99).verdict == "kept"
    assert small(kl, base_kl, part * base_kl, q_proj=0.01).verdict == "erased"
    assert small(kl, base_kl, part * base_kl).verdict == "erased"  # the answers are all that is known


def test_what_arrived_is_unknown_where_rounding_is_larger():
    """Noise at a right angle, as long as the change times 4 or 16: an error of 4 / 8 or 16 / 64 for 64 or 4,096."""
    for count, noise, is_known in ((64, 4.0, False), (64, 1.9, True), (4096, 17.0, False), (4096, 15.0, True)):
        learned = torch.ones(count)
        added = learned + noise * torch.tensor([1.0, -1.0]).repeat(count // 2)
        arrived = parity.layer_change(added, learned).arrived
        assert arrived == (pytest.approx(1) if is_known else None)


def test_a_perplexity_beyond_every_number_is_no_number():
    certain = [[0.0, -1e5]] * 2
    given = parity.Answers(torch.tensor([[0, 1]]), *(torch.tensor([certain]) for _ in range(3)))
    report = parity.compare(given, "dequantised", {})
    assert report.perplexity_before == math.inf and json.loads(report.as_json())["perplexity_before"] is None


@pytest.mark.parametrize("back, passes", [(0.0, True), (0.4, True), (0.6, False), (1.0, False)])
def test_a_merge_that_goes_more_than_half_way_back_is_refused(back, passes):
    """Also where the adapter changed little: what is left of it counts, not the size alone."""
    base, adapter = 0.5, 0.6
    p = adapter + back * (base - adapter)
    report = parity.compare(answers(*([[x, 1 - x]] * 2 for x in (base, adapter, p))), "requantised", {})
    assert report.adapter_kl < parity.MOST_KL and report.passes == passes


def test_a_cosine_tells_the_direction():
    a = torch.tensor([[3.0, 4.0]])
    for added, cosine, arrived in ((0.5 * a, 1, 0.5), (-a, -1, -1), (0 * a, 0, 0)):  # in the end all of it is lost
        found = parity.layer_change(added, a)
        assert (found.cosine, found.arrived) == (cosine, arrived)
    assert parity.layer_change(a, 0 * a) == parity.Change(None)


# ------------------------------------------------------------------------------------------------------ kinds of models


@pytest.mark.long
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
@pytest.mark.parametrize("target", TARGETS)
def test_tied_embeddings_stay_tied_unless_the_head_learned(tmp_path, tokenizer, target, targets):
    source = saved(tmp_path, tokenizer, tiny("Llama", torch.bfloat16, vocab_size=280, tie_word_embeddings=True))
    model = adapted(source, targets=targets)
    merge(model, tmp_path / "out", target, anyway=True, progress=False)
    again, _ = load(tmp_path / "out", codebook=None if target != "requantised" else "nf4", progress=False)
    stored = weights(tmp_path / "out")
    if targets == "all-linear":
        assert "lm_head.weight" not in stored and again.lm_head.weight is again.model.embed_tokens.weight
    else:
        exact = model.lm_head.base.weight + change(model.lm_head)
        assert torch.equal(stored["lm_head.weight"], exact.bfloat16())
        assert torch.equal(stored["model.embed_tokens.weight"], model.model.embed_tokens.weight.bfloat16())
        assert not again.config.tie_word_embeddings


def saved(tmp_path, tokenizer, model):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# biases; experts that are one tensor in the model; weights that a layer uses without calling; tables of positions
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "OPT", "Mixtral", "Mamba", "Gemma2", "GPTNeoX", "GptOss", "Jamba"])
def test_families(tmp_path, tokenizer, family):
    limits = {"vocab_size": 280} | ({} if family == "Mamba" else {"max_position_embeddings": 128})
    source = saved(tmp_path, tokenizer, tiny(family, **limits))
    model = adapted(source, scale=0.01)
    for target in TARGETS:
        merge(model, tmp_path / target, target, anyway=True, progress=False)
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dequantised", dtype=torch.float32))
    streamed = logits(layerwise(tmp_path / "dequantised"))
    torch.testing.assert_close(streamed, merged, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert json.loads((tmp_path / "dequantised" / "parity.json").read_text())["kl"] < parity.MOST_KL


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "OPT", "Mixtral", "Mamba", "GptOss", "Jamba"])
def test_another_order_changes_no_more_than_rounding(tmp_path, tokenizer, family):
    limits = {"vocab_size": 280} | ({} if family == "Mamba" else {"max_position_embeddings": 128})
    source = saved(tmp_path, tokenizer, tiny(family, **limits))
    plain, turned = logits(layerwise(source)), logits(in_another_order(layerwise(source)))
    torch.testing.assert_close(turned, plain, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert not torch.equal(turned, plain)


@pytest.mark.long
def test_ranks_and_strengths_of_peft_are_honoured(folder, tmp_path):
    """rsLoRA and a rank of its own for a layer: the merge takes each layer's scaling."""
    from peft import LoraConfig, get_peft_model

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", use_rslora=True, rank_pattern={"up_proj": 4})
    theirs = get_peft_model(theirs, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    model, _ = load(folder, dtype=torch.float32, progress=False)
    load_adapter(model, tmp_path / "adapter")
    merge(model, tmp_path / "out", "original", anyway=True, progress=False)
    expected = theirs.merge_and_unload()
    stored = weights(tmp_path / "out")
    for path in PATHS:  # theirs rounds once more on the way: scaling is a Python float on either side
        torch.testing.assert_close(
            stored[f"{path}.weight"], expected.get_submodule(path).weight.bfloat16(), rtol=2**-7, atol=0
        )


@pytest.mark.long
def test_float16_stays_float16(tmp_path, tokenizer, tiny_llama):
    source = saved(tmp_path, tokenizer, tiny_llama.half())
    merge(adapted(source), tmp_path / "out", progress=False)
    assert all(tensor.dtype == torch.float16 for tensor in weights(tmp_path / "out").values())
    model = adapted(source, scale=1e6)
    with pytest.raises(ValueError, match=r"q_proj.weight holds -?inf at .* after the merge in torch.float16"):
        merge(model, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.long
def test_errors_teach(folder, tmp_path):
    plain, _ = load(folder, dtype=torch.float32, progress=False)
    with pytest.raises(ValueError, match=r"no adapter: call qlora_lab.add_adapter"):
        merge(plain, tmp_path / "out")
    model = learned(add_lora(plain, r=2))
    with pytest.raises(ValueError, match="target 'gguf' is not known: choose from dequantised, original, requantised"):
        merge(model, tmp_path / "out", "gguf")
    with pytest.raises(FileExistsError, match="model is not empty: choose another folder"):
        merge(model, folder)
    with pytest.raises(FileExistsError, match="config.json is a file: choose another name"):
        merge(model, folder / "config.json")
    with pytest.raises(ValueError, match="the path is empty"):
        merge(model, "")
    copy = quantize_folder(folder, tmp_path / "copy", progress=False)
    with pytest.raises(ValueError, match=r"copy is in 4 bits, as .*: name the original that it was made from"):
        merge(model, tmp_path / "out", "original", source=copy, progress=False)
    whole, _ = load(folder, codebook=None, dtype=torch.float32, progress=False)
    with pytest.raises(ValueError, match="no layer of this model is in 4 bits, so it cannot be requantised"):
        merge(learned(add_lora(whole, r=2)), tmp_path / "out", "requantised", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_source_of_another_shape_is_refused(folder, tmp_path, tokenizer):
    other = saved(tmp_path / "other", tokenizer, tiny("Llama", vocab_size=280, intermediate_size=48))
    message = r"has model.layers.0.mlp.gate_proj.weight as \(48, 16\), this model as \(32, 16\)"
    with pytest.raises(ValueError, match=message):
        merge(adapted(folder), tmp_path / "out", source=other, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_full_disk_or_an_interrupt_leaves_nothing(folder, tmp_path, monkeypatch):
    model = adapted(folder)
    monkeypatch.setattr(quantized_folder, "PIECE", 4096)
    save, calls = tensor_file.save_file, []

    def failing(tensors, path, **options):
        calls.append(path)
        save(tensors, path, **options)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(tensor_file, "save_file", failing)
    for error in (OSError(28, os.strerror(28), "out"), KeyboardInterrupt()):
        calls.clear()
        with pytest.raises(type(error)):
            merge(model, tmp_path / "out", progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "out").mkdir()  # an empty folder of the user's is filled
    assert merge(model, tmp_path / "out", progress=False).passes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_reads_a_requantised_merge(tmp_path, tokenizer, double_quant):
    """Rows of 64, which blocks of 64 do not cross: transformers decodes our bytes to our weights."""
    from bitsandbytes.functional import dequantize_4bit

    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 280, "max_position_embeddings": 128}
    source = saved(tmp_path, tokenizer, tiny("Llama", torch.bfloat16, **sizes))
    model = adapted(source, "nf4", 64, double_quant)
    merge(model, tmp_path / "out", "requantised", anyway=True, progress=False)
    ours, _ = load(tmp_path / "out", dtype=torch.float32, progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for path in PATHS:
        packed, weight = theirs.get_submodule(path).weight, ours.get_submodule(path).weight
        assert torch.equal(packed.data.flatten(), weight.packed)
        # theirs multiplies in float32 and rounds to the dtype of the original, bf16
        decoded = dequantize_4bit(packed.data, packed.quant_state).float()
        torch.testing.assert_close(decoded, dequantize(weight, torch.float32), rtol=2**-8, atol=1e-6)
    # Theirs computes in bf16, so it is as far from float32 as ours in bf16: two draws of the same roundings.
    narrow, _ = load(tmp_path / "out", dtype=torch.bfloat16, progress=False)
    rounding = (logits(narrow) - logits(ours)).norm()
    assert (logits(theirs) - logits(ours)).norm() < 2 * rounding < 0.2 * logits(ours).norm()


# ---------------------------------------------------------------------------------------------------------- the command


def run(capsys, *words):
    code = cli.main(["merge", *map(str, words), "--quiet"])
    return (code, *capsys.readouterr())


@pytest.mark.long
@pytest.mark.filterwarnings("always")
def test_the_command_merges_and_prints_the_report(folder, tmp_path, capsys):
    save_adapter(adapted(folder), tmp_path / "adapter")
    options = [folder, "--adapter", tmp_path / "adapter", "--target"]
    code, text, _ = run(capsys, *options, "dequantised", "--out", tmp_path / "a", "--json")
    figures = json.loads(text)
    assert code == 0 and figures["kl_nats_per_token"] < figures["most_kl"] and figures["cosine"] > 0.99
    code, text, _ = run(capsys, *options, "requantised", "--out", tmp_path / "b", "--anyway")
    assert code == 0 and "nibbles changed" in text and "kl nats per token" in text
    code, text, err = run(capsys, *options, "requantised", "--out", tmp_path / "c")
    assert code == 2 and not text and "qlora-lab merge: the merged model differs from the adapter model" in err
    code, text, err = run(capsys, *options, "dequantised", "--out", folder)
    assert code == 2 and f"{folder} is not empty: choose another folder for the merged model" in err
    code, text, err = run(capsys, *options, "dequantised", "--original", folder, "--out", tmp_path / "c")
    assert code == 2 and "--original is for --target original" in err
    code, text, err = run(capsys, *options, "original", "--codebook", "none", "--out", tmp_path / "c")
    assert code == 2 and "choose from nf4, " in err and "--target dequantised or original writes 16 bits" in err
    assert cli.main(["quantize", str(folder), "--codebook", "none", "--out", str(tmp_path / "c")]) == 2
    assert "a copy is quantised: choose from nf4, " in capsys.readouterr().err
    quantize_folder(folder, tmp_path / "copy", progress=False)
    model = [tmp_path / "copy", *options[1:], "original", "--original", folder]
    code, *_ = run(capsys, *model, "--out", tmp_path / "d", "--anyway")
    code_2, *_ = run(capsys, *options, "original", "--out", tmp_path / "e", "--anyway")
    a, b = weights(tmp_path / "d"), weights(tmp_path / "e")
    assert code == code_2 == 0 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "c").exists()


def test_the_command_knows_the_targets():
    assert command.TARGETS == TARGETS and ql.merge is merge
