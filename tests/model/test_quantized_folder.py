"""A model that is quantised on disk: the same bits as one that is quantised on arrival, made once and whole."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qlora_lab.adapters.lora import add_lora
from qlora_lab.files import tensor_file
from qlora_lab.files.checksums import SUMS, read_sums
from qlora_lab.model import quantized_folder
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.load import load
from qlora_lab.model.model_files import TOKENIZER_FILES
from qlora_lab.model.quantized_folder import files_beside, quantize_folder, read_by
from qlora_lab.quant.serialize import BITSANDBYTES_SMALLEST

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def folder(tmp_path, tiny_llama, tokenizer):
    tiny_llama.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(quantized_folder, "PIECE", 4096)


def quantise(folder, out, *options):
    return quantize_folder(folder, out, *options, progress=False)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("options", [(), ("fp4", 128, False), ("int4", 64, True)])
def test_it_loads_as_what_is_quantised_on_arrival(folder, tmp_path, options):
    quantise(folder, tmp_path / "small", *options)
    mapped, tokenizer = load(tmp_path / "small", dtype=torch.float32, progress=False)
    arrived, _ = load(folder, *options, dtype=torch.float32, progress=False)
    a, b = ({n: m.weight for n, m in model.named_modules() if isinstance(m, Linear4bit)} for model in (mapped, arrived))
    assert a.keys() == b.keys() and len(a) == 14
    assert all(torch.equal(a[n].packed, b[n].packed) and torch.equal(a[n].absmax, b[n].absmax) for n in a)
    assert torch.equal(mapped(IDS).logits, arrived(IDS).logits)
    assert tokenizer("4")["input_ids"] and not list((tmp_path / "small").glob(".*"))


def test_weights_are_as_readable_as_the_other_files(folder, tmp_path):
    assert len({file.stat().st_mode for file in quantise(folder, tmp_path / "small").iterdir()}) == 1


def test_a_mapped_model_trains(folder, tmp_path):
    model, _ = load(quantise(folder, tmp_path / "small"), dtype=torch.float32, progress=False)
    add_lora(model, r=2)(input_ids=IDS, labels=IDS).loss.backward()
    before = contents(tmp_path / "small")
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert contents(tmp_path / "small") == before


@pytest.mark.long
def test_transformers_with_bitsandbytes_reads_it(tmp_path, tokenizer):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    # rows of whole blocks: for others bitsandbytes 0.50.2 decodes wrong weights on the CPU
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=280, **shape)).bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    quantise(tmp_path / "model", tmp_path / "small")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ours, _ = load(tmp_path / "small", dtype=torch.float32, progress=False)
    layer, twin = (model.model.layers[1].mlp.down_proj for model in (theirs, ours))
    assert type(layer).__name__ == "Linear4bit"
    assert torch.equal(layer.weight.data.view(-1), twin.weight.packed)
    a, b = theirs(IDS).logits.float(), ours(IDS).logits
    assert (a - b).norm() < 0.02 * b.norm()  # theirs computes in bf16, whose step is 0.008
    assert read_by(tmp_path / "small") == "QLoRA Lab, and transformers with bitsandbytes"


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("int4", 16), "bitsandbytes knows nf4 and fp4, but not int4"),
        (("nf4", 16), "bitsandbytes reads blocks of at least 32 weights, not of 16"),
        (
            ("fp4", 32),
            "blocks of 32 weights cross rows of 16 (model.layers.0.self_attn.q_proj), which bitsandbytes mis",
        ),
    ],
)
def test_a_folder_that_bitsandbytes_cannot_read_says_so(folder, tmp_path, logged, options, reason):
    """In config.json, where transformers sees it: it says that it does not know qlora_lab, and the shapes stop it."""
    from transformers import AutoModelForCausalLM

    small = quantise(folder, tmp_path / "small", *options)
    described = json.loads((small / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "qlora_lab" and described["not_for_bitsandbytes"].startswith(reason)
    assert read_by(small) == f"QLoRA Lab alone: {described['not_for_bitsandbytes']}"
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(small)
    assert "Unknown quantization type, got qlora_lab" in "".join(logged)
    model, _ = load(small, progress=False)
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["load_in_4bit"] = True  # as in folders of earlier versions
    (small / "config.json").write_text(json.dumps(config))
    again, _ = load(small, progress=False)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_bitsandbytes_has_no_kernel_for_blocks_of_16():
    """Shapes alone are checked, as before a launch on a GPU."""
    import bitsandbytes  # noqa: F401  (registers its operations)

    for size in (16, BITSANDBYTES_SMALLEST):
        packed = torch.empty(64 * 64 // 2, 1, dtype=torch.uint8, device="meta")
        absmax = torch.empty(64 * 64 // size, device="meta")
        given = (packed, absmax, size, "nf4", (64, 64), torch.bfloat16)
        if size == 16:
            with pytest.raises(RuntimeError, match="invalid blocksize 16"):
                torch.ops.bitsandbytes.dequantize_4bit(*given)
        else:
            assert torch.ops.bitsandbytes.dequantize_4bit(*given).shape == (64, 64)


@pytest.mark.long
def test_an_interrupted_one_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    whole = contents(quantise(folder, tmp_path / "whole"))
    save, saved = tensor_file.save_file, []

    def interrupted(tensors, path, **kwargs):
        saved.append(path)
        save(tensors, path, **kwargs)
        if len(saved) == 3:
            path.write_bytes(path.read_bytes()[:50])
            raise KeyboardInterrupt  # a signal may land in a callback of the garbage collector, and be lost

    monkeypatch.setattr(tensor_file, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantise(folder, tmp_path / "parts")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.safetensors")}
    assert len(kept) == 2
    with pytest.raises(FileNotFoundError, match="has no config.json"):  # it is no model yet
        load(tmp_path / "parts", progress=False)
    with pytest.raises(ValueError, match="parts was begun with another block_size: repeat that call"):
        quantise(folder, tmp_path / "parts", "nf4", 128)
    quantise(folder, tmp_path / "parts")
    assert contents(tmp_path / "parts") == whole
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert len(saved) - 3 == len(list((tmp_path / "parts").glob("*.safetensors"))) - 2


def test_what_a_killed_call_left_behind_is_removed(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(quantized_folder, "_finish", lambda *_: None)
        quantise(folder, tmp_path / "small")
    scratch = json.loads((tmp_path / "small" / "qlora-lab.json").read_text())["scratch"]
    for name in (f"{scratch}/.model-00003-of-00009.safetensors-hkw3_x12", ".plan-personal", ".config.json-q1w2e3r4"):
        (tmp_path / "small" / name).mkdir(parents=True)
        (tmp_path / "small" / name / "half").write_text("")
    quantise(folder, tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names >= {".plan-personal", ".config.json-q1w2e3r4"} and not names & {scratch, "qlora-lab.json"}


@pytest.mark.long
def test_one_that_was_killed_before_its_first_piece_is_begun_again(folder, tmp_path, monkeypatch):
    for moment in ("replacing_file", "_pieces"):  # the mark is there alone; then nothing was
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(quantized_folder, moment, lambda *_: 1 / 0)
            quantise(folder, tmp_path / "small")
    quantise(folder, tmp_path / "whole")
    assert contents(quantise(folder, tmp_path / "small")) == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["quantizing.json", "qlora-lab.json"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", "no JSON", '{"application": "qlora_lab run", "scratch": ".plan-a8s0d9f2"}']
)
def test_a_users_file_under_a_name_of_ours_is_refused(folder, tmp_path, name, text):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(text)
    if name == "qlora-lab.json" and text in ("", "{"):  # what a kill leaves of a mark: nothing of a user's is in it
        quantise(folder, tmp_path / "mine")
        return
    with pytest.raises(FileExistsError, match="choose another folder"):
        quantise(folder, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {name: text.encode()}


def test_pieces_hold_every_tensor_once(folder, tmp_path):
    quantise(folder, tmp_path / "small")
    weight_map = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    stored = [key for file in files for key in load_file(file)]
    assert sorted(stored) == sorted(weight_map) and len(files) > 3


def test_errors_teach(folder, tmp_path):
    quantise(folder, tmp_path / "small")
    with pytest.raises(FileExistsError, match="small holds a model already: choose another folder"):
        quantise(folder, tmp_path / "small")
    with pytest.raises(ValueError, match=r"small is quantised as \('nf4', 64, True\), not as \('fp4', 64, True\)"):
        load(tmp_path / "small", "fp4", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".model-notes").mkdir()
    with pytest.raises(FileExistsError, match="mine is not empty: choose another folder"):
        quantise(folder, tmp_path / "mine")
    assert (tmp_path / "mine" / ".model-notes").is_dir()
    with pytest.raises(ValueError, match="codebook 'nf5' is not known"):
        quantise(folder, tmp_path / "other", "nf5")


def test_a_model_without_linear_layers_is_refused(folder, tmp_path, monkeypatch):
    """It would come back as it was, or a folder would be written that cannot be loaded."""
    monkeypatch.setattr("qlora_lab.model.quantised.linears_to_quantise", lambda *_: {})  # every family here has some
    advice = r"load it with codebook=None \(on the command line: --codebook none\)"
    for use in (lambda: quantise(folder, tmp_path / "small"), lambda: load(folder, progress=False)):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM has no linear layer to quantise .*{advice}"):
            use()
    assert not (tmp_path / "small").exists()


def test_a_piece_that_lost_a_constant_is_named(folder, tmp_path):
    from safetensors.torch import save_file

    out = quantise(folder, tmp_path / "small")
    file, lost = next((f, k) for f in out.glob("*.safetensors") for k in load_file(f) if k.endswith(".nested_absmax"))
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=f"{lost} is missing: the checkpoint is incomplete"):
        load(out, progress=False)


# --------------------------------------------------------------------------------------------------- what comes along

PAIRS = {"<unk>": 0, "a": 1, "b": 2, "a</w>": 3, "ab": 4, "ab</w>": 5, "<|endoftext|>": 6}
VOCABULARIES = {
    "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##a",
    "vocab.json": json.dumps(PAIRS),
    "merges.txt": "#version: 0.2\na b\n",
}
TEMPLATES = {"default": "{{ messages[0]['content'] }}", "tools": "{{ tools }}"}


@pytest.mark.parametrize("name", ["GPT2", "CTRL", "Bert", "BertJapanese", "Esm", "CLIP", "Electra", "ByT5", "T5"])
def test_every_file_of_a_tokenizer_comes_along(tmp_path, name):
    """And with it each of several chat templates, which are files of a folder of their own."""
    for file, text in VOCABULARIES.items():
        (tmp_path / file).write_text(text)
    tokenizer = getattr(transformers, f"{name}Tokenizer").from_pretrained(tmp_path)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(tmp_path / "saved")
    files = {path.relative_to(tmp_path / "saved").as_posix() for path in (tmp_path / "saved").rglob("*.*")}
    assert "additional_chat_templates/tools.jinja" in files and set(files_beside(tmp_path / "saved")) == files


def test_every_name_that_transformers_gives_to_a_vocabulary_is_known():
    names = set()
    for file in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for block in re.findall(r"^VOCAB_FILES_NAMES = \{(.*?)\}", file.read_text("utf-8"), re.DOTALL | re.MULTILINE):
            names |= set(re.findall(r': *"([^"]+)"', block))
    mistral = Path(transformers.__file__).parent / "tokenization_mistral_common.py"  # copies its file, and has no list
    names |= set(re.findall(r"`(tekken\.json)`", mistral.read_text("utf-8")))
    assert len(names) > 20 and "tekken.json" in names and names <= set(TOKENIZER_FILES)


def test_a_copy_has_all_chat_templates(folder, tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    out = quantise(folder, tmp_path / "small")
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES
    assert "additional_chat_templates/tools.jinja" in read_sums(out / SUMS)
