"""Layers that are linear under another name: GPT-2's Conv1D, which lies turned, and Falcon's own subclass."""

import json
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextConfig
from transformers.pytorch_utils import Conv1D

import qlora_lab as ql
from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.export.merge import TARGETS
from qlora_lab.measure.in_place import Source, Variant, quantised_in_place
from qlora_lab.measure.sensitivity import choices_of, sensitivity
from qlora_lab.model.layer_kinds import as_matrix, is_product, is_turned, out_and_in
from qlora_lab.model.linear4bit import Linear4bit, decoded, quantize_linears
from qlora_lab.model.load import load
from qlora_lab.model.model_files import ModelError
from qlora_lab.model.quantized_folder import quantize_folder, read_by
from qlora_lab.model.share_in_4_bits import in_4_bits
from qlora_lab.quant.quantize import quantize
from tests.model.families import tiny, with_decoded_weights

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.arange(3, 30)[None]
# the same float32 products in another order: sums of 16 to 64 terms, through two layers
NEAR = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["GPT2", "Falcon"])
def family(request, tmp_path, tokenizer):
    """A folder of that family, and its model as transformers has it."""
    model = tiny(request.param, vocab_size=280, initializer_range=0.3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def loaded(folder, **options):
    return load(folder, dtype=torch.float32, device="cpu", progress=False, **options)[0]


def test_what_a_layer_computes_is_found_by_running_it():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Inherits(nn.Linear):
        pass

    router = Llama4Router(Llama4TextConfig(num_local_experts=4, num_experts_per_tok=1, hidden_size=8))
    before = torch.random.get_rng_state()
    kinds = (nn.Linear(3, 2), FalconLinear(3, 2, bias=False), Scaled(3, 2), Inherits(3, 2), router, nn.ReLU())
    torch.random.set_rng_state(before)
    assert [is_product(layer) for layer in kinds] == [True, True, False, False, False, False]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert is_product(Conv1D(2, 3)) and out_and_in(Conv1D(2, 3)) == (2, 3) and is_turned(Conv1D(2, 3))
    assert not is_turned(nn.Linear(3, 2))


def test_conv1d_is_quantised_as_its_transpose():
    model = nn.ModuleDict({"c_fc": Conv1D(24, 40)})
    weight = model["c_fc"].weight.detach().clone()  # (40, 24): (in, out)
    quantize_linears(model, block_size=32)
    packed = model["c_fc"].weight
    assert packed.shape == (24, 40) and is_turned(model["c_fc"])
    assert torch.equal(packed.packed, quantize(weight.t(), block_size=32, double_quant=True).packed)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model["c_fc"](x), x @ decoded(model["c_fc"]).t() + model["c_fc"].bias, **NEAR)


def test_logits_are_those_of_the_decoded_weights(family):
    folder, theirs = family
    ours = loaded(folder, block_size=16)
    packed = [layer for layer in ours.modules() if isinstance(layer, Linear4bit)]
    assert len(packed) == 8  # four in each of two layers
    turned = ", 8 of the tensors as their transpose" if type(theirs).__name__.startswith("GPT2") else ""
    assert str(in_4_bits(ours)).endswith(f"embeddings and head are in 4 bits{turned}")
    original = theirs(IDS).logits
    want = with_decoded_weights(theirs, ours)(IDS).logits
    torch.testing.assert_close(ours(IDS).logits, want, **NEAR)
    assert (want - original).abs().max() > 100 * NEAR["atol"]  # quantising moved them, so the comparison can fail


def test_a_folder_comes_back_as_it_was_quantised(family, tmp_path):
    folder, _ = family
    out = quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
    ours, mapped = loaded(folder, block_size=16), loaded(out)
    assert torch.equal(ours(IDS).logits, mapped(IDS).logits)
    for path, layer in ours.named_modules():
        if isinstance(layer, Linear4bit):
            again = mapped.get_submodule(path)
            assert torch.equal(layer.weight.packed, again.weight.packed) and layer.turned == again.turned


@pytest.mark.long
def test_codes_of_the_untransposed_matrix_are_refused(family, tmp_path):
    """They have the right number, so only the stored shape tells."""
    folder, _ = family
    out = quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    for key in (key for key in tensors if ".quant_state." in key):
        state = json.loads(bytes(tensors[key].tolist()))
        state["shape"].reverse()
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"has shape \(.*\), but config.json asks for \("):
        loaded(out)


