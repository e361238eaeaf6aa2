"""What training costs: counters of a machine that is made of files, or of a module, and what a run makes of them."""

import json
import math
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qlora_lab as ql
from qlora_lab.data.examples import Example
from qlora_lab.train import cost, distributed
from qlora_lab.train.cost import Counter, Meter, rapl, total
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)  # of a machine that has one; nothing here computes on it
# microjoules: max_energy_range_uj as machines show it, 2^32 steps of 61.0 and of 15.3 microjoules
HIGHEST = 262_143_328_850  # of an Intel Core i5-7400
HIGHEST_AMD = 65_532_610_987  # of an AMD EPYC 7543, and of the memory of Intel's servers


def zone(home, place, name, microjoules, highest=HIGHEST):
    """A zone as Linux has it: a folder within that of its parent, and a link to it among those of all zones."""
    kind, *numbers = place.split(":")
    parents = [":".join([kind, *numbers[:count]]) for count in range(len(numbers) + 1)]  # intel-rapl, intel-rapl:0, ...
    folder = home.joinpath("virtual", *parents)
    folder.mkdir(parents=True, exist_ok=True)
    if not (home / place).is_symlink():
        (home / place).symlink_to(folder)
    (folder / "enabled").write_text("1\n")
    if not numbers:  # a kind of control, which counts nothing
        return None
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{highest}\n")
    return folder / "energy_uj"


@pytest.fixture
def machine(tmp_path):
    """RAPL of two packages with memory, cores and graphics, of the whole board, and of package 0 once more."""
    names = {"intel-rapl": "", "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram"}
    names |= {"intel-rapl:0:2": "uncore", "intel-rapl:1": "package-1", "intel-rapl:1:0": "dram", "intel-rapl:2": "psys"}
    names |= {"intel-rapl-mmio": "", "intel-rapl-mmio:0": "package-0"}
    for place, name in names.items():
        zone(tmp_path, place, name, 1_000_000)
    return tmp_path


def test_packages_and_their_memory_are_counted_once(machine):
    meter = Meter(CPU, machine)
    start = meter.read()
    for number, file in enumerate(sorted(machine.glob("*/energy_uj"))):  # each zone by another power of ten
        file.write_text(str(1_000_000 + 10**number))
    places = [file.parent.name for file in sorted(machine.glob("*/energy_uj"))]
    counted = [places.index(place) for place in ("intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1", "intel-rapl:1:0")]
    spent = meter.since(start)
    assert spent["joules"] == pytest.approx(sum(10**number for number in counted) / 1e6, rel=1e-6)  # sums of 1 J + ...
    assert spent["joules_note"] == "RAPL: package-0, dram, package-1, dram"
    assert spent["gpu_seconds_held"] == 0


@pytest.mark.parametrize("highest", [HIGHEST, HIGHEST_AMD])
def test_a_counter_wraps_around(tmp_path, highest):
    file = zone(tmp_path, "intel-rapl:0", "package-0-die-0", highest - 2_000_000, highest)
    meter = Meter(CPU, tmp_path)
    start = meter.read()
    file.write_text("3000000")
    assert meter.since(start)["joules"] == pytest.approx(5, abs=1e-4)  # one step of the counter is 61 microjoules


def test_a_processor_of_amd_counts_its_cores_once(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 38_419_855_704, HIGHEST_AMD)
    cores = zone(tmp_path, "intel-rapl:0:0", "core", 31_041_919_121, HIGHEST_AMD)
    meter = Meter(CPU, tmp_path)
    start = meter.read()
    package.write_text("38439855704")
    cores.write_text("31053919121")
    spent = meter.since(start)
    assert spent["joules"] == pytest.approx(20) and spent["joules_note"] == "RAPL: package-0"


