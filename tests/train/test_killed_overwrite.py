"""A run that replaces another and is killed, at whichever step: the earlier one is whole, in its place or where we say.

Only files are moved here, so their content need not be a run's.
"""

import os
import re
import shutil
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from qlora_lab import cli
from qlora_lab.files.lock import LOCK
from qlora_lab.files.ownership import MARK, RUN, mark
from qlora_lab.files.replace import replacing_folder
from qlora_lab.train import run_folder
from qlora_lab.train.run_folder import STARTS, find_adapter, replacing_run, reserved_run
from tests.faults import disk_faults

ADAPTER = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
EARLIER = ["settings.json", *ADAPTER, "best/adapter_model.safetensors", "log.jsonl", "result.json"]
EARLIER += ["checkpoints/step-00000001/state.safetensors", "checkpoints/step-00000002/state.json"]
KEPT = re.compile(r"the run before this one is kept in (\S+) until this one has an adapter")
GONE = 9


def write(folder, names, whose):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STARTS.get(name, b"").decode() + f"{name} of the {whose} run")


def contents(folder):
    ours = (MARK, LOCK)
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name not in ours}


@pytest.fixture(params=["plain", "links to another disk"])
def run(tmp_path, request):
    """A folder with a complete run."""
    folder = tmp_path / "run"
    write(folder, EARLIER, "earlier")
    mark(folder, RUN)
    if request.param != "plain":
        for name in ("adapter", "checkpoints"):
            (folder / name).rename(tmp_path / f"disk-{name}")
            (folder / name).symlink_to(tmp_path / f"disk-{name}")
    return folder


def seen(run):
    """The files of the run by their names, through links, without what is hidden."""
    files = {name: run / name for name in [*EARLIER, "best/adapter_config.json"]}
    return {name: path.read_text() for name, path in files.items() if path.is_file()}


def hidden(run):
    return list(run.parent.rglob(".*"))


def replace(run, upto):
    """Make a new run in the place of the earlier one, as the trainer writes it; it fails after `upto`."""
    with replacing_run(run, overwrite=True):
        write(run, ["log.jsonl", "settings.json"], "new")
        if upto == EVALUATED:
            write(run, ["best/adapter_model.safetensors", "best/adapter_config.json"], "new")
            raise FloatingPointError
        with replacing_folder(run / "adapter") as new:
            for name in ADAPTER:
                (new / Path(name).name).write_text(f"{name} of the new run")
        write(run, ["result.json"], "new")


def killed(function, root, number):
    """Whether `function` was killed right before its change number `number` beneath `root`: a fork that is gone."""
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, GONE)
        return code == GONE
    warnings.simplefilter("ignore")
    try:
        with suppress(FloatingPointError), disk_faults(root, at=number, fail=lambda *_: os._exit(GONE)):
            function()
        os._exit(0)
    finally:
        os._exit(1)


def next_command(run, **options):
    """What it warns of; whether it is then refused."""
    run_folder._warned.clear()  # as in a new process
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with reserved_run(run, **{"overwrite": False, "resume": False} | options):
                refused = False
        except FileExistsError:
            refused = True
    return [str(one.message) for one in told], refused


slow = partial(pytest.param, marks=pytest.mark.slow)
EVALUATED = "its first evaluation"


