"""A chat tokenizer and a LLaMA, both small enough to be made on the spot, and what each test may not do.

Heavy imports stand in the fixtures: the process that hands out tests to workers reads this file, too, before it starts
them, and needs neither torch nor transformers (3 s a stage).
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels run on the CPU, exactly
# before anything imports torch: a second thread sleeps between two sums. While it spins, it takes the core of the other
# worker of pytest, and tests with two threads took ten times the time
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.modules["rfc3987_syntax"] = None  # jsonschema would build 38 grammars in 2 s; no notebook has addresses to check
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's `&` has Ctrl-C ignored, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup leaves it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from qlora_lab import kernels  # noqa: E402
from tools import stages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NEED_TRITON = ["test_bench_gpu.py", "test_bench_gpu_day.py", "show/test_kernel_map.py"]
NEED_TRITON += ["kernels/triton/test_interpreter.py"]
NEED_TRITON += ["kernels/triton/test_ops.py", "kernels/triton/test_rungs.py"]
collect_ignore = NEED_TRITON if find_spec("triton") is None else []  # it exists for Linux


def pytest_report_header() -> str | None:
    return f"Triton is not installed, so these do not run: {', '.join(collect_ignore)}" if collect_ignore else None


# No deadline: the first call may compile a kernel. CI draws the same examples each time, all others draw new ones.
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("project")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 280  # 256 bytes, 3 special tokens, 21 merges
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges and the ChatML template; as SmolLM2's, its pad token is its end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(["the sum of the two numbers\n\n", "assistant\nuser\nsystem\n"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|endoftext|>"],
        chat_template=CHATML,
    )


def _tiny_llama() -> LlamaForCausalLM:
    """Two layers, hidden size 16, float32, the vocabulary of `tokenizer`; drawn with seed 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        # A wide draw, so that logits differ clearly, and small embeddings, so that attention decides and not the last
        # token: answers then depend on the question.
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=1.0, **shape))
        model.model.embed_tokens.weight.data *= 0.1
        return model


@pytest.fixture
def tokenizer():
    return _tokenizer()


@pytest.fixture
def tiny_llama():
    return _tiny_llama()


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory) -> Path:
    """`tiny_llama` and `tokenizer` as files: 13 ms to write, 0.5 ms to copy, and hundreds of tests need them."""
    folder = tmp_path_factory.mktemp("saved")
    _tiny_llama().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, saved_llama):
    """A copy of a model's folder, the test's own, as `load` reads it."""
    return shutil.copytree(saved_llama, tmp_path / "model")


@pytest.fixture
def llava_folder(tmp_path, tokenizer):
    """A tiny LLaVA over the tokenizer and `<image>`: pictures of 16 x 16, a tower of two layers, 4 tokens a picture."""
    import torch
    from transformers import (
        AddedToken,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=VOCABULARY + 1, initializer_range=1.0, **shape)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=text,
                image_token_id=VOCABULARY,
                image_seq_length=4,
                vision_feature_layer=-1,
            )
        )
    model.model.language_model.embed_tokens.weight.data *= 0.1  # as in tiny_llama
    model.save_pretrained(tmp_path / "llava")
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template, **options).save_pretrained(
        tmp_path / "llava"
    )
    return tmp_path / "llava"


@pytest.fixture(autouse=True, scope="session")
def no_power_cut():
    """No test cuts the power, so none waits for the disk: 14,000 calls of 2 to 10 ms. A process of its own waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None if os.fstat(handle) else None)  # a closed file is still an error
        yield


def _noting(function, name: str, calls: set[str]):
    """Return `function`, which also notes in `calls` that it was called."""

    @wraps(function)
    def call(*args, **options):
        calls.add(name)
        return function(*args, **options)

    return call


@pytest.fixture(autouse=True, scope="session")
def calls(no_power_cut):
    """What a test has asked for of a machine's choices: "_choose" (kernels), "race" (products). "run": it ran a kernel
    of the CPU, perhaps unasked. Another process's calls are not seen, so "process" says that there was one."""
    from qlora_lab.kernels import adamw, cpu, few_tokens, product

    calls = set()
    with pytest.MonkeyPatch.context() as patch:
        choose = _noting(kernels._choose, "_choose", calls)
        choose.cache_clear = kernels._choose.cache_clear
        patch.setattr(kernels, "_choose", choose)
        patch.setattr(product, "race", _noting(product.race, "race", calls))
        for home in (adamw, cpu, few_tokens):
            patch.setattr(home, "run", _noting(home.run, "run", calls))
        for home, name in [(subprocess.Popen, "__init__"), (os, "fork"), (BaseProcess, "start")]:
            patch.setattr(home, name, _noting(getattr(home, name), "process", calls))
        yield calls


