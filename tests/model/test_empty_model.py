"""No code of a folder is run, whatever the user answers; what is not supported is refused in one line."""

import ast
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from qlora_lab.model import empty_model as empty_model_file
from qlora_lab.model.empty_model import compute_buffers, empty_model, tokenizer_of
from qlora_lab.model.fetch import ModelError
from qlora_lab.model.load import load
from tools.families import logits

IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def yes(monkeypatch):
    """A user who answers "y" to all that is asked."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))


@pytest.fixture
def trap(tmp_path, folder):
    """Code in `folder` that leaves a file when it is run."""
    ran = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    yield folder
    assert not ran.exists()


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CODE = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}


def test_a_family_that_only_its_own_code_knows_is_refused(trap):
    change(trap / "config.json", model_type="theirs", auto_map=CODE)
    with pytest.raises(ModelError, match="brings code of its own, which is never run here, and .* lacks .*theirs") as e:
        load(trap, progress=False)
    assert "\n" not in str(e.value)


def test_a_known_family_loads_with_the_code_of_transformers(trap):
    want = logits(load(trap, codebook=None, dtype=torch.float32, progress=False)[0])
    change(trap / "config.json", auto_map=CODE)
    assert torch.equal(logits(load(trap, codebook=None, dtype=torch.float32, progress=False)[0]), want)


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["kernels-community/trap", "org/trap@main:f", {"": "org/trap"}, "flash_attention_2"])
def test_no_kernel_that_a_folder_names_is_fetched(folder, name, value):
    """With the package `kernels`, transformers downloads and runs it: what attention runs is never the folder's say."""
    want = empty_model(folder, torch.float32).config
    change(folder / "config.json", **{name: value})
    config = empty_model(folder, torch.float32).config
    assert config._attn_implementation == want._attn_implementation == "sdpa"
    assert config._experts_implementation == want._experts_implementation


def test_a_family_whose_model_is_in_its_own_code_is_refused(trap):
    change(trap / "config.json", model_type="t5", auto_map={"AutoModelForCausalLM": "theirs.Model"})
    with pytest.raises(ModelError, match=r"this family \(t5\) is not supported, because transformers has no causal"):
        load(trap, progress=False)


@pytest.mark.parametrize("kind", ["theirs.Tokenizer", ["theirs.Tokenizer", "theirs.Fast"]])
def test_code_of_a_tokenizer_is_not_run(trap, kind):
    change(trap / "tokenizer_config.json", tokenizer_class="Theirs", auto_map={"AutoTokenizer": kind})
    assert tokenizer_of(trap)("4")["input_ids"]  # tokenizer.json says all
    (trap / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="brings a tokenizer with code of its own, which is never run here: add the"):
        tokenizer_of(trap)


def test_code_of_the_generation_config_is_not_run(trap):
    change(trap / "generation_config.json", auto_map={"GenerationConfig": "theirs.Config"}, custom_generate="theirs")
    load(trap, progress=False)


@pytest.mark.slow
def test_no_call_of_the_library_leaves_the_question_to_transformers():
    room = Path(empty_model_file.__file__).parent.parent
    calls = [node for path in room.rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    calls = [ast.unparse(node) for node in calls if isinstance(node, ast.Call)]
    calls = [call for call in calls if re.match(r"Auto\w+\.from_(pretrained|config)\(", call)]
    assert len(calls) >= 3 and [call for call in calls if "**NO_CODE" not in call] == []


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"model_type": "llama9"},
            r"transformers does not know this family \(llama9\): update it, or mend .*config.json",
        ),
        (
            {"model_type": "t5"},
            r"this family \(t5\) is not supported, because transformers has no causal language model",
        ),
        ({"model_type": "bert"}, r"this family \(bert\) is not supported, because it is an encoder, whose tokens read"),
        ({"model_type": "git"}, r"this family \(git\) is not supported, because no decoder of its own stands beside"),
        ({"model_type": "gemma3n"}, r"this family \(gemma3n\) is not supported, because it reads sound too: save its"),
        ({"model_type": "llava", "text_config": {"hidden_size": 0}}, r"config.json: text_config has hidden_size=0: it"),
        ({"model_type": "llava", "vision_config": {"patch_size": 0}}, r"config.json: vision_config has patch_size=0"),
    ],
)
def test_what_is_not_supported_is_told_in_one_line(folder, fields, message):
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=message) as error:
        empty_model(folder, torch.float32)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("fields", [{"model_type": "bert", "is_decoder": True}, {"model_type": "gpt_neox"}])
