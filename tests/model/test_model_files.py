"""A model's folder that lies: what it names lies in it, what it asks for can be built, and advice deletes nothing."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import GPTBigCodeConfig

from qlora_lab import cli
from qlora_lab.memory.shape import shape_of
from qlora_lab.model.empty_model import compute_buffers, empty_model
from qlora_lab.model.fetch import ModelError, fetch, resolve
from qlora_lab.model.load import load
from tests.readers import copy_model
from tests.test_readers import seconds


@pytest.fixture
def model(tmp_path):
    """The toy model in three shards with an index."""
    copy_model(tmp_path / "toy")
    return tmp_path / "toy"


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---------------------------------------------------------------------------------------------------- inside the folder


@pytest.mark.parametrize(
    "name", ["../other/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "a.bin", "..", ""]
)
def test_an_index_names_only_files_beside_it(model, name):
    change(model / "model.safetensors.index.json", weight_map={"lm_head.weight": name})
    with pytest.raises(ValueError, match=r"index.json names .*: it must be a \*.safetensors file beside the index"):
        resolve(model)


def test_an_absolute_name_in_an_index_is_refused(model, tmp_path):
    elsewhere = tmp_path / "secret.safetensors"
    (model / "model-00001-of-00003.safetensors").rename(elsewhere)
    change(model / "model.safetensors.index.json", weight_map={"lm_head.weight": str(elsewhere)})
    with pytest.raises(ValueError, match="it must be a .* file beside the index"):
        resolve(model)


def test_links_of_the_hubs_cache_are_followed(model, tmp_path):
    """models--ORG--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH, as huggingface_hub lays it out."""
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    loaded, _ = load(snapshot, None, dtype=torch.float32, progress=False)
    assert loaded.config.hidden_size == 16


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_file_of_another_name_is_not_read_instead(model, name):
    """transformers would look for config.4.0.0.json or tokenizer.4.0.0.json if asked to, without any check of ours."""
    key = "configuration_files" if name == "config.json" else "fast_tokenizer_files"
    change(model / name, **{key: [f"{name.split('.')[0]}.4.0.0.json"]})
    with pytest.raises(ModelError, match=f"{name} has {key}=.*: it must be left out"):
        resolve(model)


# ------------------------------------------------------------------------------------------------------------ too large


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 100_000),
        ("hidden_size", 10**9),
        ("vocab_size", 10**12),
        ("intermediate_size", 10**30),
        ("intermediate_size", [32] * 100_000),
        ("num_attention_heads", 1.5),
        ("num_key_value_heads", True),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(model, field, value, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    change(model / "config.json", **{field: value})
    for read in (load, shape_of, lambda folder: empty_model(folder, torch.float32)):
        with pytest.raises((ModelError, ValueError), match=f"config.json has {field}=.*: it must be a whole number"):
            read(model)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("config.json", {"attention_dropout": 1.5}, "attention_dropout=1.5: it must be a number from 0 to 1"),
        ("config.json", {"attention_dropout": None}, "attention_dropout=None: it must be a number from 0 to 1"),
        ("config.json", {"embd_pdrop": -1}, "embd_pdrop=-1: it must be a number from 0 to 1, or null"),
        ("config.json", {"rope_parameters": {"rope_theta": -1}}, "rope_theta=-1: it must be a number above 0, or null"),
        ("config.json", {"rope_theta": 0}, "rope_theta=0: it must be a number above 0, or null"),
        ("config.json", {"rope_theta": [1e4] * 1001}, "rope_theta=.*, or a list of at most 1,000 of them"),
        ("config.json", {"vocab_size": 0}, "vocab_size=0: it must be a whole number from 1 to 16,777,216"),
        ("generation_config.json", {"eos_token_id": ["a"]}, r"eos_token_id=\['a'\]: it must be a whole number from -1"),
        ("tokenizer_config.json", {"model_max_length": []}, r"model_max_length=\[\]: it must be a number, or null"),
    ],
)
def test_values_at_which_transformers_fails_only_later_are_named(model, name, fields, said):
    change(model / name, **fields)
    with pytest.raises(ModelError, match=f"{name}.* has {said}"):
        resolve(model)


def test_a_tokenizer_that_cannot_encode_is_named(model):
    """Its end token is to stand for unknown words, and is gone: the tokenizers library fails at the first of them."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"a": 1}
    change(model / "tokenizer.json", **content)
    with pytest.raises(ModelError, match=r"tokenizer.json.* cannot be read .Exception: WordLevel error: Missing"):
        load(model, None, progress=False)