@pytest.fixture(autouse=True)
def own_race(request, monkeypatch, calls):
    """What one test keeps of a race is gone in the next one, and each draws the same numbers in any order of tests.

    A fast test that asks for a choice although its file is said to hold no numbers would be missing in some stages: it
    fails.
    """
    import torch

    from qlora_lab.kernels import product
    from qlora_lab.model.load import fast_dtype

    monkeypatch.setattr(product, "_kept", [])
    fast_dtype.cache_clear()
    torch.default_generator.manual_seed(0)  # torch.manual_seed also keeps a stack trace for each kind of GPU: 0.7 ms
    calls.clear()
    yield
    request.node.stash[ASKED] = sorted(calls | ({"torch"} if stages.computes_with_torch(request.path) else set()))
    if request.node.get_closest_marker("slow"):  # no stage repeats these
        return
    if call := stages.unexpected(calls, request.path):
        pytest.fail(f"calls {call}(): take {request.path.name} out of the lists of tools/stages.py", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect without Python's garbage collector: it finds little, and takes 16 % of each worker's collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish(session):
    # Torch, transformers and thousands of tests stay: a full collection without them is short (7 % of a stage).
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # 4 % of a stage with Python's own 700, 10, 10


# A stage that changes one choice repeats the tests that asked for it. Each stage notes in this folder, for one run of
# tools/stages.py, what the tests that passed have asked for.
NOTES = os.environ.get(stages.NOTES)
ASKED, PASSED = pytest.StashKey[list[str]](), pytest.StashKey[bool]()
SHARED = {"calls", "no_power_cut", "saved_llama", "tmp_path_factory"}  # fixtures of a wider scope that ask for nothing
_shared: set[str] = set()  # all others: what they have asked for was asked before the test began
_noted: dict[str, list[str]] = {}
_collected: dict[str, list[str]] = {}  # file -> its tests but the slow ones, as a stage without --asking found them


def pytest_fixture_setup(fixturedef, request):
    if fixturedef.scope != "function" and fixturedef.argname not in SHARED:
        _shared.add(fixturedef.argname)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note what a test that passed has asked for. Where others may have asked before it, nothing is noted."""
    report = yield
    if NOTES and report.when == "call" and report.passed:
        item.stash[PASSED] = True
    if NOTES and report.when == "teardown" and report.passed and PASSED in item.stash and ASKED in item.stash:
        kept = any(hasattr(type(value), "cache_clear") for value in vars(getattr(item, "module", pytest)).values())
        if not kept and not _shared.intersection(item.fixturenames):
            _noted[item.nodeid] = item.stash[ASKED]
    return report


def pytest_sessionfinish():
    if _noted:
        notes = {"asked": _noted, "collected": _collected}
        Path(NOTES, f"{os.getpid()}.json").write_text(json.dumps(notes), "utf-8")


@cache
def _earlier(choices: str) -> tuple[set[str], set[str]]:
    """The tests that passed without these calls in each stage, and without another process, which could have asked.

    And the files with no other test.
    """
    looked_for = {"process", *choices.split(",")}
    asked, known, files = set(), set(), {}
    for path in Path(NOTES).glob("*.json") if NOTES else []:
        notes = json.loads(path.read_text("utf-8"))
        files |= notes["collected"]
        for test, calls in notes["asked"].items():
            known.add(test)
            if looked_for.intersection(calls):
                asked.add(test)
    unasked = known - asked
    return unasked, {file for file, tests in files.items() if unasked.issuperset(tests)}


def _holds(path: Path, mark: str) -> bool:
    return f"mark.{mark}" in path.read_text("utf-8")


def pytest_ignore_collect(collection_path, config):
    """Leave out files without a test that this stage would run: to import and collect them takes it some seconds."""
    choices, mark = config.getoption("--asking"), config.getoption("--marked")
    if choices and str(collection_path) in _earlier(choices)[1]:
        return True
    if mark and collection_path.suffix == ".py" and not _holds(collection_path, mark):
        return True
    return None  # others decide


def pytest_addoption(parser):
    parser.addoption("--without", metavar="FIXTURE", help="leave out the tests that use this fixture (tools/stages.py)")
    parser.addoption(
        "--asking", metavar="CALLS", help="leave out tests that an earlier stage saw pass without these calls"
    )
    parser.addoption("--marked", metavar="MARK", help="leave out files that do not hold the words mark.MARK")


def _place(file: str) -> int:
    return stages.LONG.index(file) if file in stages.LONG else len(stages.LONG)


def _check_marks(items) -> None:
    """A mark that a test has from elsewhere would leave it out of every stage."""
    marked = {(item.path, mark) for item in items for mark in ("slow", "long") if item.get_closest_marker(mark)}
    if wrong := [f"{path.name}: {mark}" for path, mark in sorted(marked) if not _holds(path, mark)]:
        raise pytest.UsageError(f"{', '.join(wrong)}: write pytest.mark... in the file of the test (tools/stages.py)")


def pytest_collection_modifyitems(config, items):
    without, choices = config.getoption("--without"), config.getoption("--asking")
    _check_marks(items)
    unasked = _earlier(choices)[0] if choices else ()
    for item in () if choices else items:
        if not item.get_closest_marker("slow"):
            _collected.setdefault(str(item.path), []).append(item.nodeid)
    left_out = [item for item in items if without in getattr(item, "fixturenames", ()) or item.nodeid in unasked]
    kept = set(items).difference(left_out)
    # files of LONG first, in its order; all others as they were collected
    items[:] = sorted((item for item in items if item in kept), key=lambda item: _place(item.path.name))
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def with_kernels(monkeypatch):
    """Kernels run, also where the environment asks for the readable functions."""
    monkeypatch.delenv(kernels.OVERRIDE, raising=False)


@pytest.fixture(params=["float32", "onednn", "bfloat16"])
def outcome(request, own_race):
    """The race of the CPU's products ends in each way that it can end on some machine."""
    from qlora_lab.kernels import product
    from qlora_lab.model.load import fast_dtype

    if request.param == "onednn" and not product._has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    product.keep(product.Race.won_by(request.param))
    fast_dtype.cache_clear()
    yield request.param
    fast_dtype.cache_clear()


@contextmanager
def _with_threads(number: int):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """Layers of 16 x 16 are no work for two, who would wait for each other."""
    with _with_threads(1):
        yield


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    """One thread computes, and two share the work."""
    with _with_threads(request.param):
        yield


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What loggers that exist by now say from here on. (pytest's own capture visits all in each phase of each test.)"""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    every = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    hearing = [logging.root, *(logger for logger in every if not logger.propagate)]
    for logger in hearing:
        logger.addHandler(handler)
    yield said
    for logger in hearing:
        logger.removeHandler(handler)
