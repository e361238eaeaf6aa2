"""What files hold under other names, in other pieces, once or twice: transformers' from_pretrained is the truth."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_lab.model import stored as stored_file
from qlora_lab.model.experts import stacks_of
from qlora_lab.model.fetch import ModelError
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.model.load import load
from qlora_lab.model.quantised import put, quantised
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.quant.plan import Candidate
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import to_tensors
from tools.families import FAMILIES, IDS, logits, ours, quiet, save, theirs


@pytest.fixture
def saved(tmp_path):
    def make(name, **options):
        family = next(family for family in FAMILIES if family.name == name)
        with quiet():
            save(type(family)(name, family.config, family.options | options), tmp_path / "model")
        return tmp_path / "model"

    return make


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(folder, **options):
    with quiet():
        want = theirs(folder)
    torch.testing.assert_close(logits(ours(folder, codebook=None)), logits(want), rtol=0, atol=1e-5)
    return want


TIED = [
    ("Llama", "lm_head.weight", "model.embed_tokens.weight"),
    ("BioGPT", "output_projection.weight", "biogpt.embed_tokens.weight"),
    ("RWKV", "head.weight", "rwkv.embeddings.weight"),
]


@pytest.mark.long
@pytest.mark.parametrize("family, head, embedding", TIED)
def test_a_tied_weight_is_stored_under_either_name(saved, tmp_path, family, head, embedding):
    folder = saved(family, tie_word_embeddings=True)
    want = logits(ours(folder, codebook=None))
    rewrite(folder, lambda tensors: tensors.update({head: tensors.pop(embedding)}))
    assert_same(folder)
    model = ours(folder, codebook=None)
    assert torch.equal(logits(model), want)
    assert model.get_parameter(head) is model.get_parameter(embedding)
    if family != "RWKV":  # its share in 4 bits is small, which is another test's
        quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
        assert torch.equal(logits(ours(tmp_path / "small")), logits(ours(folder, block_size=16)))


@pytest.mark.long
@pytest.mark.parametrize("family, head, embedding", TIED[:2])
def test_tied_weights_that_differ_are_two(saved, tmp_path, family, head, embedding):
    folder = saved(family, tie_word_embeddings=True)
    other = 2 * load_file(folder / "model.safetensors")[embedding]
    rewrite(folder, lambda tensors: tensors.update({head: other}))
    with pytest.warns(UserWarning, match=f"^{head} and {embedding} are tied by config.json, but differ") as warned:
        want = assert_same(folder)
    assert torch.equal(want.get_parameter(head), other) and len(warned) == 1
    with pytest.warns(UserWarning, match="but differ in the files"):
        quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
    mapped = ours(tmp_path / "small")  # whose config.json says that they are two
    assert torch.equal(mapped.get_parameter(head), other)


SLOW = "Gemma 3, text", "DeepSeek-V3", "Mamba"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* of the weights outside embeddings and head")
@pytest.mark.parametrize(
    "family",
    ["GPT-J", "BioGPT", "Mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_quantised_on_arrival_after_loading_and_on_disk_are_the_same(saved, tmp_path, family):
    folder = saved(family)
    with quiet():
        plain = quantize_linears(theirs(folder), block_size=16)
        for path, stack in stacks_of(plain).items():  # experts, if it has some
            put(plain, path, quantised(plain, path, stack, Candidate("nf4", 16, True)))
        want = logits(plain)
    quantize_folder(folder, tmp_path / "small", "nf4", 16, progress=False)
    for model in (ours(folder, block_size=16), ours(tmp_path / "small")):
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["GPT-J", "DeepSeek-V3", "Gemma"])
def test_in_bf16_each_tensor_has_the_dtype_that_transformers_gives_it(saved, family):
    folder = saved(family)
    with quiet():
        want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found, _ = load(folder, codebook=None, dtype=torch.bfloat16, device="cpu", progress=False)
    for name, tensor in (*want.state_dict().items(), *want.named_buffers()):
        other = found.state_dict().get(name, dict(found.named_buffers()).get(name))
        assert other.dtype == tensor.dtype and torch.equal(other, tensor), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_what_is_stored_as_no_weights_is_named(saved, tmp_path, name, dtype):
    folder = saved("Llama")
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    for read in (ours, lambda folder: quantize_folder(folder, tmp_path / "other", progress=False)):
        with pytest.raises(ModelError, match=rf"{name} is {dtype}, but weights are float32, bfloat16 or float16: "):
            read(folder)


@pytest.mark.long
def test_float64_is_read_as_transformers_reads_it(saved, tmp_path):
    folder = saved("Llama")
    rewrite(folder, lambda tensors: tensors.update({name: 1.1 * tensor.double() for name, tensor in tensors.items()}))
    assert_same(folder)
    quantize_folder(folder, tmp_path / "small", progress=False)
    assert torch.equal(logits(ours(tmp_path / "small")), logits(ours(folder)))


def test_a_saved_buffer_is_read_and_not_computed(saved):
    folder = saved("DeepSeek-V3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(folder, lambda tensors: tensors[name].copy_(torch.arange(4.0)))
    assert torch.equal(assert_same(folder).get_buffer(name), torch.arange(4.0))


def test_names_without_the_prefix_are_found(saved):
    """The hub's gpt2 has `h.0.attn.bias`, without "transformer." and with a mask that is no weight."""
    folder = saved("GPT-2")

    def as_on_the_hub(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)

    rewrite(folder, as_on_the_hub)
    assert_same(folder)