@pytest.mark.long
def test_bitsandbytes_reads_gpt2_and_not_falcon(tmp_path, tokenizer):
    for family, readers in (("GPT2", "and transformers with bitsandbytes"), ("Falcon", "not FalconLinear")):
        model = tiny(family, vocab_size=280, **({"n_embd": 32} if family == "GPT2" else {"hidden_size": 32}))
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        out = quantize_folder(tmp_path / family, tmp_path / f"{family}-4bit", "nf4", 32, progress=False)
        assert readers in read_by(out)
    ours = loaded(tmp_path / "GPT2-4bit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "GPT2-4bit", dtype=torch.float32)
    for path, layer in ours.named_modules():  # the weights, because products are in bf16, as config.json asks
        if isinstance(layer, Linear4bit):
            weight = theirs.get_submodule(path).weight
            assert torch.equal(decoded(layer), bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float())


def test_three_steps_leave_the_frozen_weights_alone(family):
    folder, _ = family
    model = add_lora(loaded(folder, block_size=16), r=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0] and len(adapters(model)) == 8
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dora", "pissa"))])
@pytest.mark.parametrize("codebook", ["nf4", None])
def test_peft_gives_the_same_logits_on_the_plain_model(family, tmp_path, method, codebook):
    folder, theirs = family
    ours = add_adapter(loaded(folder, codebook=codebook, **({"block_size": 16} if codebook else {})), method, r=4)
    draws = torch.Generator().manual_seed(1)
    for layer in adapters(ours).values():
        layer.lora_B.data += 0.1 * torch.randn(layer.lora_B.shape, generator=draws)
    ql.save_adapter(ours, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert saved["fan_in_fan_out"] is type(theirs).__name__.startswith("GPT2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")  # PEFT warns of a layout that it has to correct
        plain = PeftModel.from_pretrained(with_decoded_weights(theirs, ours), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, plain(input_ids=IDS).logits, **NEAR)
    again = loaded(folder, codebook=codebook, **({"block_size": 16} if codebook else {}))
    ql.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, ours(IDS).logits, **NEAR)


def test_loftq_brings_the_weights_nearer_to_the_original(family):
    folder, theirs = family
    ours = add_adapter(loaded(folder, block_size=16), "loftq", r=8, alpha=8, source=folder, progress=False)
    for path, layer in adapters(ours).items():
        own = theirs.get_submodule(path)
        lost = as_matrix(own, own.weight) - decoded(layer.base)
        assert (lost - layer.scaling * layer.lora_B @ layer.lora_A).norm() < 0.8 * lost.norm()


def test_biases_learn_and_rows_use_several_adapters(tmp_path):
    model = tiny("GPT2", vocab_size=280)
    biases = adapters(add_adapter(model, "bitfit"))
    assert biases["transformer.h.0.attn.c_attn"].delta.shape == (48,)  # 3 x 16 outputs
    model = add_lora(tiny("GPT2", vocab_size=280), r=2)
    for made in adapters(model).values():
        made.lora_B.data.fill_(0.1)
    want = model(IDS).logits
    ql.save_adapter(model, tmp_path / "adapter")
    model = tiny("GPT2", vocab_size=280)
    bank = ql.AdapterBank(model)
    bank.add("first", tmp_path / "adapter")
    with bank.rows(["first", None]):
        both = model(IDS.repeat(2, 1)).logits
    torch.testing.assert_close(both[:1], want, **NEAR)
    assert (both[1] - want[0]).abs().max() > 1e-3


def test_an_adapter_by_peft_is_read(tmp_path, tokenizer):
    theirs = tiny("GPT2", vocab_size=280)
    theirs.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"target_modules": ["c_attn", "c_fc"], "r": 4, "fan_in_fan_out": True, "init_lora_weights": False}
    made = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    made.save_pretrained(tmp_path / "adapter")
    ours = ql.load_adapter(loaded(tmp_path / "model", codebook=None), tmp_path / "adapter")
    torch.testing.assert_close(ours(IDS).logits, made.eval()(input_ids=IDS).logits, **NEAR)


@pytest.mark.slow  # four passes through the model for each target
@pytest.mark.parametrize("target", TARGETS)
def test_merges_keep_the_layout_of_the_family(family, tmp_path, target):
    folder, theirs = family
    ours = add_lora(loaded(folder, block_size=16), r=4)
    draws = torch.Generator().manual_seed(1)
    for layer in adapters(ours).values():
        layer.lora_B.data.normal_(std=0.3, generator=draws)
    parity = ql.merge(ours, tmp_path / "merged", target, source=folder, anyway=True, progress=False)
    merged = loaded(tmp_path / "merged", **({} if target == "requantised" else {"codebook": None}))
    path, layer = next(iter(adapters(ours).items()))
    base = theirs.get_submodule(path)
    want = as_matrix(base, base.weight) if target == "original" else decoded(layer.base)
    want = want + layer.scaling * layer.lora_B @ layer.lora_A
    got = merged.get_submodule(path)
    if target == "requantised":
        assert torch.equal(got.weight.packed, quantize(want, "nf4", 16, True).packed)
    else:  # 8 bits of bf16
        torch.testing.assert_close(as_matrix(got, got.weight), want, rtol=2**-8, atol=1e-6)
    assert parity.adapter_kl > 0 and parity.kl < parity.adapter_kl


def test_sensitivity_and_error_see_rows_of_inputs(tmp_path, tokenizer):
    model = tiny("GPT2", vocab_size=280)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    s = sensitivity(model, tokenizer, [{"input_ids": IDS}], progress=False)
    path = "transformer.h.0.mlp.c_fc"
    assert s[path].shape == (16,)  # c_fc: 16 inputs, 64 outputs
    for given in (model, tmp_path / "model"):
        choices = choices_of(given, [("nf4", 16, False)], s, progress=False)
        weight = model.get_submodule(path).weight.detach().t()
        off = (ql.dequantize(quantize(weight, "nf4", 16)) - weight).square().sum(0) @ s[path]
        assert choices.error[choices.layers.index(path), 0] == pytest.approx(off.item(), rel=1e-4)
    source = Source(loaded(tmp_path / "model", codebook=None), tmp_path / "model")
    with quantised_in_place(source, Variant("nf4", 16, False)):
        inside = source.model.get_submodule(path).weight.detach().clone()
    assert torch.equal(inside, ql.dequantize(quantize(weight, "nf4", 16)).t())
    assert torch.equal(source.model.get_submodule(path).weight, weight.t())
