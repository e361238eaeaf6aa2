"""A merge of folders writes what a merge of the loaded model writes, and holds a layer at a time."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import save_adapter
from qlora_lab.export.gguf_out import to_gguf
from qlora_lab.export.merge import TARGETS, merge
from qlora_lab.export.merge_folders import Folders, merge_folders
from qlora_lab.model.empty_model import empty_model
from qlora_lab.model.load import layer_sizes, load
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.quant.plan import DEFAULT, Candidate, Plan
from qlora_lab.train.resident import peak_resident
from tests import warm
from tests.export.test_merge import adapted, learned, saved, weights
from tests.model.families import tiny

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*are in 4 bits;"),  # a toy is mostly embedding
]


@pytest.fixture
def folder(tmp_path, tiny_llama, tokenizer):
    return saved(tmp_path, tokenizer, tiny_llama.bfloat16())


def merged_both_ways(source, tmp_path, target, options=DEFAULT, original=None, **changes):
    """The two folders and the two reports."""
    model = adapted(source, *(() if options == DEFAULT else options), **changes)
    save_adapter(model, tmp_path / "adapter")
    one = merge(model, tmp_path / "one", target, source=original or source, anyway=True, progress=False)
    folders = Folders(source, tmp_path / "adapter", original)
    return one, merge_folders(folders, tmp_path / "other", target, options, anyway=True, progress=False)


def check_same(tmp_path, one, other):
    a, b = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {path.name for path in (tmp_path / "other").iterdir()}
    for name in files - {"parity.json", "qlora-lab.sha256"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name
    assert one.layers == other.layers
    for name, value in one.figures().items():  # sums of float32 in another order: beside the weight, or in it
        assert other.figures()[name] == (value if isinstance(value, str | None) else pytest.approx(value, 1e-3, 1e-5))


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [DEFAULT, Candidate("int4", 32, False)])
def test_folders_merge_as_a_loaded_model_does(folder, tmp_path, target, options):
    check_same(tmp_path, *merged_both_ways(folder, tmp_path, target, options))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_in_4_bits_too(folder, tmp_path, target):
    copy = quantize_folder(folder, tmp_path / "copy", progress=False)
    original = folder if target == "original" else None
    check_same(tmp_path, *merged_both_ways(copy, tmp_path, target, original=original))


@pytest.mark.long
def test_a_config_describes_what_is_written_whatever_the_copy_had_there(folder, tmp_path):
    """transformers stores some settings of a load that say nothing about the tensors, and never the block size."""
    copy = quantize_folder(folder, tmp_path / "copy", "fp4", 32, False, progress=False)
    config = json.loads((copy / "config.json").read_text())
    right = config["quantization_config"]
    foreign = {"bnb_4bit_quant_storage": "bfloat16", "llm_int8_skip_modules": ["q_proj"], "llm_int8_threshold": 6.0}
    foreign |= {name: right[name] for name in right if name not in ("block_size", "llm_int8_skip_modules")}
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": foreign}))
    model, _ = load(copy, dtype=torch.float32, progress=False)
    save_adapter(learned(add_lora(model, r=2)), tmp_path / "adapter")
    merge(model, tmp_path / "one", "requantised", anyway=True, progress=False)
    _merge(copy, tmp_path, tmp_path / "other", DEFAULT, target="requantised")
    for out in ("one", "other"):
        assert json.loads((tmp_path / out / "config.json").read_text())["quantization_config"] == right


@pytest.mark.slow
def test_a_plan_is_kept(folder, tmp_path):
    sizes = layer_sizes(empty_model(folder, torch.float32))
    chosen = {path: Candidate("nf4", 32, True) if "mlp" in path else Candidate("int8", 64, False) for path in sizes}
    copy = quantize_folder(folder, tmp_path / "copy", plan=Plan("toy", chosen, 0.1, 6.0, sizes), progress=False)
    check_same(tmp_path, *merged_both_ways(copy, tmp_path, "requantised"))
    for name in ("plan.json", "config.json"):
        described = [json.loads((at / name).read_text()) for at in (tmp_path / "one", copy)]
        described = [one.get("quantization_config", one) for one in described]
        assert described[0] == described[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_too(tmp_path, tokenizer, family):
    source = saved(tmp_path, tokenizer, tiny(family, vocab_size=280, max_position_embeddings=128))
    check_same(tmp_path, *merged_both_ways(source, tmp_path, "dequantised", scale=0.01))


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_a_tied_head_that_learned(tmp_path, tokenizer, target):
    source = saved(tmp_path, tokenizer, tiny("Llama", torch.bfloat16, vocab_size=280, tie_word_embeddings=True))
    check_same(tmp_path, *merged_both_ways(source, tmp_path, target, targets=["q_proj", "lm_head"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lm_head.weight and .* are tied by config.json, but differ")
@pytest.mark.parametrize("target", TARGETS)
def test_a_head_of_its_own_in_a_tied_model_is_kept(tmp_path, tokenizer, target):
    source = saved(tmp_path, tokenizer, tiny("Llama", torch.bfloat16, vocab_size=280, tie_word_embeddings=True))
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors", {"format": "pt"})
    check_same(tmp_path, *merged_both_ways(source, tmp_path, target))
    assert torch.equal(weights(tmp_path / "one")["lm_head.weight"], head)
    copy = quantize_folder(source, tmp_path / "copy", progress=False)
    assert torch.equal(weights(copy)["lm_head.weight"], head)
    for folder in (tmp_path / "one", copy):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.long
def test_another_base_is_told_as_by_load_adapter(folder, tmp_path):
    save_adapter(adapted(folder), tmp_path / "adapter")
    copy = quantize_folder(folder, tmp_path / "model-copy", "fp4", progress=False)
    with pytest.warns(UserWarning, match="beside weights in nf4, block size 64, but here they are in int4"):
        _merge(folder, tmp_path, tmp_path / "a", Candidate("int4", 64, True))
    with pytest.warns(UserWarning, match="in nf4, block size 64, but here they are in fp4|was trained on"):
        _merge(copy, tmp_path, tmp_path / "b", DEFAULT)


def _merge(folder, tmp_path, out, options, **choices):
    folders = Folders(folder, tmp_path / "adapter")
    merge_folders(folders, out, options=options, anyway=True, progress=False, **choices)


def test_errors_teach(folder, tmp_path):
    save_adapter(adapted(folder), tmp_path / "adapter")
    copy = quantize_folder(folder, tmp_path / "copy", progress=False)
    with pytest.raises(ValueError, match=r"copy is quantised as \('nf4', 64, True\), not as \('nf4', 32, True\)"):
        _merge(copy, tmp_path, tmp_path / "out", Candidate("nf4", 32, True))
    with pytest.raises(ValueError, match="copy is in 4 bits, as .*: name the original"):
        _merge(copy, tmp_path, tmp_path / "out", DEFAULT, target="original")
    with pytest.raises(ValueError, match="'nf9' is not known"):
        _merge(copy, tmp_path, tmp_path / "out", Candidate("nf9", 64, True))
    with pytest.raises(FileExistsError, match="model is not empty"):
        _merge(folder, tmp_path, folder, DEFAULT)
    with pytest.raises(FileExistsError, match="adapter is not empty"):
        _merge(folder, tmp_path, tmp_path / "adapter", DEFAULT)
    assert not (tmp_path / "out").exists()


def test_a_result_among_its_inputs_is_refused(folder, tmp_path):
    """Before a lock or a scratch folder is made there; a link is followed."""
    model = adapted(folder)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    for inside in (folder / "merged", tmp_path / "link" / "deep" / "merged", tmp_path / "adapter" / "merged"):
        with pytest.raises(ValueError, match="merged lies inside .*, which is an input: choose a place outside of it"):
            _merge(folder, tmp_path, inside, DEFAULT)
    with pytest.raises(ValueError, match="merged lies inside .*model, which is an input"):
        merge(model, folder / "merged", progress=False)
    with pytest.raises(ValueError, match="copy lies inside .*model, which is an input"):
        quantize_folder(folder, folder / "copy", progress=False)
    with pytest.raises(ValueError, match="a.gguf lies inside .*model, which is an input"):
        to_gguf(folder, folder / "a.gguf", progress=False)
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------------------------------- memory

MIB = 2**20
CHILD = """
import json, sys
import torch
from qlora_lab.export import parity
from qlora_lab.export.merge_folders import Folders, merge_folders
from qlora_lab.model.empty_model import empty_model
from qlora_lab.model.load import layer_sizes, load
from qlora_lab.train.resident import peak_resident, reset_peak, resident
from qlora_lab.model import quantized_folder

