"""What a user keeps in a folder survives every run into it, byte for byte; a run knows what is its own."""

import json
import shutil
import sys

import pytest
import torch

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.examples import Example
from qlora_lab.files import disk, ownership
from qlora_lab.files.checksums import SUMS
from qlora_lab.measure.answers import answer_all
from qlora_lab.measure.judges import always_first
from qlora_lab.measure.play import play
from qlora_lab.quant.plan import Plan
from qlora_lab.train.checkpoint import saved_steps
from qlora_lab.train.run_folder import MARK, check_free
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two"))) for i in range(4)]
OURS = ["settings.json", "result.json", "log.jsonl", "best/adapter_config.json", "checkpoints/checkpoint-500/model.bin"]
OTHERS = [".best-practices/notes.md", ".adapter-old/adapter_config.json", ".earlier-work/thesis.tex"]
MODES = {"plain": {}, "overwrite": {"overwrite": True}, "resume": {"resume": True}}
TRAINER = ["checkpoint-500/trainer_state.json", "checkpoint-500/optimizer.pt", "runs/Nov26/events.out", "README.md"]
TRAINER += ["adapter_config.json", "adapter_model.safetensors", "training_args.bin", "tokenizer.json", "config.json"]


@pytest.fixture
def model(tiny_llama):
    return add_lora(tiny_llama, r=2)


@pytest.fixture
def train(model, tokenizer):
    def run(out, steps=1, **options):
        return finetune(model, tokenizer, EXAMPLES, steps, out, batch_size=2, progress=False, **options)

    return run


@pytest.mark.parametrize("application", [ownership.RUN, ownership.QUANTISED])
def test_a_mark_that_a_kill_cut_is_ours_and_nothing_else_is(tmp_path, application):
    other = ownership.QUANTISED if application == ownership.RUN else ownership.RUN
    ownership.mark(tmp_path, application)
    whole = (tmp_path / ownership.MARK).read_text()
    for length in range(len(whole) - 2):
        (tmp_path / ownership.MARK).write_text(whole[:length])
        assert not ownership.is_marked_otherwise(tmp_path, application), whole[:length]
        if length > len('{"application": "qlora_lab q'):
            assert ownership.is_marked_otherwise(tmp_path, other)
    for text in ("{}", "notes", whole[:20] + "x", whole.replace("scratch", "scrap"), whole[:-4] + "zz"):
        (tmp_path / ownership.MARK).write_text(text)
        assert ownership.is_marked_otherwise(tmp_path, application), text


def write(folder, *names):
    """Files of a user, each with its own bytes."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} of the user".encode())
    return folder


def contents(folder):
    """Every file with its bytes, and every folder."""
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def refused(capsys, *argv):
    """The one line that a mistake costs."""
    code = cli.main([str(word) for word in argv])
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1
    return line


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OURS + ["adapter/adapter_config.json", MARK, SUMS])
def test_a_users_file_under_a_name_of_a_run_is_refused_before_the_model_is_loaded(capsys, tmp_path, name, mode):
    out = write(tmp_path / "out", name, "notes.txt")
    before = contents(out)
    flag = [] if mode == "plain" else [f"--{mode}"]
    line = refused(capsys, "finetune", "--model", "nowhere", "--out", out, *flag)
    assert f"{out / name.split('/')[0]}" in line and "was not written by a run of qlora_lab" in line
    assert contents(out) == before


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_a_users_files_under_all_other_names_stay_as_they_are(train, tmp_path, mode):
    """Among them names that earlier versions took for scratch of theirs, and those of a Hugging Face Trainer."""
    out = write(tmp_path / "out", "notes.txt", *OTHERS, *TRAINER)
    before = contents(out)
    assert train(out, 2, save_every=1, **MODES[mode]).adapter.is_dir()
    assert train(out, 2, overwrite=True).adapter.is_dir()
    assert before.items() <= contents(out).items()
    made = {"adapter", "log.jsonl", "result.json", "settings.json", "checkpoints", MARK, SUMS}
    assert {path.name for path in out.iterdir()} == made | {name.split("/")[0] for name in before}


@pytest.mark.slow
def test_the_output_folder_of_a_hugging_face_trainer_survives(train, tiny_llama, tokenizer, tmp_path):
    """As a folder of its own, and where it is a run's checkpoints/."""
    from transformers import Trainer, TrainingArguments

    ids = torch.tensor([3, 4, 5])
    for out in (tmp_path / "out", tmp_path / "run" / "checkpoints"):
        options = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        arguments = TrainingArguments(out, **options)
        Trainer(tiny_llama, arguments, train_dataset=[{"input_ids": ids, "labels": ids}]).train()
    before = contents(tmp_path)
    assert "out/checkpoint-2/optimizer.pt" in before
    for mode in MODES.values():
        with pytest.raises(FileExistsError, match="checkpoints/checkpoint-1 was not written by a run"):
            train(tmp_path / "run", **mode)
    assert contents(tmp_path) == before
    train(tmp_path / "out", 2, save_every=1)
    train(tmp_path / "out", overwrite=True)
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adapter/notes.md", "best/README.md", "checkpoints/step-00000001/notes.md"])
def test_a_users_file_within_a_run_is_refused_by_name(train, tmp_path, name, mode):
    train(tmp_path, 2, save_every=1, eval_every=1, held_out=EXAMPLES)
    (tmp_path / "result.json").unlink()  # of a run that is complete
    write(tmp_path, name)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"{name} was not written by a run of qlora_lab: move it away, or choose"):
        train(tmp_path, 2, **MODES[mode])
    assert contents(tmp_path) == before


