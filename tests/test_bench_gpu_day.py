"""The device day runs without a device, says what fails and goes on, and needs nothing that a bare machine lacks.

No time is asserted. Where a test needs CUDA's managed memory, the tests of the pages stand in for it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from math import inf
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_check, gpu_day, gpu_paging, gpu_seven_b, gpu_steps
from bench.gpu_card import rungs_on
from qlora_lab import kernels
from qlora_lab.model.linear4bit import Linear4bit
from tests.optim.test_paging import managed

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu_day.sh"
CPU = torch.device("cpu")
FACTS = {"device", "capability", "driver", "cuda", "interpreted", "date", "versions", "part", "quick", "ok"}
FACTS |= {"failures", "seconds", "limit"}


@pytest.fixture(autouse=True)
def ctrl_c():
    """gpu_day.main says what Ctrl-C does from then on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def run(name: str, folder: Path, **how) -> dict:
    """Make a part at toy sizes; what its file says."""
    gpu_day.run(name, True, how.get("seconds", inf), folder)
    (file,) = folder.glob("*.json")
    assert file.name == f"gpu-day-interpreter-{name}.json"
    found = json.loads(file.read_text("utf-8"))
    assert found.keys() >= FACTS and found["interpreted"] is True and found["ok"] is (not found["failures"])
    return found


# ------------------------------------------------------------------------------------------------------- what can fail


def differs() -> None:
    raise gpu_check.Differs("gemv_nf4 differs from its twin, 3 x 64: entry 0 is 1, its twin's is 2; 1 of 3 differ")


def test_a_check_that_fails_is_said_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setattr(gpu_day, "checks", lambda device, quick: [differs, lambda: made.append(1), differs])
    found = run("check", tmp_path)
    assert found["checks"] == 3 and made == [1] and len(found["differences"]) == 2 == len(found["failures"])
    assert capsys.readouterr().err.count("gemv_nf4 differs from its twin, 3 x 64: entry 0 is 1") == 2


def test_a_device_that_is_lost_keeps_what_was_found(monkeypatch, tmp_path):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(gpu_day, "checks", lambda device, quick: [differs, lost, differs])
    found = run("check", tmp_path)
    assert found["checks"] == 2 and found["failures"][0].startswith("gemv_nf4 differs")
    assert found["failures"][1:] == ["RuntimeError: CUDA error: an illegal memory access was encountered"]


