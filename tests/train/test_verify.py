"""Checksums are those of `sha256sum`; `verify` names just what differs, and writes nothing."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.examples import Example
from qlora_lab.files.checksums import DIFFERS, LARGEST, MISSING, OK, SUMS, UNKNOWN, read_sums
from qlora_lab.model.hub_checksums import differing
from qlora_lab.train.checkpoint import SUMS as CHECKPOINT_SUMS
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune
from qlora_lab.train.verify import verify

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two"))) for i in range(4)]
OPTIONS = {"batch_size": 2, "save_every": 1, "eval_every": 1}
LARGE_FILES_HELLO = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"  # printf 'hello\n' | sha256sum
SMALL_FILES_HELLO = "ce013625030ba8dba906f756967f9e9ca394464a"  # echo hello | git hash-object --stdin


@pytest.fixture
def model(tiny_llama):
    return add_lora(tiny_llama, r=2)


@pytest.fixture
def run(model, tokenizer, tmp_path):
    finetune(model, tokenizer, EXAMPLES, 3, tmp_path / "run", held_out=EXAMPLES, progress=False, **OPTIONS)
    return tmp_path / "run"


@pytest.fixture
def begun(model, tokenizer, tmp_path):
    """A run that was killed after its third step, one after its last checkpoint."""
    settings = Settings(steps=9, **OPTIONS | {"save_every": 2})
    training = Training(model, tokenizer, EXAMPLES, tmp_path / "run", settings, held_out=EXAMPLES, progress=False)
    for line in training:
        if line["step"] == 3:
            copied = shutil.copytree(tmp_path / "run", tmp_path / "copy")
            training.stop()
    return copied


def states(folder):
    return {part.name: part.state for part in verify(folder, progress=False)}


def flip(path):
    """One bit of a file is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tree(folder):
    return {str(path): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def command(capsys, *words):
    code = cli.main(["verify", *map(str, words)])
    return code, *capsys.readouterr()


# --------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.long
def test_all_parts_of_a_run_are_well(run, capsys):
    before = tree(run)
    parts = ["adapter/", "best/", "checkpoints/step-00000001/", "checkpoints/step-00000002/"]
    parts += ["log.jsonl", "result.json", "settings.json"]
    assert states(run) == dict.fromkeys(parts, OK)
    code, out, err = command(capsys, run)
    assert (code, err) == (0, "") and out.splitlines()[0].split() == ["adapter/", "ok"]
    assert len({line.index("ok") for line in out.splitlines()}) == 1 and len(out.splitlines()) == 7
    assert tree(run) == before


@pytest.mark.long
def test_every_file_of_a_run_is_covered(run, capsys):
    """But the mark, which is checked by what reads it; a flip in a list of checksums is found as well."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "qlora-lab.json"]
    assert len(files) == 3 * 2 + 2 * 6 + 4  # adapter and best with lists; two checkpoints with a best; the run itself
    for file in files:
        content = file.read_bytes()
        flip(file)
        code, out, _ = command(capsys, run)
        assert code == 1 and DIFFERS in out, file
        file.write_bytes(content)
    for file in files:
        file.rename(run.parent / "away")
        code, out, _ = command(capsys, run)
        assert code == 1 and MISSING in out and file.name in out, file
        (run.parent / "away").rename(file)


@pytest.mark.long
def test_a_complete_run_without_all_of_its_list_is_told(run, capsys):
    lines = (run / SUMS).read_text().splitlines(keepends=True)
    (run / SUMS).write_text("".join(line for line in lines if "result.json" not in line))
    assert states(run)[SUMS] == DIFFERS
    for path in (run / SUMS, run / "adapter" / SUMS, run / "best" / SUMS):
        path.unlink()
    shutil.rmtree(run / "checkpoints")
    code, out, _ = command(capsys, run)  # nothing has a checksum any more
    assert code == 1 and [SUMS, MISSING] in [line.split() for line in out.splitlines()]


@pytest.mark.long
def test_what_differs_is_named(run, capsys):
    flip(run / "adapter" / "adapter_model.safetensors")
    (run / "checkpoints" / "step-00000002" / "state.json").unlink()
    code, out, _ = command(capsys, run)
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert code == 1 and ["adapter/", "differs: adapter_model.safetensors"] in lines
    assert ["checkpoints/step-00000002/", "missing: state.json"] in lines and ["best/", "ok"] in lines
    found = {part["name"]: part for part in json.loads(command(capsys, run, "--json")[1])}
    assert found["adapter/"]["files"] == ["adapter/adapter_model.safetensors"]


@pytest.mark.long
def test_an_adapter_of_another_run_is_found(run, model, tokenizer, tmp_path):
    """It is whole by its own list, and not what this run made."""
    finetune(model, tokenizer, EXAMPLES, 1, tmp_path / "other", progress=False)
    shutil.rmtree(run / "adapter")
    shutil.copytree(tmp_path / "other" / "adapter", run / "adapter")
    assert states(run / "adapter") == {"adapter_config.json": OK, "adapter_model.safetensors": OK}
    assert states(run)["adapter/"] == DIFFERS


@pytest.mark.long
def test_a_run_that_was_killed_has_the_checksum_of_its_log_up_to_the_checkpoint(begun, capsys):
    parts = {"best/": OK, "checkpoints/step-00000002/": OK, "log.jsonl": OK, "settings.json": OK}
    assert states(begun) == parts and (begun / "log.jsonl").read_text().count("\n") == 3
    lines = (begun / "log.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "log.jsonl").write_bytes(b"".join(lines[:2]) + lines[2].replace(b"1", b"2"))
    assert states(begun) == parts  # a resume makes the third step again
    (begun / "log.jsonl").write_bytes(lines[0].replace(b'"loss": ', b'"loss": 1') + b"".join(lines[1:]))
    assert states(begun) == parts | {"log.jsonl": DIFFERS}
    shutil.rmtree(begun / "checkpoints")
    assert states(begun)["log.jsonl"] == UNKNOWN and command(capsys, begun)[0] == 0


@pytest.mark.long
def test_a_run_that_is_not_complete_may_have_no_list_yet(begun, capsys):
    (begun / SUMS).unlink()
    assert set(states(begun).values()) == {OK, UNKNOWN} and command(capsys, begun)[0] == 0


@pytest.mark.long
def test_a_resume_refuses_a_log_that_its_checkpoint_did_not_see(begun, model, tokenizer):
    log = begun / "log.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    settings = Settings(steps=9, **OPTIONS | {"save_every": 2})
    options = {"held_out": EXAMPLES, "progress": False, "resume": True}
    with pytest.raises(
        ValueError, match="log.jsonl differs from the log saved at step 2: restore it, or start a new run"
    ):
        Training(model, tokenizer, EXAMPLES, begun, settings, **options).run()


def test_sha256sum_reads_what_is_written(run):
    for folder, name in ((run, SUMS), (run / "best", SUMS), (run / "checkpoints" / "step-00000002", CHECKPOINT_SUMS)):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", name], cwd=folder, check=True)


# ------------------------------------------------------------------------------------------- adapters and other models


@pytest.mark.long
def test_an_adapter_is_checked_without_its_card_and_peft_reads_it(folder, run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = run / "best"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    (adapter / "README.md").write_text("mine")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert states(adapter) == dict.fromkeys(names, OK)
    flip(adapter / names[1])
    assert states(adapter) == {names[0]: OK, names[1]: DIFFERS}
    assert states(run)["best/"] == DIFFERS


def test_a_quantised_folder_is_checked_and_its_list_is_the_same_however_it_was_made(folder, tmp_path):
    small = ql.quantize_folder(folder, tmp_path / "small", progress=False)
    names = {path.name for path in small.iterdir()} - {SUMS}
    assert states(small) == dict.fromkeys(names, OK) and {"config.json", "tokenizer.json"} < names
    for name in names:
        flip(small / name)
        assert states(small) == dict.fromkeys(names, OK) | {name: DIFFERS}
        flip(small / name)
    (small / "tokenizer.json").unlink()
    assert states(small)["tokenizer.json"] == MISSING


def test_a_quantised_folder_that_is_not_finished_is_told(tmp_path, capsys):
    (tmp_path / "quantizing.json").write_text("{}")
    code, out, err = command(capsys, tmp_path)
    assert code == 2 and out == "" and "is not finished, so it has no checksums yet: repeat the call of quantize" in err


def snapshot(cache):
    """As huggingface_hub lays out its cache: a small file by git's checksum, a large one by its sha256."""
    folder = cache / "models--org--name" / "snapshots" / "0123abc"
    (folder / "sub").mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    for name, digest in (("config.json", SMALL_FILES_HELLO), ("sub/model.safetensors", LARGE_FILES_HELLO)):
        (folder.parents[1] / "blobs" / digest).write_text("hello\n")
        depth = "../" * name.count("/")
        (folder / name).symlink_to(f"{depth}../../blobs/{digest}")
    return folder


def test_a_model_of_the_hub_is_checked_against_what_the_hub_gave(tmp_path):
    folder = snapshot(tmp_path)
    assert states(folder) == {"config.json": OK, "sub/": OK} and differing(folder) == []
    (folder / "sub" / "model.safetensors").write_text("hellp\n")
    assert states(folder) == {"config.json": OK, "sub/": DIFFERS}
    assert differing(folder) == [folder / "sub" / "model.safetensors"]
    (folder / "config.json").resolve().unlink()
    assert states(folder)["config.json"] == MISSING


def test_a_list_of_ours_that_came_from_the_hub_and_the_hubs_own_checksums_both_hold(tmp_path):
    """A quantised copy that a user uploaded: one file has a sha256 and git's checksum, and is as both say."""
    folder = snapshot(tmp_path)
    (folder / SUMS).write_text(f"{LARGE_FILES_HELLO}  config.json\n")
    assert states(folder)["config.json"] == OK
    (folder / SUMS).write_text(f"{'0' * 64}  config.json\n")
    assert states(folder)["config.json"] == DIFFERS


def test_the_layout_of_the_hubs_cache_is_that_of_its_library(tmp_path, monkeypatch):
    """Its own function makes the links, so that a new layout is noticed."""
    from huggingface_hub.file_download import _create_symlink

    blob, pointer = tmp_path / "m" / "blobs" / SMALL_FILES_HELLO, tmp_path / "m" / "snapshots" / "1" / "config.json"
    for path in (blob, pointer):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_text("hello\n")
    _create_symlink(str(blob), str(pointer))
    assert states(pointer.parent) == {"config.json": OK}


def test_a_download_that_differs_from_the_hubs_checksum_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    from qlora_lab.model import fetch

    folder = snapshot(tmp_path)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(fetch, "ask_hub", lambda hub_id: None)
    with pytest.raises(ValueError, match=rf"config.json is not what the hub has: delete .*{SMALL_FILES_HELLO} and"):
        fetch._from_hub("org/name", False)


# ----------------------------------------------------------------------------------------------------- what is not ours


@pytest.mark.long
@pytest.mark.parametrize("name", ["state.json", "state.safetensors", CHECKPOINT_SUMS])
def test_a_fifo_is_not_waited_for(begun, name):
    file = begun / "checkpoints" / "step-00000002" / name
    file.unlink()
    os.mkfifo(file)
    assert states(begun)["checkpoints/step-00000002/"] == DIFFERS


def test_what_is_not_ours_is_told_in_one_line(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    cases = {
        "nowhere": "is not a folder: name one that a command of qlora-lab made; `qlora-lab fetch MODEL` shows",
        "empty": "has no checksums",
        folder: "has no checksums: qlora-lab did not write it, or their list is lost: write the folder again",
        "notes.txt": "holds no row of a sweep",
        "": "the path is empty",
    }
    for name, message in cases.items():
        code, out, err = command(capsys, name and tmp_path / name)
        assert code == 2 and out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["notes", f"{'0' * 64}  ../outside", f"{'0' * 64}  /etc/passwd", f"{'0' * 63}  a", f"{'g' * 64}  a", "\xff"]
)
def test_a_list_that_is_not_one_of_ours_is_refused_by_line(tmp_path, line):
    (tmp_path / SUMS).write_text(f"{'0' * 64}  first\n{line}\n", "latin-1")
    with pytest.raises(ValueError, match=f"{SUMS}, line 2, is not the checksum of a file in it"):
        read_sums(tmp_path / SUMS)
    assert states(tmp_path) == {SUMS: DIFFERS}


def test_a_list_without_end_is_not_read(tmp_path):
    (tmp_path / SUMS).write_bytes(b"0" * (LARGEST + 1))
    with pytest.raises(ValueError, match="has more than 1048576 bytes: it is not a list of checksums"):
        read_sums(tmp_path / SUMS)


@pytest.mark.long
def test_the_checksums_are_those_of_the_files(run):
    sums = read_sums(run / SUMS)
    assert "adapter/adapter_model.safetensors" in sums and "result.json" in sums
    assert sums == {name: hashlib.sha256(Path(run, name).read_bytes()).hexdigest() for name in sums}