@pytest.mark.long
@pytest.mark.parametrize(
    "upto, options, stride",
    [
        ("the end", {}, 23),
        slow("the end", {"overwrite": True}, 1),
        slow(EVALUATED, {"resume": True}, 1),
    ],
)
def test_the_earlier_run_is_whole_whenever_the_new_one_is_killed(run, tmp_path, upto, options, stride):
    earlier, places = seen(run), set()
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"), symlinks=True)
    assert len(earlier) == len(EARLIER)
    for number in range(1, 200, stride):
        if not killed(lambda: replace(run, upto), tmp_path, number):
            break
        told, _ = next_command(run, **options)
        now = seen(run)
        if now == earlier:
            places.add("in its place")
            assert not told or "the earlier one is in its place again" in told[0]
        elif (run / "adapter").is_dir():
            places.add("replaced")
            assert now["settings.json"].endswith("settings.json of the new run") and now[ADAPTER[1]].endswith("new run")
            assert not told and not hidden(run)
        else:
            places.add("kept")
            (line,) = told
            (kept,) = (Path(place) for place in KEPT.findall(line))
            assert (kept / "settings.json").read_text() == earlier["settings.json"]
            values = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
            assert set(earlier.values()) <= set(values)
        replace(run, "the end")  # and the next success leaves nothing hidden behind
        assert not hidden(run) and sorted(seen(run)) == sorted([*ADAPTER, "log.jsonl", "result.json", "settings.json"])
        shutil.rmtree(tmp_path)
        shutil.copytree(tmp_path.with_name(f"{tmp_path.name}-copy"), tmp_path, symlinks=True)
    ends = {"in its place", "kept"} | ({"replaced"} if upto == "the end" else set())
    assert places == ends or (stride > 1 and places)
    assert 20 < number < 199


@pytest.mark.slow
def test_two_kills_in_a_row_lose_nothing(run, tmp_path):
    earlier = seen(run)
    copy = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"), symlinks=True)
    for first in range(1, 120, 17):  # seven moments, and for each of them four: the test above has every moment
        for second in range(1, 120, 31):
            killed(lambda: replace(run, "the end"), tmp_path, first)
            replaced = seen(run).get(ADAPTER[1], "").endswith("new run")
            killed(lambda: replace(run, "the end"), tmp_path, second)
            told, _ = next_command(run)
            found = {path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
            if not (run / "adapter").exists():
                assert KEPT.findall(told[-1])
                assert f"{ADAPTER[1]} of the new run" in found if replaced else set(earlier.values()) <= found
            assert not (run / "adapter").exists() or len({seen(run)[name].split()[-2] for name in ADAPTER}) == 1
            replace(run, "the end")
            assert not hidden(run)
            shutil.rmtree(tmp_path)
            shutil.copytree(copy, tmp_path, symlinks=True)


# ------------------------------------------------------------------------------------------------- the adapter is asked


def set_aside(run):
    with replacing_run(run, overwrite=True):
        os._exit(GONE)


def begun(run):
    with replacing_run(run, overwrite=True):
        write(run, ["log.jsonl", "settings.json"], "new")
        os._exit(GONE)


def fork(function, *arguments):
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == GONE
    else:
        function(*arguments)


@pytest.mark.long
def test_an_adapter_whose_successor_never_began_is_there_again_when_it_is_asked_for(run):
    earlier = seen(run)
    fork(set_aside, run)
    assert seen(run) == {}
    with pytest.warns(UserWarning, match="run: a run that was to replace the one before it was killed before it began"):
        find_adapter(run / "adapter")
    assert seen(run) == earlier
    find_adapter(run / "adapter")  # nothing to do, and nothing to say


@pytest.mark.long
def test_an_adapter_that_is_kept_aside_is_told(run, capsys):
    fork(begun, run)
    assert cli.main(["generate", "why?", "--adapter", str(run / "adapter"), "--quiet"]) == 2
    said = capsys.readouterr().err
    (kept,) = re.findall(r"adapter is not there, as a run was begun anew in \S+: the earlier one is (\S+)\n", said)
    assert (
        said.count("\n") == 1 and (Path(kept) / Path(ADAPTER[0]).name).read_text() == f"{ADAPTER[0]} of the earlier run"
    )


@pytest.mark.parametrize("name", ["adapter", "run/adapter"])
def test_a_folder_without_an_earlier_run_is_none_of_its_business(tmp_path, name):
    find_adapter(tmp_path / name)
    write(tmp_path, ["run/.qlora-lab-0/earlier-0001/settings.json"], "user's")
    find_adapter(tmp_path / name)
    assert contents(tmp_path) == {"run/.qlora-lab-0/earlier-0001/settings.json": contents(tmp_path).popitem()[1]}


def test_an_adapter_is_not_looked_for_while_its_run_is_replaced(run):
    with replacing_run(run, overwrite=True), pytest.raises(BlockingIOError, match=r"\(finetune\) since"):
        find_adapter(run / "adapter")