def test_a_decoder_is_one_whatever_its_switch_says(folder, fields):
    """GPT-NeoX has is_decoder=False by default, and no code that asks for it."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(fields | small))
    assert empty_model(folder, torch.float32).config.model_type == fields["model_type"]


def test_a_config_without_a_family_is_told_so(folder):
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"transformers does not know this family \(no model_type in config.json\)"):
        empty_model(folder, torch.float32)


def test_a_config_with_a_wrong_value_names_it(folder):
    change(folder / "config.json", hidden_size="wide")
    with pytest.raises(ModelError, match=r"config.json has hidden_size='wide': it must be a whole number") as error:
        empty_model(folder, torch.float32)
    assert "\n" not in str(error.value)


WRONG = [
    ({"num_attention_heads": 0}, "ZeroDivisionError"),
    ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    ({"hidden_act": "nope"}, "KeyError: 'nope'"),
    ({"dtype": "float7"}, "no attribute 'float7'"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "Missing required keys"),
    ({"rope_scaling": {"type": "nope"}}, "KeyError: 'nope'"),
]


@pytest.mark.parametrize("fields, reason", WRONG)
def test_what_transformers_cannot_build_is_told_in_one_line(folder, fields, reason):
    change(folder / "config.json", **fields)
    with pytest.raises(ModelError, match=f"config.json cannot be used: .*({reason})") as error:
        empty_model(folder, torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"model_type": "llama\xe9"}', b"\xef\xbb\xbf{}"])
def test_a_config_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="config.json(, line 1| holds| is not UTF-8| begins with a byte order)"):
        load(folder, progress=False)


@pytest.mark.parametrize("value", ["x", [], ["a"], 3])
def test_a_quantization_config_that_is_no_object_is_named(folder, value):
    change(folder / "config.json", quantization_config=value)
    with pytest.raises(ModelError, match="has quantization_config=.*: it must be a JSON object"):
        load(folder, progress=False)


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_generation_config_that_cannot_be_read_is_named(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match="generation_config.json(, line 1, column .: it | holds )"):
        load(folder, progress=False)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{}", "model.tokenizer.json cannot be read .*: copy it again"),
        ("tokenizer.json", "{", "tokenizer.json, line 1, column 2: it ends too early"),
        ("tokenizer_config.json", "{", "tokenizer_config.json, line 1, column 2: it ends too early"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        load(folder, progress=False)


def test_a_pad_token_without_a_row_changes_nothing(folder):
    want = logits(load(folder, dtype=torch.float32, progress=False)[0])
    change(folder / "config.json", pad_token_id=280)  # as many as there are rows: one behind the last
    assert torch.equal(logits(load(folder, dtype=torch.float32, progress=False)[0]), want)


def test_a_sentencepiece_tokenizer_says_what_it_takes(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ModelError, match="has tokenizer.model and no tokenizer.json, and reading it takes .*install"):
        tokenizer_of(folder)


def test_a_folder_without_a_tokenizer_says_so(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer.json: copy the tokenizer's files of this model there"):
        tokenizer_of(folder)


@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64)]
)
def test_a_buffer_that_nothing_computes_is_named(folder, value):
    model = empty_model(folder, torch.float32)
    model.model.register_buffer("theirs", value.to("meta"), persistent=False)
    with pytest.raises(ModelError, match="^model.theirs has no value: no file holds it"):
        compute_buffers(model, torch.device("cpu"))
