"""A run of each method that is killed and resumed is the run that nobody disturbed, byte for byte."""

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig, OPTForCausalLM

import qlora_lab as ql
from qlora_lab.adapters.add_adapter import METHODS
from qlora_lab.data.examples import Example
from qlora_lab.train.checkpoint import saved_steps
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training
from tests.train.test_checkpoint import lines
from tests.warm import start

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two" if i % 2 else "too"))) for i in range(12)]
IDS = torch.arange(3, 30)[None]
LAST_SAVED, KILLED = 4, 5  # steps; the fifth is lost and made again
SETTINGS = {"steps": 7, "batch_size": 4, "lr": 2e-3, "save_every": 2}
WEIGHTS = "adapter/adapter_model.safetensors"
CASES = {  # name: method, its options, settings of the run
    "lora": ("lora", {"r": 2, "dropout": 0.1}, {}),
    "rslora": ("rslora", {"r": 2}, {}),
    "dora": ("dora", {"r": 2, "dropout": 0.1}, {}),
    "pissa": ("pissa", {"r": 2}, {}),
    "loftq": ("loftq", {"r": 2}, {}),
    "lora+": ("lora", {"r": 2}, {"lora_plus": 16}),
    "full": ("full", {}, {"micro_batch_size": 1}),
    "full, 8 bits": ("full", {}, {"optimizer_bits": 8}),
    "houlsby": ("houlsby", {"size": 4}, {}),
    "prefix": ("prefix", {"virtual_tokens": 5}, {}),
    "prefix from an MLP": ("prefix", {"virtual_tokens": 5, "mlp": 8}, {}),
    "prompt": ("prompt", {"virtual_tokens": 5}, {}),
    "zero_bias": ("zero_bias", {}, {}),
    "bitfit": ("bitfit", {}, {}),
}


def base(folders, method):
    """The model that `method` needs, loaded anew, as a new process would."""
    torch.set_num_threads(1)
    folder = folders["opt" if method == "bitfit" else "llama"]
    if method == "full":
        return ql.load(folder, None, dtype=torch.bfloat16, progress=False)  # with float32 copies
    return ql.load(folder, dtype=torch.float32, progress=False)


def training(folders, out, case):
    method, options, settings = CASES[case]
    model, tokenizer = base(folders, method)
    ql.add_adapter(model, method, progress=False, **options)
    settings = Settings(**SETTINGS | settings)
    return Training(model, tokenizer, EXAMPLES, out, settings, resume=True, progress=False)


def train_all(folders, out):
    """Begin or go on with each run; what its model answers, and one that reads its adapter, lies beside it."""
    for case, (method, *_) in CASES.items():
        run = training(folders, out / case, case)
        adapter = run.run().adapter
        loaded = ql.load_adapter(base(folders, method)[0], adapter)
        with torch.no_grad():
            answers = {"trained": run.model.eval()(IDS).logits, "loaded": loaded.eval()(IDS).logits}
        save_file(answers, out / f"{case}.answers")


def die_in(folders, out, case):
    for line in training(folders, out / case, case):
        if line["step"] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def folders(folder, tokenizer, runs):
    """Models that stay for all tests: a run knows its model by its name."""
    torch.manual_seed(0)
    if not (runs / "llama").exists():
        shutil.copytree(folder, runs / "llama")
        shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
        OPTForCausalLM(OPTConfig(vocab_size=280, num_attention_heads=2, **shape)).save_pretrained(runs / "opt")
        tokenizer.save_pretrained(runs / "opt")
    return {name: runs / name for name in ("llama", "opt")}


def test_every_method_is_here():
    assert {method for method, *_ in CASES.values()} == set(METHODS)


def finish(target, *args):
    child = start(target, *args)
    child.join()
    return child.exitcode


@pytest.mark.filterwarnings("ignore:.*are in 4 bits;")
def test_a_killed_run_of_each_method_is_the_undisturbed_one(folders, runs):
    assert finish(train_all, folders, runs / "whole") == 0
    for case in CASES:
        assert finish(die_in, folders, runs / "killed", case) == -signal.SIGKILL
        assert saved_steps(runs / "killed" / case)[-1] == LAST_SAVED and len(lines(runs / "killed" / case)) == KILLED
    assert finish(train_all, folders, runs / "killed") == 0
    for case in CASES:
        whole, killed = runs / "whole" / case, runs / "killed" / case
        assert lines(killed) == lines(whole), case
        for file in (WEIGHTS, "checkpoints/step-00000006/state.safetensors"):
            assert (killed / file).read_bytes() == (whole / file).read_bytes(), case
        before, after = (load_file(whole / f"checkpoints/step-0000000{step}/state.safetensors") for step in (4, 6))
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith("adapter.")), case
        answers = [load_file(runs / kind / f"{case}.answers") for kind in ("whole", "killed")]
        assert all(torch.equal(logits, answers[0]["trained"]) for made in answers for logits in made.values()), case