@pytest.mark.parametrize(("highest", "seconds"), [(HIGHEST, 524), (HIGHEST_AMD, 131)])
def test_a_step_in_which_a_counter_may_go_all_the_way_round_has_no_figure(tmp_path, highest, seconds):
    """At 500 W. The counter then stands where it would after a step that took next to nothing."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000, highest)
    meter = Meter(CPU, tmp_path)
    now = meter.read()
    assert meter.since(now._replace(elapsed=now.elapsed - seconds + 1))["joules"] == 0
    spent = meter.since(now._replace(elapsed=now.elapsed - seconds - 1))
    assert spent["joules"] is None and spent["joules_note"].endswith(
        "may have gone all the way round in so long a step"
    )


def test_a_container_that_hides_its_host_is_told(machine, monkeypatch):
    """As Docker does: the links are there, and lead to nothing."""
    shutil.rmtree(machine / "virtual")
    counters, note = rapl(machine)
    assert counters is None and note.startswith("RAPL cannot be read (") and "intel-rapl:0/name" in note


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda home: None, "has no counter of a processor"),
        (lambda home: zone(home, "intel-rapl:0", "psys", 1), "has no counter of a processor"),
        (lambda home: zone(home, "intel-rapl:0", "package-0", "x"), "RAPL cannot be read .*'x"),
        (lambda home: zone(home, "intel-rapl:0", "package-0", 1, ""), "RAPL cannot be read"),
        (lambda home: zone(home, "intel-rapl:0", "package-0", 1).unlink(), "RAPL cannot be read .*energy_uj"),
    ],
    ids=["no RAPL", "the board alone", "no number", "no range", "no file"],
)
def test_a_missing_figure_has_a_reason(tmp_path, change, said):
    change(tmp_path)
    meter = Meter(CPU, tmp_path)
    spent = meter.since(meter.read())
    assert spent["joules"] is None and spent["processor_seconds"] >= 0
    with pytest.raises(ValueError, match=said):
        raise ValueError(spent["joules_note"])


def test_counters_of_root_are_named(machine, monkeypatch):
    read = Path.read_text

    def as_a_user(file, *encoding):  # a test that runs as root may read everything
        if file.name == "energy_uj":  # of mode 0400 since Linux 5.10; all other files are everybody's
            raise PermissionError(13, "Permission denied", str(file))
        return read(file, *encoding)

    monkeypatch.setattr(Path, "read_text", as_a_user)
    assert rapl(machine) == (None, f"{machine / 'intel-rapl:0' / 'energy_uj'} can be read only by root")


def test_a_counter_that_goes_away_ends_no_run(machine):
    meter = Meter(CPU, machine)
    start = meter.read()
    (machine / "intel-rapl:1" / "energy_uj").unlink()
    spent = meter.since(start)
    assert spent["joules"] is None and "could not be read any more" in spent["joules_note"]
    assert meter.since(meter.read())["joules"] is None


def test_processor_time_is_that_of_this_process(tmp_path):
    meter = Meter(CPU, tmp_path)
    start, begin = meter.read(), time.process_time()
    while time.process_time() - begin < 0.02:
        pass
    assert meter.since(start)["processor_seconds"] >= 0.02
    start = meter.read()
    time.sleep(0.05)
    spent = meter.since(start)
    assert spent["seconds"] >= 0.05 > spent["processor_seconds"]  # sleeping costs nothing


# ---------------------------------------------------------------------------------------------- GPUs, several processes


class NVMLError(Exception):
    pass


class NVMLErrorNotSupported(NVMLError):
    pass


@pytest.fixture
def card(monkeypatch):
    """A module that looks like nvidia-ml-py, with one GPU; `millijoules` is what it has used since its driver began."""
    card = SimpleNamespace(millijoules=5_000_000, asked=[])

    def used(handle):
        card.asked.append(handle)
        if card.millijoules is None:
            raise NVMLErrorNotSupported("Not Supported")  # before Volta, and a part of a GPU
        return card.millijoules

    module = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None)
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTotalEnergyConsumption = used
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = SimpleNamespace(name="A card", uuid="01-ab")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return card


def test_a_gpu_is_counted_and_the_processor_beside_it(card, machine, tmp_path):
    for powercap, extra, note in (
        (machine, 4, "NVML: A card; RAPL: package-0, dram, package-1, dram"),
        (tmp_path / "none", 0, f"NVML: A card; {tmp_path / 'none'} has no counter of a processor"),
    ):
        meter = Meter(GPU, powercap)
        start = meter.read()
        card.millijoules += 7_000
        for file in machine.glob("*/energy_uj"):
            file.write_text(str(int(file.read_text()) + 1_000_000))
        spent = meter.since(start)
        assert spent["joules"] == pytest.approx(7 + extra)
        assert spent["joules_note"] == note
        assert spent["gpu_seconds_held"] == spent["seconds"]
    assert set(card.asked) == {"GPU-01-ab"}


def test_without_the_gpu_the_processor_is_no_figure(card, machine, monkeypatch):
    card.millijoules = None
    meter = Meter(GPU, machine)
    spent = meter.since(meter.read())
    assert spent["joules"] is None and spent["joules_note"] == "NVML has no counter of this GPU (NVML: Not Supported)"

    def without_driver():
        raise NVMLError("NVML Shared Library Not Found")

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", without_driver)
    assert cost.nvml(GPU) == (None, "NVML has no counter of this GPU (NVML Shared Library Not Found)")
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    meter = Meter(GPU, machine)
    spent = meter.since(meter.read())
    assert spent["joules"] is None and "pip install 'qlora-lab[energy]'" in spent["joules_note"]
    other = Meter(torch.device("mps"), machine)
    assert "no counter is known for a device of type mps" in other.since(other.read())["joules_note"]


def test_a_gpu_whose_counter_falls_has_no_figure(card, tmp_path):
    meter = Meter(GPU, tmp_path)
    start = meter.read()
    card.millijoules = 0  # its driver began anew
    spent = meter.since(start)
    assert spent["joules"] is None and spent["joules_note"] == cost.UNKNOWN


def test_processes_of_a_machine_count_its_processor_once(machine, tmp_path, monkeypatch):
    first = Meter(CPU, machine)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(distributed, "joined", lambda: True)
    second = Meter(CPU, machine)
    blind = Meter(CPU, tmp_path / "none")  # not asked: it adds nothing
    starts = [meter.read() for meter in (first, second, blind)]
    (machine / "intel-rapl:0" / "energy_uj").write_text("4000000")
    own = [meter.since(start) for meter, start in zip((first, second, blind), starts, strict=True)]
    assert [line["joules"] for line in own] == [3, 0, 0]
    # what the first process has where another one has no figure
    line = first.since(starts[0], lambda *numbers: tuple(2 * n for n in numbers[:2]) + (math.nan,))
    assert line["joules"] is None and line["joules_note"].startswith("another process has no figure")


@pytest.mark.parametrize("left_over", ["", "1"])
def test_a_process_alone_counts_whatever_its_shell_says(machine, tmp_path, monkeypatch, left_over):
    monkeypatch.setenv("LOCAL_RANK", left_over)
    meter = Meter(CPU, machine)
    assert meter.since(meter.read())["joules_note"].startswith("RAPL: package-0")
    meter = Meter(CPU, tmp_path / "none")
    line = meter.since(meter.read())
    assert line["joules"] is None and line["joules_note"].endswith("has no counter of a processor")
    assert distributed.first_on_node(lambda: 5) == 5


# ----------------------------------------------------------------------------------------------------------- whole runs


def line(joules=1.5, note="RAPL: package-0"):
    return {"processor_seconds": 2.0, "gpu_seconds_held": 0.0, "joules": joules, "joules_note": note}


def test_steps_are_added_up():
    assert total([line(), line(2.5)]) == cost.Cost(4.0, 0.0, 4.0, "RAPL: package-0")
    some = total([line(), line(None, "gone"), line(None, "gone")])
    assert some == cost.Cost(6.0, 0.0, None, "2 of 3 steps have no figure; gone")
    assert total([line(None, "root")]).joules_note == "root"
    still = total([line(0.0)])  # a virtual machine may show a counter that never moves
    assert still.joules is None and still.joules_note == "counters stood still (RAPL: package-0)"
    earlier = total([{}, line()])
    assert (earlier.processor_seconds, earlier.joules) == (None, None) and "earlier version" in earlier.joules_note


EXAMPLES = [Example((("user", f"a {letter}"), ("assistant", "b"))) for letter in "abcdefgh"]


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_adds_to_what_was_spent(folder, tmp_path, monkeypatch):
    joules = iter(range(0, 10**6, 3))  # 3 J between two readings
    monkeypatch.setattr(cost, "rapl", lambda _: ([Counter("package-0", lambda: next(joules))], "RAPL: package-0"))

    def training(resume):
        model, tokenizer = ql.load(folder, None, dtype=torch.float32, progress=False)
        ql.add_lora(model, r=2)
        settings = Settings(steps=4, batch_size=2, save_every=2, max_length=40)
        return Training(model, tokenizer, EXAMPLES, tmp_path / "run", settings, resume=resume, progress=False)

    run = training(False)
    for made in run:
        if made["step"] == 3:
            run.stop()
    spent = run.result.cost
    assert spent.joules == 9 and spent.processor_seconds > 0 and not (tmp_path / "run" / "result.json").exists()
    found = training(True).run().cost
    assert found.joules == 12 and found.processor_seconds > spent.processor_seconds
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    lines = [json.loads(made) for made in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert result["joules"] == 12 and result["joules_note"] == "RAPL: package-0" and result["gpu_seconds_held"] == 0
    assert result["processor_seconds"] == found.processor_seconds == sum(made["processor_seconds"] for made in lines)