def test_buffers_that_would_fill_the_memory_are_refused(tmp_path):
    """GPTBigCode keeps a mask of positions by positions: a million of them are 931 GiB."""
    config = GPTBigCodeConfig(n_embd=16, n_layer=1, n_head=2, n_positions=10**6, vocab_size=64)
    config.save_pretrained(tmp_path)
    change(tmp_path / "config.json", architectures=["GPTBigCodeForCausalLM"])
    built = empty_model(tmp_path, torch.float32)
    with pytest.raises(ModelError, match="asks for buffers of 931.3 GiB, but at most 1 is allowed: correct the"):
        compute_buffers(built, torch.device("cpu"))


def test_a_record_of_infinity_by_older_transformers_is_read(model):
    """Mamba 2's time_step_limit was written so, as Python's own writer has it."""
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity],', 1))
    assert empty_model(model, torch.float32).config.time_step_limit[1] == float("inf")


# --------------------------------------------------------------------------------------------------------------- advice


@contextmanager
def without_rights(path: Path):
    """As a user who may not read `path`."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)
        path.chmod(mode)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other rights")
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors", "tokenizer.json"])
def test_missing_rights_are_no_reason_to_delete(model, name):
    for folder in (model, *model.parents):
        if folder.stat().st_mode & 0o7 == 0:  # pytest's own, which are its user's alone
            folder.chmod(0o755)
    with without_rights(model / name), pytest.raises(PermissionError, match="Permission denied.*") as error:
        resolve(model)
    assert name in str(error.value) and "delete" not in str(error.value)


DAMAGED = ["config.json", "tokenizer.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_users_own_folder_is_never_to_be_deleted(model, name):
    (model / name).write_bytes((model / name).read_bytes()[:-9])
    with pytest.raises((ValueError, ModelError), match=name) as error:
        resolve(model)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_fetch_wrote_and_is_damaged_can_be_deleted(tmp_path, name, monkeypatch):
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path))
    copy_model(tmp_path / "smollm2-135m")
    (tmp_path / "smollm2-135m" / name).write_bytes(b"{")
    with pytest.raises((ValueError, ModelError), match=f"{name}.*: delete {tmp_path}/smollm2-135m and get it again"):
        fetch("smollm2-135m")


def test_the_hubs_cache_keeps_a_damaged_file_until_its_whole_folder_goes(model, tmp_path):
    """snapshot_download takes a blob that is there for whole, so deleting the links alone would change nothing."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ModelError, match=f"config.json.*: delete {tmp_path}/models--org--name and get it again"):
        resolve(snapshot)


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def pipe(tmp_path):
    """A FIFO that nobody writes to."""
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path / "pipe")


@pytest.mark.parametrize(
    "argv",
    [
        ["finetune", "--data", "PIPE", "--model", "MODEL"],
        ["block-size", "MODEL", "--bits", "4.5", "--out", "plan.json", "--text", "PIPE"],
        ["sweep", "MODEL", "--out", "rows.jsonl", "--text", "PIPE"],
        ["sweep", "MODEL", "--out", "PIPE"],
        ["tournament", "MODEL", "--out", "PIPE"],
        ["tournament", "--games", "PIPE"],
        ["quantize", "MODEL", "--out", "small", "--plan", "PIPE"],
        ["memory", "PIPE"],
        ["generate", "a", "--model", "PIPE"],
        ["generate", "a", "--model", "MODEL", "--adapter", "PIPE"],
    ],
)
def test_no_option_waits_for_a_fifo(argv, pipe, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with seconds(60):
        assert cli.main([{"PIPE": pipe, "MODEL": str(model)}.get(word, word) for word in argv]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qlora-lab ")]
    assert len(said) == 1 and "pipe" in said[0]


FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
FILES += ["special_tokens_map.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_one_line_with_its_name(name, model, tmp_path, capsys):
    """At eight places of each file, and every command that loads a model checks first."""
    good = (model / name).read_bytes()
    for length in (len(good) * eighth // 8 for eighth in range(8)):
        (model / name).write_bytes(good[:length])
        if name == "chat_template.jinja" and is_a_template(model, good[:length]):
            continue
        assert cli.main(["generate", "a", "--model", str(model), "--quiet"]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert name in said and said.startswith("qlora-lab generate: ")


def is_a_template(model: Path, content: bytes) -> bool:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        return bool(Environment().parse(content.decode()) and content.strip())
    except TemplateSyntaxError:
        return False