@pytest.mark.long
def test_a_users_checkpoints_within_a_run_stay(train, tmp_path):
    train(tmp_path, 2, save_every=1)
    write(tmp_path, "checkpoints/checkpoint-500/model.bin", "checkpoints/.step-notes")
    before = contents(tmp_path / "checkpoints" / "checkpoint-500")
    train(tmp_path, 2, overwrite=True)
    assert contents(tmp_path / "checkpoints" / "checkpoint-500") == before and saved_steps(tmp_path) == []
    assert (tmp_path / "checkpoints" / ".step-notes").read_bytes() == b"checkpoints/.step-notes of the user"


def test_what_a_user_makes_while_the_model_is_loaded_is_refused(model, tokenizer, tmp_path):
    training = Training(model, tokenizer, EXAMPLES, tmp_path, Settings(steps=1), overwrite=True, progress=False)
    write(tmp_path, "log.jsonl")
    with pytest.raises(FileExistsError, match="log.jsonl was not written by a run of qlora_lab"):
        training.run()
    assert contents(tmp_path) == {"log.jsonl": b"log.jsonl of the user"}


# ---------------------------------------------------------------------------------------------------- runs without mark


@pytest.mark.long
def test_a_run_that_lost_its_mark_is_refused(train, tmp_path):
    train(tmp_path / "a", 2, save_every=1)
    (tmp_path / "a" / MARK).unlink()
    with pytest.raises(FileExistsError, match="log.jsonl was not written by a run of qlora_lab: move it away"):
        train(tmp_path / "a", 2, overwrite=True)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", "half {", '{"base_sha256": 1, "adapter": {}}', "\x00", "é", "[" * 99_999], ids=len
)
def test_other_settings_make_no_run(tmp_path, text):
    (tmp_path / "settings.json").write_text(text, "latin-1")
    with pytest.raises(FileExistsError, match="settings.json was not written by a run"):
        check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize("scratch", ["..", "../other", ".qlora-lab-", "/", ".qlora-lab-" + "0" * 31 + "/"])
def test_a_mark_that_names_other_folders_as_scratch_is_refused(tmp_path, scratch):
    (tmp_path / MARK).write_text(json.dumps({"application": "qlora_lab run", "scratch": scratch}))
    with pytest.raises(FileExistsError, match=f"{MARK} was not written by a run"):
        check_free(tmp_path)


def test_a_mark_that_a_kill_left_empty_is_written_anew(train, tmp_path):
    (tmp_path / MARK).touch()
    train(tmp_path)
    assert json.loads((tmp_path / MARK).read_text())["application"] == "qlora_lab run"


# ---------------------------------------------------------------------------------------------------- scratch and kills


@pytest.mark.long
def test_only_recorded_scratch_of_a_killed_process_is_removed(train, tmp_path):
    train(tmp_path, 2, save_every=1)
    scratch = json.loads((tmp_path / MARK).read_text())["scratch"]
    for name in (f"{scratch}/.best-abc/new", f"checkpoints/{scratch}/.step-00000002-abc/new"):
        write(tmp_path, name)
    write(tmp_path, ".best-a8s0d9f2/new", "checkpoints/.step-1-removed/new", f"{scratch[:-1]}/new")
    train(tmp_path, overwrite=True)
    assert not list(tmp_path.rglob(scratch))
    for name in (".best-a8s0d9f2/new", "checkpoints/.step-1-removed/new", f"{scratch[:-1]}/new"):
        assert (tmp_path / name).read_bytes() == f"{name} of the user".encode()


def test_scratch_of_a_run_that_was_killed_as_it_ended_goes_with_the_next_call(train, tmp_path, capsys):
    train(tmp_path)
    scratch = json.loads((tmp_path / MARK).read_text())["scratch"]
    write(tmp_path, f"{scratch}/.result.json-abc/result.json", f"{scratch[:-1]}/mine")
    assert "is complete: there is nothing to resume" in refused(capsys, "finetune", "--out", tmp_path, "--resume")
    assert not (tmp_path / scratch).exists() and (tmp_path / scratch[:-1] / "mine").exists()


@pytest.mark.long
def test_scratch_has_another_name_in_each_folder(train, tmp_path):
    for name in "ab":
        train(tmp_path / name)
    a, b = (json.loads((tmp_path / name / MARK).read_text())["scratch"] for name in "ab")
    assert a != b and len(a) == len(b) == len(".qlora-lab-") + 32  # 128 bits


@pytest.mark.long
def test_an_error_as_files_are_set_aside_puts_them_back(train, tmp_path, monkeypatch):
    train(tmp_path, 2, save_every=1, eval_every=1, held_out=EXAMPLES)
    before, rename, calls = contents(tmp_path), disk.rename, []

    def third_fails(path, target):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(disk, "rename", third_fails)
    with pytest.raises(OSError, match="Input/output error"):
        train(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------------------- symlinks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "run/checkpoints", "run/best", "run/adapter"])