def test_checks_that_come_too_late_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_day, "checks", lambda device, quick: [differs])
    found = run("check", tmp_path, seconds=-1.0)
    assert (found["checks"], found["cut"], found["ok"], found["limit"]) == (0, True, True, -1.0)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "SystemExit: paging was stopped: its time was up"),
        (lambda: signal.raise_signal(signal.SIGINT), "interrupted by Ctrl-C"),
    ],
)
def test_a_part_that_raises_or_is_stopped_writes_what_it_has(stop, message, monkeypatch, tmp_path):
    def part(device, quick, end, found):
        found["numel"] = 7
        stop()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(gpu_day.PARTS, "paging", part)
    found = run("paging", tmp_path)
    assert found["failures"] == [message] and found["numel"] == 7 and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("arguments", "refusal", "code"),
    [
        (["check", "--quick", "--out", "OUT"], None, 0),
        (["paging", "--quick", "--out", "OUT"], None, 1),
        (["check", "--quick", "--out", "OUT"], "no GPU", 2),
        (["kernels", "--quick", "--out", "OUT"], None, 130),
        (["check", "--quick"], None, 2),
        (["check", "--out", "OUT"], None, 2),
        (["repair"], None, 2),
    ],
)
def test_exit_codes(arguments, refusal, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_day, "refusal", lambda: refusal)
    monkeypatch.setitem(gpu_day.PARTS, "check", lambda *arguments: [])
    monkeypatch.setitem(gpu_day.PARTS, "paging", lambda *arguments: ["it differs"])
    monkeypatch.setitem(gpu_day.PARTS, "kernels", lambda *arguments: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(
        sys, "argv", ["gpu_day.py", *(str(tmp_path / "a" / "b") if a == "OUT" else a for a in arguments)]
    )
    with pytest.raises(SystemExit) as stopped:
        gpu_day.main()
    assert stopped.value.code == code
    assert ("paging: it differs" in capsys.readouterr().err) is (code == 1)
    assert (tmp_path / "a").exists() is (code != 2)
    assert (signal.getsignal(signal.SIGINT) == signal.SIG_IGN) is (code == 130)  # it comes twice


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "file" / "folder"
    folder.parent.touch()
    monkeypatch.setattr(gpu_day, "refusal", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "check", "--quick", "--out", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        gpu_day.main()
    said = f"no file can be written into {folder} (Not a directory): --out takes another folder\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == said


def test_the_library_runs_its_rungs_inside_and_is_as_before_outside(monkeypatch):
    monkeypatch.setenv(kernels.OVERRIDE, "reference")
    with rungs_on(CPU):
        assert kernels.choose("cpu").name == "triton" and Linear4bit.takes_adapter is False
    assert kernels.choose("cpu").name == "reference" and isinstance(Linear4bit.takes_adapter, property)


# ------------------------------------------------------------------------------------------------------------ the shell

FAKE = """#!/bin/bash
[ "$1" = -c ] && exit 0
echo "$PYTHONPATH $*" >> "$LOG"
case $4 in {cases} esac
"""


def shell(tmp_path: Path, cases: str, *arguments: str, **how) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run the script with a Python that only says which part was asked for, and exits as `cases` say."""
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(FAKE.format(cases=cases))
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "LOG": str(log), "PYTHONPATH": "mine"}
    done = subprocess.run([SCRIPT, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, **how)
    return done, log.read_text().splitlines()


def test_the_script_runs_every_part_and_names_what_failed(tmp_path):
    done, calls = shell(tmp_path, "kernels) exit 1;; seven_b) exit 124;;", "--out", "here")
    assert done.returncode == 1 and [call.split()[4] for call in calls] == list(gpu_day.PARTS)
    assert all(call.startswith(f"{ROOT}:mine -W ignore {ROOT}/bench/gpu_day.py") for call in calls)
    assert all(call.endswith("--out here") for call in calls)
    said = re.findall(r"^(\w+) +\d+ s  (.*)$", done.stdout, re.M)
    results = ["ok", "failed", "ok", "failed: no time", "ok"]
    assert said == list(zip(gpu_day.PARTS, results, strict=True)) and re.search(r"^all +\d+ s$", done.stdout, re.M)


def test_the_script_ends_well(tmp_path):
    assert shell(tmp_path, "")[0].returncode == 0


def test_the_script_stops_where_there_is_nothing_to_run_on(tmp_path):
    done, calls = shell(tmp_path, "check) exit 2;;")
    assert done.returncode == 2 and len(calls) == 1


def test_ctrl_c_reaches_the_part_and_ends_the_day(tmp_path):
    press = "check) kill -INT 0; exit 130;;"  # a terminal sends it to the whole process group
    done, calls = shell(tmp_path, press, start_new_session=True)
    assert done.returncode == 130 and len(calls) == 1


def test_help_is_that_of_the_script(tmp_path):
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("A device day: ") and "set" not in done.stdout.splitlines()
    assert done.stdout.count("bench/gpu_day.sh") == 2 and done.stderr == ""


def test_the_script_needs_a_python_that_can(tmp_path):
    environment = os.environ | {"PYTHON": "/bin/false"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "found no Python with torch, triton and transformers" in done.stderr


def test_nine_minutes_are_enough_for_its_parts():
    text = SCRIPT.read_text("utf-8")
    total = int(re.search(r"^total=(\d+)", text, re.M)[1])
    limits = dict(re.findall(r"(\w+):(\d+)", re.search(r'^parts="(.*?)"', text, re.M)[1]))
    assert list(limits) == list(gpu_day.PARTS) and sum(map(int, limits.values())) <= total <= 535


# ---------------------------------------------------------------------------------------------------------------- steps

STORED = json.loads(gpu_steps.STORED.read_text("utf-8"))["cases"]
SHORT = gpu_steps.CASES["toy"]


@pytest.mark.long
@pytest.mark.parametrize("dtype", gpu_steps.DTYPES)
def test_the_stored_losses_are_those_of_this_machine(dtype, outcome, one_thread):
    found = gpu_steps.train(SHORT, gpu_steps.DTYPES[dtype], CPU)
    assert gpu_steps.compare(found, STORED["toy"][dtype], dtype) == []
    assert len(found["losses"]) == SHORT.steps and found["losses"][-1] < found["losses"][0]


@pytest.mark.long
def test_another_codebook_is_beyond_the_limits(monkeypatch, one_thread):
    quantise = gpu_steps.quantize_linears
    monkeypatch.setattr(gpu_steps, "quantize_linears", lambda model: quantise(model, "fp4"))
    found = gpu_steps.train(SHORT, torch.bfloat16, CPU)
    failures = gpu_steps.compare(found, STORED["toy"]["bfloat16"], "bfloat16")
    assert failures[0] == "bfloat16: other codes than the CPU's" and "bfloat16: tokens are" in failures[1]


@pytest.mark.long
def test_another_learning_rate_is_beyond_the_limits(monkeypatch, one_thread):
    monkeypatch.setattr(gpu_steps, "LR", 2 * gpu_steps.LR)
    found = gpu_steps.train(SHORT, torch.bfloat16, CPU)
    (failure,) = gpu_steps.compare(found, STORED["toy"]["bfloat16"], "bfloat16")
    assert failure.startswith("bfloat16: losses are")


def test_a_loss_that_is_not_finite_is_beyond_the_limits():
    cpu = {"tokens": [1.0, 2.0], "losses": [1.5, 1.0], "weights": "a", "codes": "b"}
    (failure,) = gpu_steps.compare(cpu | {"losses": [1.5, torch.nan]}, cpu, "float32")
    assert failure.startswith("float32: losses are nan from the CPU's")


def test_what_is_drawn_is_exact():
    drawn = gpu_steps.draw(torch.Size([64, 64]), torch.Generator().manual_seed(0))
    whole = (16 * drawn.double() + 0.5) * 2**24
    assert torch.equal(whole, whole.round()) and drawn.abs().max() <= 1 / 32
    assert drawn.std().item() == pytest.approx(1 / 16 / 12**0.5, rel=0.02)  # of an even distribution, 4096 numbers


@pytest.mark.parametrize("name", gpu_steps.CASES)
def test_what_is_stored_is_whole_and_falls(name):
    case = gpu_steps.CASES[name]
    for dtype in gpu_steps.DTYPES:
        one = STORED[name][dtype]
        assert len(one["losses"]) == len(one["norms"]) == case.steps and one["losses"][-1] < one["losses"][0]
        assert len(one["tokens"]) == case.rows * (case.length - 1)
    assert len({STORED[name][dtype][what] for dtype in gpu_steps.DTYPES for what in ("weights", "codes")}) == 2
    limit = gpu_steps.LIMITS["bfloat16"]  # float32's own distance from bf16 is within what bf16 is allowed
    distance = gpu_steps.apart(STORED[name]["bfloat16"], STORED[name]["float32"])
    assert all(distance[what] < limit[what] for what in limit)


def test_steps_that_come_too_late_are_left_out(one_thread):
    found = gpu_steps.train(SHORT, torch.float32, CPU, end=-inf)
    assert len(found["losses"]) == 1 and gpu_steps.compare(found, STORED["toy"]["float32"], "float32") == []


# -------------------------------------------------------------------------------------------------------------- seven_b


def test_a_model_is_made_layer_by_layer():
    model = gpu_seven_b.build(gpu_seven_b.TOY, CPU, gpu_seven_b.quantize_linears)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert linears == ["lm_head"] and len(packed) == 7 * len(model.model.layers) == 14
    assert model.config.num_hidden_layers == 2 and model.lm_head.weight is not model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert {buffer.dtype for buffer in model.model.rotary_emb.buffers()} == {torch.float32}
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_ledger_is_that_of_llama_7b():
    """LLaMA-7B has 6,738,415,616 weights (table 2 of its paper, and `predict_memory`'s doctest)."""
    one = gpu_seven_b.ledger(gpu_seven_b.SHAPE, quick=False)
    assert "6,738,415,616 weights" in one.setup and "r=64" in one.setup and "1 x 512 tokens" in one.setup
    said = gpu_seven_b.predicted(one)
    assert said["allocated"] == sum(r.predicted for r in one.rows if r.group != "runtime" and one.phase in r.when)


def test_nothing_is_run_on_a_card_that_is_too_small(monkeypatch):
    found = {}
    monkeypatch.setattr(gpu_seven_b, "free_memory", lambda device: 1000)
    (failure,) = gpu_seven_b.part(torch.device("cuda"), True, inf, found)
    assert failure.endswith("but the card has 1000 free: nothing was run") and "ours" not in found


@pytest.mark.slow
def test_what_a_card_holds_stands_beside_the_ledger(monkeypatch):
    """The calls of torch.cuda that only a card answers: their names are torch's, their numbers are made up."""
    numbers = {"memory_allocated": 10, "max_memory_allocated": 40, "memory_reserved": 50, "max_memory_reserved": 60}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    cuda = torch.device("cuda")
    gpu_seven_b._reset(cuda)
    said = gpu_seven_b._bytes(cuda)
    assert said == {"allocated": 10, "most_allocated": 40, "most_reserved": 60, "outside": 850}
    run = {"steps": {"bytes": said, "losses": [1.0, 2.0]}}
    monkeypatch.setattr(gpu_seven_b, "measure", lambda quantise, *rest: run if quantise.__name__[0] == "q" else 1 / 0)
    monkeypatch.setattr(gpu_seven_b, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu_seven_b, "free_memory", lambda device: 2**40)
    found = {}
    assert gpu_seven_b.part(cuda, True, inf, found) == []
    assert found["allocated_over_predicted"] == 40 / found["predicted"]["allocated"]
    assert found["bitsandbytes"] == {"error": "ZeroDivisionError: division by zero"}
    run["steps"]["losses"] = [1.0, torch.nan]
    assert gpu_seven_b.part(cuda, True, inf, {}) == ["a loss is not finite: [1.0, nan]"]


# --------------------------------------------------------------------------------------------------------------- paging


def test_a_card_pages_to_pinned_and_to_managed_memory():
    assert gpu_paging.stores_of(torch.device("cuda")) == ("host", "managed")


def paged(store: str, monkeypatch, numel: int = 2048) -> dict[str, dict]:
    """Every contender of a store, one page of four in memory at least."""
    monkeypatch.setattr(gpu_paging, "stores_of", lambda device: (store,))
    adamw = gpu_paging.partial(torch.optim.AdamW, foreach=False)
    wanted = gpu_paging.three_steps(*gpu_paging.start(numel, CPU, adamw))
    makers = gpu_paging.contenders(numel, 4096, CPU)
    chosen = {name: make for name, make in makers.items() if name.startswith((store, "torch"))}
    return {name: gpu_paging.measure(make, numel, CPU, wanted, 0.0) for name, make in chosen.items()}


@pytest.mark.parametrize("store", ["file", "host", "managed"])
def test_paging_has_the_same_bits_and_counts_events(store, monkeypatch):
    with managed():
        found = paged(store, monkeypatch)
    assert found["torch.optim.AdamW, one by one"]["equal"] and len(found) == 6
    for share, frames in (("all in memory", 4), ("a quarter", 1), ("a tenth", 1)):
        one = found[f"{store}, {share}"]
        assert one["equal"] and one["largest_difference"] == 0 and (one["pages"], one["frames"]) == (4, frames)
        moved = {"write back": 4, "evict": 4, "fault": 4} if frames == 1 else {}
        assert one["events_of_a_step"] == moved and one["seconds"]["rounds"] == 3


def test_a_store_that_differs_or_does_not_run_fails(monkeypatch):
    def measure(make, *rest):
        if make is None:
            raise RuntimeError("managed memory: cudaErrorMemoryAllocation: out of memory\nand more")
        return {"equal": False, "largest_difference": 0.5}

    monkeypatch.setattr(gpu_paging, "measure", measure)
    names = {"host, a tenth": 1, "torch.optim.AdamW, fused": 1, "host, a quarter": None, "bitsandbytes x": None}
    monkeypatch.setattr(gpu_paging, "contenders", lambda *rest: names)
    found = {}
    failures = gpu_paging.part(CPU, True, inf, found)
    assert failures == [
        "host, a tenth: differs by 0.5 at most",
        "host, a quarter: RuntimeError: managed memory: cudaErrorMemoryAllocation: out of memory",
    ]
    assert found["optimizers"]["managed"] == {"skipped": gpu_paging.MANAGED} and found["pinned"] is False
    assert "error" in found["optimizers"]["bitsandbytes x"]


def test_paging_takes_no_more_than_the_card_has_free(monkeypatch):
    sizes = []
    monkeypatch.setattr(gpu_paging, "free_memory", lambda device: 64 * 1000)
    monkeypatch.setattr(gpu_paging, "start", lambda numel, *rest: sizes.append(numel) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu_paging.part(CPU, False, inf, {})
    assert sizes == [1000]  # a thousand times 64 bytes


# -------------------------------------------------------------------------------------------------------------- kernels


def test_a_bench_with_little_time_makes_fewer_rounds_and_leaves_rows_out():
    bench = gpu.Bench(CPU, quick=True)
    bench.rounds = 9
    row = ("work", (2, 2), torch.float32, {"ours": lambda: lambda: time.sleep(0.02)}, 8)
    bench.row(*row)
    bench.end = gpu.perf_counter() + 4  # a ninetieth of it is over after two rounds or three
    bench.row(*row)
    bench.end = -inf
    bench.row(*row)
    assert [one["seconds"]["ours"]["rounds"] for one in bench.rows] == [9, gpu.LEAST]
    assert bench.left_out == [{"work": "work", "shape": [2, 2], "dtype": "float32"}]


def test_a_bench_knows_how_many_rows_it_will_have(monkeypatch):
    monkeypatch.setattr(gpu, "SIZES", [(64, 128)])
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    bench = object.__new__(gpu.Bench)
    bench.device, bench.quick, bench.half, bench.rows = CPU, False, torch.bfloat16, []
    bench.row = lambda *row: bench.rows.append(row[0])
    assert 3 * len(bench.run()) == gpu.ROWS


def test_the_table_of_cards_knows_the_days_kernels(monkeypatch, tmp_path):
    for name in ("gpu-a", "gpu-day-b-kernels", "gpu-day-b-paging", "gpu_day_cpu"):
        (tmp_path / f"{name}.json").write_text(json.dumps(name))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    assert gpu.stored() == ["gpu-a", "gpu-day-b-kernels"]


def test_no_toy_is_among_the_files():
    files = list((ROOT / "bench").glob("gpu-day-*.json"))
    assert not any(json.loads(file.read_text("utf-8"))["interpreted"] for file in files)


# ------------------------------------------------------------------------------------------------------ the whole of it

BARE = """
import importlib.abc, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
import re

def plain(name):
    return re.sub("[-_.]+", "-", name).lower()

there, todo = set(), ["torch", "triton", "transformers", "numba", "scipy", "peft"]
while todo:
    name = plain(todo.pop())
    if name not in there:
        there.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            needed = []
        todo += [re.match("[A-Za-z0-9._-]+", line)[0] for line in needed if "extra ==" not in line]
there.add("qlora-lab")  # by its folder: that it is installed here does not count
owners = packages_distributions()
find = PathFinder.find_spec

class Bare(importlib.abc.MetaPathFinder):
    "Finds what a bare machine has; anything else that is installed here is not there."
    def find_spec(self, name, path=None, target=None):
        of = {plain(owner) for owner in owners.get(name.split(".")[0], [])}
        return None if of and not of & there else find(name, path, target)

    def find_distributions(self, *context):
        return (one for one in PathFinder.find_distributions(*context) if plain(one.name) in there)

sys.meta_path[:] = [Bare() if finder is PathFinder else finder for finder in sys.meta_path]
folder, *parts = sys.argv[1:]
from bench import gpu_day
for part in parts:
    sys.argv = ["gpu_day.py", part, "--quick", "--out", folder]
    try:
        gpu_day.main()
    except SystemExit as done:
        print(part, done.code)
for missing in ("matplotlib", "gguf", "anywidget", "rouge_score", "bitsandbytes", "hypothesis", "PIL"):
    assert missing not in sys.modules, missing
"""


@pytest.fixture(scope="module")
def day(tmp_path_factory) -> tuple[Path, str]:
    """All parts, in one process that sees no package but torch, triton, transformers, numba, scipy, peft, and what
    those bring."""
    folder = tmp_path_factory.mktemp("day")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", BARE, str(folder), *gpu_day.PARTS]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_bare_machine_runs_every_part(day):
    folder, said = day
    results = [re.search(rf"^{part} (\d+)$", said, re.M)[1] for part in gpu_day.PARTS]
    assert results == ["0"] * 5 and len(list(folder.iterdir())) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "own"),
    [
        ("check", {"checks", "differences", "cut"}),
        ("kernels", {"half", "bandwidth", "rate", "rows", "left_out"}),
        ("steps", {"case", "shape", "lr", "float32", "bfloat16"}),
        ("seven_b", {"shape", "predicted", "free_bytes", "ours", "bitsandbytes"}),
        ("paging", {"numel", "state_bytes", "page_size", "pinned", "optimizers"}),
    ],
)
def test_each_file_says_what_it_is(part, own, day):
    found = json.loads((day[0] / f"gpu-day-interpreter-{part}.json").read_text("utf-8"))
    assert found.keys() >= FACTS | own and found["interpreted"] is True and found["quick"] is True
    assert found["part"] == part and found["ok"] and found["failures"] == []
    assert found["versions"].keys() >= {"torch", "triton", "transformers"}


@pytest.mark.slow
def test_what_the_files_hold(day):
    check, kernels, steps, seven_b, paging = (
        json.loads((day[0] / f"gpu-day-interpreter-{part}.json").read_text("utf-8")) for part in gpu_day.PARTS
    )
    assert check["differences"] == []
    assert check["checks"] == 2 * 3 * 5 + (7 + 7 + 4) + 2 * 3  # of blocks, dtypes x rungs; of products; of AdamW
    assert len({row["work"] for row in kernels["rows"]}) == 11 and kernels["left_out"] == []
    assert all(steps[dtype]["apart"].keys() == steps[dtype]["limits"].keys() for dtype in gpu_steps.DTYPES)
    assert len(seven_b["ours"]["steps"]["losses"]) == 5 and seven_b["ours"]["answer"]["seconds_a_token"] > 0
    assert seven_b["ours"]["steps"]["bytes"] == gpu_seven_b.NO_CUDA
    assert seven_b["bitsandbytes"] == {"error": "not installed"}
    assert paging["optimizers"]["host, a tenth"]["equal"] and "skipped" in paging["optimizers"]["managed"]
