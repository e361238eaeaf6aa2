"""A run that is killed and resumed is the run that nobody disturbed, bit for bit; a damaged checkpoint has a name."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlora_lab as ql
from qlora_lab.data.examples import Example
from qlora_lab.files import disk, replace as files, tensor_file
from qlora_lab.kernels import OVERRIDE, product
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.train import checkpoint, trainer
from qlora_lab.train.checkpoint import load_checkpoint, save_checkpoint, saved_steps
from qlora_lab.train.run_record import comparable, differences
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training, finetune
from tests.warm import start

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" * (i % 3 + 1)))) for i in range(21)]
MANY = EXAMPLES * 4  # more than 12 steps of 4 need
SETTINGS = {"steps": 12, "batch_size": 4, "lr": 2e-2, "save_every": 2, "max_length": 40}
slow = partial(pytest.param, marks=pytest.mark.slow)
TIMES = ("seconds", "tokens_per_second", "processor_seconds", "gpu_seconds_held", "joules")
PAGE, FRAMES = 1040, 2  # the state of the tiny model is 17 pages of 1040 bytes, or 14 with 8 bits
VARIANTS = {
    "plain": {},
    "8 bits": {"optimizer_bits": 8},
    "paged": {"optimizer_budget": FRAMES * PAGE},
    "paged, 8 bits": {"optimizer_bits": 8, "optimizer_budget": FRAMES * PAGE},
    "cosine, packed": {"schedule": "cosine", "warmup_steps": 3, "packing": True, "micro_batch_size": 1},
    "grouped, checkpointing": {"group_by_length": True, "gradient_checkpointing": True},
    "evaluated": {"eval_every": 2, "patience": 9},
}


def training(folder, out, r=4, examples=EXAMPLES, codebook="nf4", dtype=torch.float32, dropout=0.1, **kwargs):
    """A Training of a model that is loaded anew, as a new process would."""
    model, tokenizer = ql.load(folder, codebook, dtype=dtype, progress=False)
    ql.add_lora(model, r=r, dropout=dropout)
    resume = kwargs.pop("resume", False)
    held_out = EXAMPLES[:5] if "eval_every" in kwargs else ()
    settings = Settings(**SETTINGS | kwargs)
    return Training(model, tokenizer, examples, out, settings, held_out=held_out, resume=resume, progress=False)


def lines(out):
    timeless = []
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        timeless.append({k: v for k, v in record.items() if k not in TIMES})
    return timeless


def same_result(out, other):
    names = ["adapter"] + ["best"] * (other / "best").exists()
    for name in names:
        a, b = (load_file(run / name / "adapter_model.safetensors") for run in (out, other))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert lines(out) == lines(other)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr(trainer, "PagedAdamW", partial(PagedAdamW, page_size=PAGE))


@pytest.mark.long
@pytest.mark.parametrize(
    "variant", ["evaluated", *(pytest.param(v, marks=pytest.mark.slow) for v in list(VARIANTS)[:-1])]
)
def test_a_resumed_run_is_the_undisturbed_one(folder, tmp_path, variant):
    options = VARIANTS[variant]
    training(folder, tmp_path / "whole", **options).run()
    for line in (first := training(folder, tmp_path / "parts", **options)):
        if line["step"] == 5:
            first.stop()
    torch.manual_seed(1)  # what is drawn between the two parts does not matter
    second = training(folder, tmp_path / "parts", **options, resume=True)
    second.run()
    same_result(tmp_path / "parts", tmp_path / "whole")
    a, b = (load_checkpoint(tmp_path / name, 10) for name in ("parts", "whole"))
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])  # both moments as well
    assert {facts.pop("log_sha256") for _, facts in (a, b)}  # of lines that have seconds
    assert a[1] == b[1] and any(name.startswith("optimizer.27.") for name in a[0])
    if "paged" in variant:
        assert second._state.optimizer.pages.count > 2 * len(second._state.optimizer.pages.frames) == 2 * FRAMES


def test_tensors_are_as_readable_as_the_other_files(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    saved = save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {}, keep=1)
    assert {file.stat().st_mode for file in saved.iterdir()} == {(tmp_path / "settings.json").stat().st_mode}


@pytest.mark.slow
def test_float16_resumes_with_its_loss_scale(folder, tmp_path):
    options = {"dtype": torch.float16, "save_every": 1}
    training(folder, tmp_path / "whole", **options).run()
    for line in (first := training(folder, tmp_path / "parts", **options)):
        if line["step"] == 3:
            first.stop()
    assert load_checkpoint(tmp_path / "parts", 3)[1]["scaler"]["scale"] < 65536
    training(folder, tmp_path / "parts", **options, resume=True).run()
    same_result(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_it_keeps_the_newest_and_resumes_from_the_one_that_is_asked_for(folder, tmp_path):
    training(folder, tmp_path / "whole").run()
    for line in (first := training(folder, tmp_path / "run", keep=3)):
        if line["step"] == 9:
            first.stop()
    assert saved_steps(tmp_path / "run") == [6, 8, 9]
    training(folder, tmp_path / "run", resume=6).run()
    same_result(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(FileExistsError, match="holds a run that is complete: there is nothing to resume"):
        training(folder, tmp_path / "run", resume=True)


def stop_at(step, *args, **kwargs):
    """A run that is stopped after `step`."""
    for line in (run := training(*args, **kwargs)):
        if line["step"] == step:
            run.stop()
    return run.result


@pytest.mark.long
@pytest.mark.parametrize("keep", [slow(1), 2])
def test_a_resume_from_an_older_step_takes_the_newer_ones_back(folder, tmp_path, keep):
    """Else they would outlive the log that belongs to them, and no later resume would find a whole state."""
    training(folder, tmp_path / "whole").run()
    stop_at(9, folder, tmp_path / "run", keep=3)
    stop_at(7, folder, tmp_path / "run", keep=keep, resume=6)
    assert saved_steps(tmp_path / "run") == [6, 7][-keep:]
    training(folder, tmp_path / "run", resume=True).run()
    same_result(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_the_best_adapter_is_that_of_the_step_that_is_resumed(folder, tmp_path):
    options = {"eval_every": 2, "save_every": 2, "keep": 9}
    run = stop_at(9, folder, tmp_path / "run", **options)
    best = min(run.held_out, key=lambda one: one[1])
    assert best[0] > 4  # or the test shows nothing
    stored = (tmp_path / "run" / "checkpoints" / "step-00000004" / "best" / "adapter_model.safetensors").read_bytes()
    early = stop_at(5, folder, tmp_path / "run", resume=4, **options)
    assert (early.best / "adapter_model.safetensors").read_bytes() == stored
    training(folder, tmp_path / "run", resume=True, **options).run()
    training(folder, tmp_path / "whole", **options).run()
    same_result(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_stop_at_the_step_that_ends_a_run_early_changes_nothing(folder, tmp_path):
    options = {"eval_every": 1, "patience": 2, "steps": 40, "lr": 5e-2}
    training(folder, tmp_path / "whole", **options).run()
    last = len(lines(tmp_path / "whole"))
    assert last < 40
    assert stop_at(last, folder, tmp_path / "run", **options).ended == "early stopping"
    same_result(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_resume_goes_on_with_the_arithmetic_that_the_run_began_with(folder, tmp_path, monkeypatch):
    """bf16 products may win the race in one process and lose it in the next: both give a run, but not the same one."""
    monkeypatch.setattr(product, "_kept", [])
    slow, fast = product.Race(1.0, 1.0, 9.0), product.Race(9.0, 9.0, 1.0)
    finals = {}
    for name, races in {"slow": (slow, slow), "fast": (fast, fast), "slow, then fast": (slow, fast)}.items():
        for race, resume in zip(races, (False, True), strict=True):
            product._kept[:] = [race]
            out = tmp_path / name
            if resume:
                training(folder, out, dtype=torch.bfloat16, resume=True).run()
            else:
                stop_at(4, folder, out, dtype=torch.bfloat16)
        finals[name] = lines(out)[-1]["loss"]
    assert finals["slow, then fast"] == finals["slow"] != finals["fast"]


@pytest.mark.long
def test_a_kill_between_a_save_and_the_removal_of_an_older_one_leaves_none_too_many(folder, tmp_path, monkeypatch):
    def killed(run, steps):
        if steps:
            raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "forget", killed)  # in save_checkpoint alone
    with pytest.raises(ZeroDivisionError):
        training(folder, tmp_path, steps=7).run()
    assert saved_steps(tmp_path) == [2, 4, 6]
    monkeypatch.undo()
    training(folder, tmp_path, steps=7, resume=True).run()
    assert saved_steps(tmp_path) == [4, 6]


def test_a_checkpoint_that_is_removed_loses_its_name_first(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.ones(1)}, {}, keep=2)
    monkeypatch.setattr(disk.shutil, "rmtree", lambda *_, **__: 1 / 0)  # as if killed here
    with pytest.raises(ZeroDivisionError):
        checkpoint.forget(tmp_path, [1])
    assert saved_steps(tmp_path) == [2]


@pytest.mark.slow
def test_where_no_run_was_begun_a_resume_begins_one(folder, tmp_path):
    training(folder, tmp_path / "a", resume=True).run()
    training(folder, tmp_path / "b").run()
    same_result(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="c has no checkpoint of step 4: it has none"):
        training(folder, tmp_path / "c", resume=4).run()


@pytest.fixture
def stopped(folder, tmp_path):
    for line in (first := training(folder, tmp_path / "run")):
        if line["step"] == 5:
            first.stop()
    return tmp_path / "run"


@pytest.mark.long
@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 8}, r"adapter\.r: 4 in the checkpoint, 8 now"),
        ({"examples": EXAMPLES[1:]}, r"data\.\w+: .* in the checkpoint, .* now"),
        slow({"codebook": "fp4"}, r"weights: Quantized\S+\(.*nf4.*\) in the checkpoint, Quantized\S+\(.*fp4.*\) now"),
        slow({"lr": 1e-3, "seed": 3}, r"lr: 0\.02 in the checkpoint, 0\.001 now; seed: 0 in the checkpoint, 3 now"),
        slow({"dtype": torch.bfloat16}, r"dtype: float32 in the checkpoint, bfloat16 now"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_told(folder, stopped, change, message):
    with pytest.raises(ValueError, match=message):
        training(folder, stopped, resume=True, **change).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 14}, r"steps: 12 in the checkpoint, 14 now\. Use"),  # 56 examples, and no longer 48
        ({"steps": 8}, r"steps: 12 in the checkpoint, 8 now\. Use"),
        slow({"batch_size": 3}, r"batch_size: 4 in the checkpoint, 3 now\. Use"),
        slow({"seed": 3}, r"seed: 0 in the checkpoint, 3 now\. Use"),
        slow({"max_length": 39}, r"max_length: 40 in the checkpoint, 39 now\. Use"),
        ({"steps": 14, "r": 8}, r"steps: 12 in the checkpoint, 14 now; adapter\.r: 4 in the checkpoint, 8 now\. Use"),
        ({"steps": 14, "examples": MANY[1:]}, r"steps: 12 in the checkpoint, 14 now; data\.\w+: "),
        ({"steps": 5}, r"was saved at step 5, so all of steps=5 are done: ask for more steps"),
    ],
)
def test_a_cause_is_told_without_what_follows_from_it(folder, tmp_path, change, message):
    """Which examples are encoded follows from the number of steps, and is no difference of its own."""
    stop_at(5, folder, tmp_path / "run", examples=MANY)
    with pytest.raises(ValueError, match=message):
        training(folder, tmp_path / "run", resume=True, **{"examples": MANY} | change).run()


@pytest.mark.long
@pytest.mark.parametrize("steps", [14, slow(9)])
def test_where_nothing_follows_from_the_number_of_steps_it_may_change(folder, tmp_path, steps):
    """All data are encoded either way and the rate is constant: the steps made so far are those of the other run."""
    training(folder, tmp_path / "whole", steps=steps, batch_size=8).run()
    stop_at(5, folder, tmp_path / "run", batch_size=8)
    training(folder, tmp_path / "run", steps=steps, batch_size=8, resume=True).run()
    same_result(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["steps"] == steps


@pytest.mark.long
def test_a_rate_that_follows_from_the_number_of_steps(folder, tmp_path):
    options = {"batch_size": 8, "schedule": "cosine"}
    stop_at(3, folder, tmp_path / "run", **options)
    with pytest.raises(ValueError, match=r"resumed: steps: 12 in the checkpoint, 14 now\. Use"):
        training(folder, tmp_path / "run", steps=14, resume=True, **options).run()


@pytest.mark.slow
def test_another_base_model_is_not_resumed(folder, stopped, tiny_llama):
    tiny_llama.model.layers[1].mlp.up_proj.weight.data[0, 0] *= -1
    tiny_llama.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"base_sha256: \w+ in the checkpoint, \w+ now"):
        training(folder, stopped, resume=True).run()


@pytest.mark.slow
def test_what_changes_no_bit_may_change(folder, stopped, tmp_path):
    training(folder, tmp_path / "whole").run()
    training(folder, stopped, resume=True, keep=1, save_every=3, optimizer_budget=FRAMES * PAGE).run()
    same_result(stopped, tmp_path / "whole")


@pytest.mark.long
def test_a_log_that_lost_a_line_is_refused(folder, stopped):
    log = (stopped / "log.jsonl").read_text().splitlines(keepends=True)
    (stopped / "log.jsonl").write_text("".join(log[:2] + log[3:]))
    with pytest.raises(ValueError, match="log.jsonl lacks a line of the first 5 steps"):
        training(folder, stopped, resume=True).run()


FILES, DAMAGES = ["state.safetensors", "state.json", "SHA256SUMS"], ["bit flipped", "truncated", "missing"]
SOME = set(zip(FILES, DAMAGES, strict=True))  # the others are slow


@pytest.mark.long
@pytest.mark.parametrize(
    "name, damage",
    [pytest.param(n, d, marks=() if (n, d) in SOME else pytest.mark.slow) for n in FILES for d in DAMAGES],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used_when_asked(
    folder, stopped, tmp_path, name, damage
):
    path = stopped / "checkpoints" / "step-00000005" / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        path.unlink()
    else:
        content[random.Random(name).randrange(len(content))] ^= 4
        path.write_bytes(content)
    message = r"step-00000005/\S+ was cut off or changed.* resume from the checkpoint before it: resume=4"
    with pytest.raises(ValueError, match=message) as error:
        training(folder, stopped, resume=True).run()
    # with wrong sums it is the file that they are about
    assert name in str(error.value) or name == "SHA256SUMS"
    if (name, damage) == ("state.safetensors", "bit flipped"):
        training(folder, stopped, resume=4).run()
        training(folder, tmp_path / "whole").run()
        same_result(stopped, tmp_path / "whole")


def test_what_was_noted_of_the_data_is_not_compared():
    """The checksum of the data is compared instead."""
    assert comparable({"notes": {"empty": 1}, "steps": 3}) == {"steps": 3}


def test_differences_name_the_path():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}}) == [
        "b.c: 2 in the checkpoint, 4 now"
    ]
    assert differences({"a": 1}, {"b": 2}) == ["a: 1 in the checkpoint, None now", "b: None in the checkpoint, 2 now"]


# -------------------------------------------------------------------------------------------- processes that are killed


def train_on(folder, out, **options):
    torch.set_num_threads(1)
    trainer.PagedAdamW = partial(PagedAdamW, page_size=PAGE)
    training(folder, out, resume=True, **options).run()


def logged(out):
    path = out / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def started(out):
    """A number that grows whenever a process begins or goes on: it writes settings.json anew, after the log."""
    path = out / "settings.json"
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_ten_kills_change_no_bit(folder, tmp_path):
    """kill -9 at random moments: in a forward pass, an update, a line of the log, a save."""
    options = {"steps": 45, "save_every": 3, "optimizer_budget": FRAMES * PAGE}
    child = start(train_on, folder, tmp_path / "whole", **options)
    child.join()
    assert child.exitcode == 0
    chance, out, lost = random.Random(0), tmp_path / "run", 0
    for _ in range(10):
        before = started(out)
        child = start(train_on, folder, out, **options)
        while not started(out) > before:
            time.sleep(0.002)
        goal = logged(out) + chance.randint(0, 5)
        while logged(out) < goal:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)  # about a step
        assert child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        lost += logged(out) - max(saved_steps(out), default=0)
    assert lost > 0  # steps were lost and made again
    child = start(train_on, folder, out, **options)
    child.join()
    assert child.exitcode == 0
    same_result(out, tmp_path / "whole")
    assert not list(out.rglob(".*"))  # what half-written saves left behind is gone


def die_in_save(folder, out, moment):
    """Trains until its second save, and is killed in it: after half a file, or at the given flush to the disk."""
    saves, syncs = [], []

    def half(tensors, path, **kwargs):
        saves.append(1)
        save_file(tensors, path, **kwargs)
        if len(saves) == 2 and moment == "half a file":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(path, sync=files.sync):
        if len(saves) == 2:
            syncs.append(path)
            if len(syncs) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    tensor_file.save_file, files.sync = half, dying
    train_on(folder, out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["half a file", 1, 2, 3, 4, 5])
def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(folder, tmp_path, moment, monkeypatch):
    monkeypatch.setenv(OVERRIDE, "reference")  # a forked child has no other kernels
    child = start(die_in_save, folder, tmp_path / "run", moment)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    steps = saved_steps(tmp_path / "run")
    assert steps == ([2, 4] if moment == 5 else [2])  # the fifth flush comes after the rename
    for step in steps:
        load_checkpoint(tmp_path / "run", step)
    child = start(train_on, folder, tmp_path / "run")  # as forked as the first, so with the same kernels
    child.join()
    assert child.exitcode == 0
    training(folder, tmp_path / "whole").run()
    same_result(tmp_path / "run", tmp_path / "whole")


def fill_the_disk(out, tensors, errors):
    save_checkpoint(out, 20, tensors, {"small": 1}, keep=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # a write beyond it fails, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save_checkpoint(out, 40, {"big": torch.zeros(2**20)}, {}, keep=2)
    except OSError as error:
        errors.send(str(error))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path):
    ours, theirs = multiprocessing.Pipe()
    tensors = {"x": torch.arange(9.0)}
    child = start(fill_the_disk, tmp_path, tensors, theirs)
    child.join()
    assert ours.poll()
    message = ours.recv()
    assert message.startswith(f"step 40 could not be saved in {tmp_path} (")
    assert "the checkpoint of step 20 is whole. Free 4 MiB there, then resume" in message
    assert saved_steps(tmp_path) == [20] and torch.equal(load_checkpoint(tmp_path, 20)[0]["x"], tensors["x"])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]


@pytest.mark.slow
def test_a_save_that_fails_ends_the_run_and_the_earlier_state_is_left(folder, tmp_path, monkeypatch):
    def full(tensors, path, calls=[], **kwargs):  # noqa: B006 - counts
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match="step 6 could not be saved.*No space left.*the checkpoint of step 4 is whole"):
        training(folder, tmp_path / "run").run()
    assert saved_steps(tmp_path / "run") == [2, 4]
    training(folder, tmp_path / "run", resume=True).run()
    monkeypatch.undo()
    training(folder, tmp_path / "whole").run()
    same_result(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_a_loss_that_is_not_finite_names_layer_dtype_and_the_last_checkpoint(folder, tmp_path):
    run = training(folder, tmp_path / "run")
    with pytest.raises(FloatingPointError) as error:
        for line in run:
            if line["step"] == 3:
                run.model.model.layers[1].mlp.up_proj.lora_B.data[0, 0] = torch.nan
    message = str(error.value)
    assert "step 4: loss nan" in message and f"the last checkpoint is step 2 in {tmp_path / 'run'}" in message
    assert "model.layers.1.mlp.up_proj.lora_B, float32, has 1 of" in message
    training(folder, tmp_path / "run", resume=True).run()  # and the run goes on from there
    training(folder, tmp_path / "whole").run()
    same_result(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_finetune_takes_the_same_settings(folder, tmp_path):
    model, tokenizer = ql.load(folder, dtype=torch.float32, progress=False)
    ql.add_lora(model, r=4, dropout=0.1)
    run = finetune(model, tokenizer, EXAMPLES, out=tmp_path / "run", progress=False, **SETTINGS)
    assert run.settings == Settings(**SETTINGS)
    training(folder, tmp_path / "whole").run()
    same_result(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        finetune(model, tokenizer, EXAMPLES, out=tmp_path / "other", learning_rate=1e-4)