def test_links_are_followed_and_stay(model, tokenizer, train, tmp_path, name):
    options = {"save_every": 1, "eval_every": 1, "held_out": EXAMPLES}
    link, target = tmp_path / name, tmp_path / "disk" / "target"
    target.mkdir(parents=True)
    if name in ("run", "run/checkpoints"):  # before there is a run
        link.parent.mkdir(exist_ok=True)
    else:  # afterwards, with what the run has written
        target.rmdir()
        train(tmp_path / "run", 2, **options)
        link.rename(target)
    link.symlink_to(target)
    for overwrite in (True, True):
        train(tmp_path / "run", 3, overwrite=overwrite, **options)
        assert link.is_symlink() and link.resolve() == target and any(target.iterdir())
    for _ in (training := Training(
        model, tokenizer, EXAMPLES, tmp_path / "run", Settings(steps=3, save_every=1, eval_every=1, batch_size=2),
        held_out=EXAMPLES, overwrite=True, progress=False,
    )):  # fmt: skip
        training.stop()
    assert train(tmp_path / "run", 3, resume=True, **options).ended == "all steps"
    assert link.is_symlink() and len(saved_steps(tmp_path / "run")) == 2
    assert not list(tmp_path.rglob(".*")) and [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]


def test_a_link_to_a_users_checkpoints_is_refused(tmp_path):
    write(tmp_path / "mine", "step-00000020/state.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="checkpoints/step-00000020 was not written by a run"):
        check_free(tmp_path / "run", overwrite=True)


def test_links_to_nothing_are_told_before_the_first_step(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link is a device, or a link to nothing: name a folder for the run"):
        check_free(tmp_path / "link")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="checkpoints was not written by a run"):
        check_free(tmp_path)


# ----------------------------------------------------------------------------------------------------- files of a user


@pytest.mark.parametrize("command", ["block-size --bits 4.5", "sweep"])
@pytest.mark.parametrize("content", [b"notes of mine", b"{}", b"{", 99 * b"\0", b"[1]\n"])
def test_a_users_file_is_not_replaced_by_results(capsys, tmp_path, command, content):
    notes = tmp_path / "notes.txt"
    notes.write_bytes(content)
    words = command.split()
    assert str(notes) in refused(capsys, words[0], "nowhere", *words[1:], "--out", notes)
    assert notes.read_bytes() == content and list(tmp_path.iterdir()) == [notes]


# ---------------------------------------------------------------------------------------------------------- empty paths

EMPTY = "the path is empty, perhaps because a shell variable is not set: name"


@pytest.mark.parametrize(
    "argv",
    [
        ["finetune", "--model", "nowhere", "--out", ""],
        ["quantize", "nowhere", "--out", ""],
        ["sweep", "nowhere", "--out", ""],
        ["tournament", "nowhere", "--out", ""],
        ["multiple-choice", "nowhere", "--out", ""],
        ["block-size", "nowhere", "--bits", "4.5", "--out", ""],
        ["gguf", "nowhere", "--out", ""],
        ["grade", "nowhere", "--out", ""],
        ["doctor", "--machine", "--out", ""],
        ["merge", "nowhere", "--adapter", "nowhere", "--target", "dequantised", "--out", ""],
    ],
    ids=lambda argv: argv[0],
)
def test_an_empty_path_is_refused_by_every_command_with_out(capsys, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    assert EMPTY in refused(capsys, *argv) and contents(tmp_path) == {}


def test_no_command_with_out_is_forgotten():
    commands = cli.build_parser()._subparsers._group_actions[0].choices
    with_out = {name for name, parser in commands.items() if "--out" in parser.format_help()}
    assert with_out == {
        "finetune",
        "quantize",
        "sweep",
        "tournament",
        "multiple-choice",
        "block-size",
        "merge",
        "gguf",
        "grade",
        "doctor",
    }  # those of the test above: add yours there


def test_an_empty_path_is_refused_by_every_function_that_writes(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writers = [
        lambda: finetune(model, tokenizer, EXAMPLES, 1, ""),
        lambda: Training(model, tokenizer, EXAMPLES, ""),
        lambda: ql.save_adapter(model, ""),
        lambda: ql.quantize_folder("nowhere", ""),
        lambda: ql.sweep("nowhere", [], ""),
        lambda: play([], {}, always_first, ""),
        lambda: answer_all("nowhere", [], [], ""),
        lambda: Plan("m", {}, 0.0, 4.5, {}).save(""),
    ]
    for write_there in writers:
        with pytest.raises(ValueError, match=EMPTY):
            write_there()
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------------- a user's files in a run's folder


@pytest.fixture
def begun(train, tmp_path):
    """A run without its end: what a kill after the first of its two checkpoints leaves."""
    folder = tmp_path / "run"
    train(folder, 2, save_every=1)
    for name in ("result.json", SUMS):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("mode", ["overwrite", "resume"])
@pytest.mark.parametrize("name", ["result.json", "log.jsonl", "settings.json"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_users_file_that_took_a_name_in_a_run_is_refused(begun, tmp_path, name, mode, linked):
    (begun / name).unlink(missing_ok=True)
    file = tmp_path / "mine.json" if linked else begun / name
    file.write_text('{"accuracy": 0.5}\n')
    if linked:
        (begun / name).symlink_to(file)
    with pytest.raises(FileExistsError, match=f"{name} was not written by a run of qlora_lab"):
        check_free(begun, **MODES[mode])
    assert file.read_text() == '{"accuracy": 0.5}\n'


@pytest.mark.parametrize("content", [b"", b'{"st', b"\0" * 40, b'{"step": 1, "lo\0\0\0'])
def test_a_log_that_a_kill_cut_off_is_still_a_runs(begun, content):
    (begun / "log.jsonl").write_bytes(content)
    check_free(begun, overwrite=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["adapter", "checkpoints", "settings.json"])
def test_a_link_into_another_run_is_refused(begun, train, tmp_path, name):
    train(tmp_path / "other", 2, save_every=1)
    before = contents(tmp_path / "other")
    if name == "checkpoints":
        shutil.rmtree(begun / name)
    (begun / name).unlink(missing_ok=True)
    (begun / name).symlink_to(tmp_path / "other" / name)
    with pytest.raises(FileExistsError, match=f"{name} leads into another run, .*other: remove the link"):
        train(begun, overwrite=True)
    assert contents(tmp_path / "other") == before


@pytest.mark.parametrize("name", ["loop", "loop/x", "a"])
@pytest.mark.parametrize(
    "argv",
    ["finetune --model m", "quantize m", "sweep m", "tournament m", "block-size m --bits 4.5"],
    ids=lambda argv: argv.split()[0],
)
def test_links_that_lead_in_a_circle_are_told(capsys, tmp_path, argv, name):
    for link, target in (("loop", "loop"), ("a", "b"), ("b", "a")):
        (tmp_path / link).symlink_to(tmp_path / target)
    told = refused(capsys, *argv.split(), "--out", str(tmp_path / name))
    assert told.count("\n") <= 1 and ("in a circle" in told or "a link to nothing" in told)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file names")
@pytest.mark.parametrize("argv", ["finetune --model m", "quantize m"])
def test_a_folder_whose_name_is_not_utf_8_is_told_before_any_work(capsys, tmp_path, argv):
    out = str(tmp_path) + "/x\udcff"
    assert "is not UTF-8, so no weights can be written there" in refused(capsys, *argv.split(), "--out", out)