torch.set_num_threads(1)
parity.LENGTH = 4  # tokens of a prompt: what they take is no weight
quantized_folder.PIECE = 4 * 2**20
toy, model, adapters, out = sys.argv[1:]
def merged(folder, name):
    merge_folders(Folders(folder, f"{adapters}/{name}"), f"{out}/{name}", anyway=True, progress=False)
merged(toy, "toy")  # imports and compiles
before = resident()
reset_peak()
merged(model, "model")
print(json.dumps(peak_resident() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(peak_resident() is None, reason="Linux alone tells")
def test_memory_is_that_of_a_few_layers(tmp_path, tokenizer):
    """24 layers of 3 MiB in float32, and 2 MiB at most in a file: far below the model's 36 MiB in bf16."""
    for name, layers in (("toy", 1), ("model", 24)):
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers, "vocab_size": 280}
        source = saved(tmp_path / name, tokenizer, tiny("Llama", torch.bfloat16, **sizes | {"num_attention_heads": 4}))
        save_adapter(learned(adapted(source)), tmp_path / "adapters" / name)
    folders = [tmp_path / name for name in ("toy/model", "model/model", "adapters", "out")]
    done = warm.run([sys.executable, "-c", warm.GIVE_BACK + CHILD, *folders], check=True)
    whole = sum(path.stat().st_size for path in (tmp_path / "model/model").glob("*.safetensors"))
    peak = json.loads(done.stdout)
    assert peak < 0.7 * whole < 40 * MIB, f"{peak / MIB:.1f} MiB for a model of {whole / MIB:.1f} MiB"