@pytest.mark.long
def test_experts_are_put_together_in_the_order_of_their_numbers(saved):
    folder = saved("Mixtral", num_local_experts=12, num_experts=12)
    assert (
        len([name for name in load_file(folder / "model.safetensors") if "layers.0" in name and ".w1." in name]) == 12
    )
    assert_same(folder)


def without(fragment):
    def change(tensors):
        for name in [name for name in tensors if fragment in name]:
            del tensors[name]

    return change


def test_reading_all_experts_opens_no_file_for_each_of_them(saved, monkeypatch):
    """A file's header names all its tensors: to read it once for each of 6,000 experts took 160 s."""
    folder = saved("Mixtral", num_local_experts=40, num_experts=40)
    opening = []
    make = stored_file.safe_open
    monkeypatch.setattr(stored_file, "safe_open", lambda *args, **kwargs: opening.append(1) or make(*args, **kwargs))
    model = ours(folder, codebook=None)
    made_or_read = 2 * len(model.state_dict())  # there are 3 x 40 experts in each layer
    assert len(opening) <= made_or_read


@pytest.mark.parametrize(
    "fragment, message",
    [
        ("layers.0.block_sparse_moe.experts.3.", r"experts.gate_up_proj has shape \(3, 128, 32\), but .*\(4, 128, 32"),
        ("experts.3.w1.", "experts.0.w1.weight and 6 more cannot be put together as transformers does it"),
        (".experts.", r"^model.layers.0.mlp.experts.down_proj and 3 more: missing from"),
    ],
)
def test_lost_experts_are_named_in_one_line(saved, fragment, message):
    folder = saved("Mixtral")
    rewrite(folder, without(fragment))
    with pytest.raises(ModelError, match=message) as error:
        ours(folder, codebook=None)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_tensor_under_an_old_and_a_new_name_is_refused(saved):
    folder = saved("GPT-2")
    name = "transformer.wte.weight"
    rewrite(folder, lambda tensors: tensors.update({"wte.weight": tensors[name] + 1}))
    with pytest.raises(ModelError, match=re.escape(f"wte.weight and {name} are both {name}: keep one")):
        ours(folder, codebook=None)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* of the weights outside embeddings and head")
@pytest.mark.parametrize("family", ["Llama", "BioGPT", "CodeGen", "Llama 4, text", "Mamba", "RWKV"])
def test_bitsandbytes_is_told_which_layers_are_not_packed(saved, tmp_path, family):
    from transformers.quantizers.quantizers_utils import should_convert_module

    folder = quantize_folder(saved(family), tmp_path / "small", progress=False)
    kept = json.loads((folder / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    with quiet():
        linear = {path for path, m in theirs(tmp_path / "model").named_modules() if type(m) is torch.nn.Linear}
    packed = {path for path, module in ours(folder).named_modules() if isinstance(module, Linear4bit)}
    assert {path for path in linear if should_convert_module(path, kept)} == packed


def pack(folder, name):
    """Also this layer of a folder in 4 bits, as bitsandbytes does it."""
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    packed = quantize(tensors.pop(f"{name}.weight"), double_quant=True)
    tensors |= {key: tensor.clone() for key, tensor in to_tensors(packed, f"{name}.weight").items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return packed


@pytest.mark.filterwarnings("ignore:.* of the weights outside embeddings and head")
def test_a_packed_weight_that_the_family_uses_itself_is_decoded(saved, tmp_path):
    folder = quantize_folder(saved("RWKV"), tmp_path / "small", progress=False)
    packed = pack(folder, "rwkv.blocks.0.attention.output")
    model = ours(folder)
    assert torch.equal(model.get_parameter("rwkv.blocks.0.attention.output.weight"), dequantize(packed))
    assert logits(model).isfinite().all()


def test_a_packed_head_stays_packed(saved, tmp_path):
    folder = quantize_folder(saved("Llama"), tmp_path / "small", progress=False)
    packed = pack(folder, "lm_head")
    model = ours(folder)
    hidden = model.model(IDS).last_hidden_state
    assert isinstance(model.lm_head, Linear4bit)
    torch.testing.assert_close(logits(model), hidden @ dequantize(packed).t(), rtol=1e-5, atol=1e-5)
