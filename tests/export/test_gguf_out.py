"""A GGUF file is the same model: read back by gguf_in, by transformers, and tokenised by its named rule."""

import json
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.cli import gguf as command
from qlora_lab.export import gguf_out
from qlora_lab.export.gguf_out import FORMATS, to_gguf
from qlora_lab.export.gguf_vocabulary import REST, RULES, WORDS, _other_ends
from qlora_lab.export.layerwise import as_float, reader
from qlora_lab.model.empty_model import empty_model
from qlora_lab.model.gguf_in import convert
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.train.resident import peak_resident
from tests import warm
from tests.faults import disk_faults
from tests.model.families import tiny
from tests.model.test_gguf_in import rotary_pairs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*are in 4 bits;"),
]
IDS = torch.arange(3, 40)[None]
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"max_position_embeddings": 128, "vocab_size": 280}


def saved(tmp_path, tokenizer, family="Llama", dtype=torch.bfloat16, **changes):
    """A model folder whose tokenizer splits digits as SmolLM2's does."""
    model = tiny(family, dtype, **SHAPE | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # they start as zeros
    model.save_pretrained(tmp_path / "model")
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def original(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def rounded(folder, kind, outer):
    """The model of `folder` with its matrices as gguf's own functions round them."""
    model = original(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                chosen = outer if name in ("model.embed_tokens.weight", "lm_head.weight") else kind
                parameter.copy_(torch.tensor(gguf.dequantize(gguf.quantize(parameter.numpy(), chosen), chosen)))
    return model


def metadata(file):
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.long
@pytest.mark.parametrize("format", FORMATS)
def test_gguf_in_reads_it_back(tmp_path, tokenizer, format):
    folder = saved(tmp_path, tokenizer)
    written = to_gguf(folder, tmp_path / "a.gguf", format, progress=False)
    kind = FORMATS[format][0]
    outer = gguf.GGMLQuantizationType.Q8_0 if format.startswith("q4") else kind
    convert(tmp_path / "a.gguf", tmp_path / "again", progress=False)
    expected = rounded(folder, kind, outer)
    errors = sizes = 0.0
    for weight, before in zip(expected.parameters(), original(folder).parameters(), strict=True):
        errors += (weight - before).double().square().sum().item()
        sizes += before.double().square().sum().item()
        weight.data = weight.data.bfloat16().float()  # as gguf_in stores them
    assert torch.equal(logits(original(tmp_path / "again")), logits(expected))
    assert written.relative_error == pytest.approx((errors / sizes) ** 0.5, rel=1e-5)  # sums of float32
    assert written.bytes == (tmp_path / "a.gguf").stat().st_size
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    text = "<|im_start|>user\nthe sum of 12 two  numbers 2019, l'été\n\n<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.chat_template == tokenizer.chat_template
    assert [path.name for path in tmp_path.glob(".*")] == []


@pytest.mark.long
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_each_family(tmp_path, tokenizer, family, tied):
    folder = saved(tmp_path, tokenizer, family, tie_word_embeddings=tied, **_full(family))
    to_gguf(folder, tmp_path / "a.gguf", "f16", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    expected = original(folder)
    for name, weight in expected.state_dict().items():  # bf16 is exact in float16 above 2^-16
        torch.testing.assert_close(theirs.state_dict()[name], weight, rtol=0, atol=2**-25)
    torch.testing.assert_close(logits(theirs), logits(expected), rtol=1e-4, atol=1e-4)


def _full(family):
    # transformers ignores the width of Qwen3's heads in a GGUF, and takes its default
    return {"Mistral": {"sliding_window": None}, "Qwen3": {"head_dim": 128}}.get(family, {})


@pytest.mark.long
def test_rows_of_q_and_k_are_turned_for_llama_alone(tmp_path, tokenizer):
    for family, turned in (("Llama", True), ("Qwen3", False)):
        folder = saved(tmp_path / family, tokenizer, family)
        to_gguf(folder, tmp_path / f"{family}.gguf", "f16", progress=False)
        tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / f"{family}.gguf").tensors}
        weights = original(folder).state_dict()
        for part, heads in (("q", 4), ("k", 2)):
            weight = weights[f"model.layers.1.self_attn.{part}_proj.weight"].numpy()
            expected = rotary_pairs(weight, heads) if turned else weight
            assert np.array_equal(tensors[f"blk.1.attn_{part}.weight"], expected.astype(np.float16))


def test_a_wrong_order_of_rows_is_found_when_it_is_read_back(tmp_path, tokenizer, monkeypatch):
    folder = saved(tmp_path, tokenizer)
    monkeypatch.setattr(gguf_out, "halves_to_neighbours", lambda weight, heads: weight)
    with pytest.raises(ValueError, match=r"q_proj.weight comes back from Q4_0 with an error of 1\d\d"):
        to_gguf(folder, tmp_path / "a.gguf", "q4_0", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_llama_3_divides_its_frequencies(tmp_path, tokenizer):
    """By 1 for short waves, by `factor` for long ones (transformers' _compute_llama3_parameters)."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = saved(tmp_path, tokenizer, rope_parameters=rope)
    to_gguf(folder, tmp_path / "a.gguf", "f16", progress=False)
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors if t.name == "rope_freqs.weight")
    waves = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)  # in positions; 64 / 4 and 64 / 1 are the borders
    np.testing.assert_allclose(factors[waves < 16], 1, rtol=1e-6)
    np.testing.assert_allclose(factors[waves > 64], 8, rtol=1e-6)
    between = factors[(waves >= 16) & (waves <= 64)]
    assert len(between) and np.all((between > 1) & (between < 8))


# ----------------------------------------------------------------------------------------------------------- vocabulary

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def changed(folder, change):
    """Save the tokenizer of `folder` after `change`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))


def set_rule(rule, whole=False, normalizer=None):
    def change(tokenizer):
        tokenizer.pre_tokenizer = rule
        tokenizer.model.ignore_merges = whole
        if normalizer:
            tokenizer.normalizer = normalizer

    return change


KNOWN = {
    "gpt-2": set_rule(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": set_rule(split(WORDS + r"\p{N}{1,3}" + REST), whole=True),
    "qwen2": set_rule(split(WORDS + r"\p{N}" + REST), normalizer=normalizers.NFC()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_rules_are_named(tmp_path, tokenizer, name):
    folder = saved(tmp_path, tokenizer)
    changed(folder, KNOWN[name])
    to_gguf(folder, tmp_path / "a.gguf", progress=False)
    assert metadata(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == name
    assert KNOWN.keys() | {"smollm"} == RULES.keys()


@pytest.mark.parametrize(
    "change, message",
    [
        (set_rule(pre_tokenizers.Whitespace()), r"splits texts by .*Whitespace.*llama.cpp has no such rule"),
        (set_rule(pre_tokenizers.ByteLevel(add_prefix_space=True)), "splits texts by"),
        (set_rule(split(WORDS + r"\p{N}{1,3}" + REST), whole=False), 'splits texts by .*"ignore_merges": false'),
        (set_rule(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.NFKC()), "NFKC"),
        (lambda tokenizer: setattr(tokenizer.model, "byte_fallback", True), r"tokenizer \(SentencePiece\)"),
        (lambda tokenizer: setattr(tokenizer.model, "dropout", 0.1), "has dropout=0.1"),
        (
            lambda tokenizer: setattr(
                tokenizer, "post_processor", processors.TemplateProcessing("a $A", special_tokens=[("a", 5)])
            ),
            "of the text 'a'",
        ),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path, tokenizer, change, message):
    folder = saved(tmp_path, tokenizer)
    changed(folder, change)
    with pytest.raises(ValueError, match=message):
        to_gguf(folder, tmp_path / "a.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_vocabulary_holds(tmp_path, tokenizer):
    """Rows without a token, kinds of tokens, and a token that the tokenizer puts before each text."""
    folder = saved(tmp_path, tokenizer, vocab_size=288)
    start = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    changed(folder, lambda tokenizer: setattr(tokenizer, "post_processor", start))
    changed(folder, lambda tokenizer: tokenizer.add_tokens(["<tool>"]))
    to_gguf(folder, tmp_path / "a.gguf", progress=False)
    found = metadata(tmp_path / "a.gguf")
    assert found["tokenizer.ggml.tokens"][279:283] == [
        tokenizer.convert_ids_to_tokens(279),
        "<tool>",
        "[PAD281]",
        "[PAD282]",
    ]
    assert found["tokenizer.ggml.token_type"][278:282] == [1, 1, 4, 5]
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.bos_token_id"] == 1 and found["tokenizer.ggml.eos_token_id"] == 2
    assert found["general.file_type"] == 7 and found["llama.rope.dimension_count"] == 16


def test_a_token_that_tokenizer_config_makes_special_is_one(tmp_path, tokenizer):
    """Two that tokenizer.json does not call special: one of its vocabulary, and one that was added."""
    folder = saved(tmp_path, tokenizer, vocab_size=288)
    changed(folder, lambda tokenizer: tokenizer.add_tokens(["<tool>"]))
    word = tokenizer.convert_ids_to_tokens(279)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": word, "eos_token": "<tool>"}))
    to_gguf(folder, tmp_path / "a.gguf", progress=False)
    found = metadata(tmp_path / "a.gguf")
    assert found["tokenizer.ggml.token_type"][278:282] == [1, 3, 3, 5]
    assert (found["tokenizer.ggml.padding_token_id"], found["tokenizer.ggml.eos_token_id"]) == (279, 280)


@pytest.mark.parametrize("ends, others", [(2, []), ([7, 2], [7]), ([7, 2, 9], [7, 9]), ([2, 2], [])])
def test_every_end_of_an_answer_is_there(tmp_path, tokenizer, ends, others):
    folder = saved(tmp_path, tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    to_gguf(folder, tmp_path / "a.gguf", progress=False)
    found = metadata(tmp_path / "a.gguf")
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [found[name] for name in names if name in found] == [2, *others]
    assert found["general.name"] == "model"


def test_a_name_is_that_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "deep")
    for path, name in ((".", "deep"), ("..", "model"), ("../", "model"), ("smollm2-135m",) * 2, ("org/name", "name")):
        assert gguf_out._title(path) == name


def test_more_ends_than_gguf_holds_are_refused(tmp_path, tokenizer):
    folder = saved(tmp_path, tokenizer)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7, 9, 11]}')
    with pytest.raises(ValueError, match="at the tokens 2, 7, 9, 11, but GGUF holds two besides the tokenizer's own"):
        to_gguf(folder, tmp_path / "a.gguf", progress=False)
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7, 9]))
    with pytest.raises(ValueError, match="at the tokens 2, 7, 9, but"):
        _other_ends(None, model)


@pytest.mark.slow
def test_a_folder_in_4_bits_is_decoded(tmp_path, tokenizer):
    folder = saved(tmp_path, tokenizer)
    copy = quantize_folder(folder, tmp_path / "copy", progress=False)
    to_gguf(copy, tmp_path / "a.gguf", "f16", progress=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    read = reader(empty_model(copy, torch.float32), copy)
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(weight, as_float(read(name)), rtol=2**-11, atol=2**-25)  # rounded to float16


@pytest.mark.slow
def test_pieces_change_nothing(tmp_path, tokenizer, monkeypatch):
    folder = saved(tmp_path, tokenizer)
    for size in (2**20, 100):  # rows of 64: all of them, or one and a head of 16
        monkeypatch.setattr(gguf_out, "PIECE", size)
        to_gguf(folder, tmp_path / f"{size}.gguf", "q4_0", progress=False)
    assert (tmp_path / "100.gguf").read_bytes() == (tmp_path / f"{2**20}.gguf").read_bytes()


MIB = 2**20
CHILD = """
import json, sys
from qlora_lab.export import gguf_out
from qlora_lab.export.gguf_out import to_gguf
from qlora_lab.train.resident import peak_resident, reset_peak, resident

toy, model, out = sys.argv[1:]
gguf_out.PIECE = 2**18
to_gguf(toy, f"{out}/toy.gguf", "q8_0", progress=False)  # imports
before = resident()
reset_peak()
to_gguf(model, f"{out}/model.gguf", "q8_0", progress=False)
print(json.dumps(peak_resident() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(peak_resident() is None, reason="Linux alone tells")
def test_memory_is_that_of_pieces(tmp_path, tokenizer):
    """The largest matrix has 32 MiB in float32 and 16 as it is mapped: 22 were measured."""
    toy = saved(tmp_path / "toy", tokenizer)
    model = saved(tmp_path / "large", tokenizer, intermediate_size=2**17, num_hidden_layers=1)
    done = warm.run([sys.executable, "-c", warm.GIVE_BACK + CHILD, toy, model, tmp_path], check=True)
    peak = json.loads(done.stdout)
    assert peak < 28 * MIB, f"{peak / MIB:.1f} MiB"


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("GPTNeoX", {}, r"this family \(gpt_neox\) is not written as GGUF: choose from llama, mistral"),
        ("Mistral", {}, "has a sliding window"),
        ("Llama", {"attention_bias": True}, "has attention_bias"),
        ("Llama", {"hidden_act": "gelu"}, "has hidden_act 'gelu'"),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "scaling 'linear'"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, tokenizer, family, changes, message):
    folder = saved(tmp_path, tokenizer, family, **changes)
    with pytest.raises(ValueError, match=message):
        to_gguf(folder, tmp_path / "a.gguf", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_values_beyond_float16_are_refused(tmp_path, tokenizer):
    folder = saved(tmp_path, tokenizer, initializer_range=1.0)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name] * 1e5}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="up_proj.weight comes back from F16 with an error of .*too large or too small for float16"
    ):
        to_gguf(folder, tmp_path / "a.gguf", "f16", progress=False)
    assert to_gguf(folder, tmp_path / "a.gguf", "q8_0", progress=False).relative_error < 0.01


def test_errors_teach(tmp_path, tokenizer, capsys):
    folder = saved(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="format 'q5' is not known: choose from f16, q8_0, q4_1, q4_0"):
        to_gguf(folder, tmp_path / "a.gguf", "q5")
    with pytest.raises(FileExistsError, match="config.json exists already: choose another name"):
        to_gguf(folder, folder / "config.json", progress=False)
    with pytest.raises(FileExistsError, match="model exists already"):
        to_gguf(folder, folder, progress=False)
    assert tuple(FORMATS) == command.FORMATS and ql.to_gguf is to_gguf
    assert cli.main(["gguf", str(folder), "--out", str(tmp_path / "new" / "a.gguf"), "--json", "--quiet"]) == 0
    assert '"relative_error": 0.00' in capsys.readouterr().out
    assert cli.main(["gguf", str(folder), "--out", str(tmp_path / "new" / "a.gguf"), "--quiet"]) == 2
    assert "exists already" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- a disk that fails


@pytest.fixture
def exported(tmp_path, tokenizer):
    """How to export into the folder `work`, alone in it."""
    folder = saved(tmp_path, tokenizer)
    (tmp_path / "work").mkdir()
    return tmp_path / "work", partial(to_gguf, folder, tmp_path / "work" / "a.gguf", progress=False)


@pytest.mark.long
def test_whatever_fails_on_the_disk_nothing_is_left(exported):
    """Every 7th thing that is asked of the disk fails once; the next try is whole."""
    work, export = exported
    with disk_faults(work) as seen:
        export()
    whole = (work / "a.gguf").read_bytes()
    for at in range(1, len(seen.operations), 7):
        (work / "a.gguf").unlink(missing_ok=True)
        with disk_faults(work, at, lasting=True), suppress(OSError):
            export()
        assert not (work / "a.gguf").exists() or (work / "a.gguf").read_bytes() == whole, seen.operations[at - 1]
        (work / "a.gguf").unlink(missing_ok=True)
        export()
        assert [path.name for path in work.iterdir()] == ["a.gguf"] and (work / "a.gguf").read_bytes() == whole


@pytest.mark.long
@pytest.mark.parametrize("place", ["halves_to_neighbours", "_compare"])
def test_a_killed_export_leaves_no_half_file(exported, monkeypatch, place):
    """SIGKILL while it writes or compares: no file has the name, and the next export removes what lies there."""
    work, export = exported
    real = getattr(gguf_out, place)

    def killed(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(gguf_out, place, killed)
    child = os.fork()
    if not child:
        export()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (work / "a.gguf").exists() and len(list(work.iterdir())) == 2  # its lock, and its scratch
    monkeypatch.setattr(gguf_out, place, real)
    export()
    assert [path.name for path in work.iterdir()] == ["a.gguf"]
