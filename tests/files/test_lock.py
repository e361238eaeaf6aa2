"""One command at a time: the second is told who is there, a killed one is followed in silence, nothing stays behind."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qlora_lab.files import lock as locks
from qlora_lab.files.lock import LOCK, clear_after_kill, locked_file, locked_folder, reserved

HOLDER = """
import signal, sys
from qlora_lab.files.lock import locked_folder
with locked_folder(sys.argv[1], "finetune") as lock:
    lock.scratch.mkdir()
    (lock.scratch / "half a wheel").write_bytes(bytes(1000))
    print("has it", flush=True)
    signal.pause()
"""


@pytest.fixture
def holder():
    """Start another process that has the lock of a folder; it is killed in the end."""
    started = []

    def start(folder):
        child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout.readline() == b"has it\n"
        return child

    yield start
    for child in started:
        kill(child)
        child.stdout.close()


def kill(child):
    child.send_signal(signal.SIGKILL)
    child.wait()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_told_who_has_it_and_since_when(holder, tmp_path):
    child = holder(tmp_path / "run")
    held = json.loads((tmp_path / "run" / LOCK).read_text())
    with pytest.raises(BlockingIOError) as error, locked_folder(tmp_path / "run", "quantize"):
        pass
    who = f"process {child.pid} on {held['host']} (finetune) since {held['since']}"
    assert str(error.value) == f"{tmp_path}/run is in use by {who}: wait until it has ended, or name another place"


def test_a_killed_process_is_followed_in_silence_and_its_scratch_goes(holder, tmp_path):
    folder = tmp_path / "run"
    kill(holder(folder))
    assert len(names(folder)) == 2
    (folder / f"{locks.scratch_name()}").mkdir()  # of nobody who wrote it down
    with locked_folder(folder, "finetune") as lock:
        assert len(names(folder)) == 2 and json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        assert not lock.scratch.exists()
    assert len(names(folder)) == 1


def test_what_a_living_process_writes_is_left_alone(holder, tmp_path):
    child = holder(tmp_path / "run")
    clear_after_kill(tmp_path / "run", "fetch")  # the lock of the folder, not of one beside it
    before = names(tmp_path / "run")
    with pytest.raises(BlockingIOError), locked_folder(tmp_path / "run", "finetune"):
        pass
    assert names(tmp_path / "run") == before and child.poll() is None


def test_one_process_has_it_once(tmp_path):
    """Two runs in one notebook, in one thread or in two."""
    said = "is in use by this very process .finetune. since"
    refused = []

    def second():
        with pytest.raises(BlockingIOError, match=said) as error, locked_folder(tmp_path, "finetune"):
            pass
        refused.append(error)

    with locked_folder(tmp_path, "finetune"):
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 2 and names(tmp_path) == []


def test_two_names_of_one_folder_have_one_lock(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "file.jsonl").touch()
    (tmp_path / "file link").symlink_to(tmp_path / "file.jsonl")
    for take, a, b in ((locked_folder, "folder", "link"), (locked_file, "file.jsonl", "file link")):
        with take(tmp_path / a, "sweep"), pytest.raises(BlockingIOError), take(tmp_path / b, "sweep"):
            pass
        with take(tmp_path / a, "sweep"), take(tmp_path, "sweep"):  # another folder
            pass


def test_folders_that_it_had_to_make_go_where_nothing_came(tmp_path):
    with locked_folder(tmp_path / "a" / "b" / "c", "finetune"):
        assert (tmp_path / "a" / "b" / "c" / LOCK).is_file()
    assert names(tmp_path) == []
    with locked_folder(tmp_path / "a" / "b" / "c", "finetune"):
        (tmp_path / "a" / "log.jsonl").touch()
    assert names(tmp_path / "a") == ["log.jsonl"]
    (tmp_path / "empty").mkdir()  # it was there before
    with locked_folder(tmp_path / "empty", "finetune"):
        pass
    assert names(tmp_path) == ["a", "empty"]


@pytest.mark.parametrize("content", [b"notes", b"{}", b'{"application": "another"}', bytes(9), b"[" * 99_999])
def test_a_users_file_of_that_name_is_refused_and_stays(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    said = f"{LOCK} was not written by qlora_lab: move it away"
    with pytest.raises(FileExistsError, match=said), locked_folder(tmp_path, "finetune"):
        pass
    assert (tmp_path / LOCK).read_bytes() == content


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_no_link_folder_or_fifo_is_opened_as_a_lock(tmp_path, kind):
    (tmp_path / "notes").write_bytes(b"")
    make = {"link": lambda path: path.symlink_to(tmp_path / "notes"), "folder": Path.mkdir, "fifo": os.mkfifo}
    make[kind](tmp_path / LOCK)
    said = f"{LOCK} was not written by qlora_lab"
    with pytest.raises(FileExistsError, match=said), locked_folder(tmp_path, "finetune"):
        pass
    assert names(tmp_path) == [LOCK, "notes"] and (tmp_path / "notes").read_bytes() == b""


def test_a_lock_names_no_other_folder_as_its_scratch(tmp_path):
    (tmp_path / "mine").mkdir()
    content = {"application": "qlora_lab lock", "scratch": ["mine", "../x", 3, ".qlora-lab-" + 32 * "g"]}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(json.dumps(content))
    with locked_folder(tmp_path / "run", "finetune"):
        pass
    assert (tmp_path / "mine").is_dir() and names(tmp_path / "run") == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "notes").touch()
    for path in (tmp_path / "notes", tmp_path / "notes" / "run"):
        said = "cannot be made because a file is in the way: name another folder"
        with pytest.raises(FileExistsError, match=said), locked_folder(path, "finetune"):
            pass


def test_a_disk_that_takes_a_part_gets_the_rest(tmp_path, monkeypatch):
    """Half a line would be refused as a user's file, once its process is killed."""
    write = os.write
    monkeypatch.setattr(locks.os, "write", lambda handle, line: write(handle, line[:100]))
    with locked_folder(tmp_path, "finetune"):
        assert json.loads((tmp_path / LOCK).read_text())["command"] == "finetune"


def test_a_link_to_itself_is_named(tmp_path):
    """Path.resolve raised RuntimeError for it, which the command line took for a bug."""
    (tmp_path / "loop").symlink_to("loop")
    for take in (locked_folder, locked_file):
        for path in (tmp_path / "loop", tmp_path / "loop" / "run"):
            with pytest.raises(OSError, match=f"circle.*{path}|symbolic links.*{path}"), take(path, "finetune"):
                pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says that a folder in it cannot be found")
def test_a_folder_that_can_never_be_made_is_not_tried_for_ever(monkeypatch):
    monkeypatch.setattr(locks, "GRACE", 0.1)
    said = "^/proc/run cannot be made: name another place$"
    with pytest.raises(FileNotFoundError, match=said), locked_folder("/proc/run", "finetune"):
        pass


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only")]
)
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, error):
    monkeypatch.setattr(locks.os, "open", lambda *_: (_ for _ in ()).throw(error))
    said = f"{tmp_path} cannot be written to .{error.strerror}.: name another place"
    with pytest.raises(type(error), match=said), locked_folder(tmp_path, "finetune"):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    said = "cannot be locked .No locks available.: let no other command write there"
    with pytest.warns(UserWarning, match=said), locked_folder(tmp_path, "finetune"):
        pass
    assert names(tmp_path) == []


def test_the_one_that_waits_is_told_and_gets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "QUIET", 0)
    inside, done = threading.Event(), threading.Event()

    def first():
        with locked_file(tmp_path / "model", "fetch"):
            inside.set()
            done.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with pytest.warns(
        UserWarning, match=r"model is in use by .* \(fetch\) since .*: waiting until it has ended"
    ) as told:
        threading.Timer(0.1, done.set).start()
        with locked_file(tmp_path / "model", "fetch", wait=True):
            assert not thread.is_alive() or done.is_set()
    thread.join()
    assert len(told) == 1 and names(tmp_path) == []


# --------------------------------------------------------------------------------------------------------- reservations


def test_what_is_reserved_is_for_one_at_a_time(holder, tmp_path):
    with locked_folder(tmp_path, "finetune") as own, reserved(own):
        for _ in range(2):
            with locked_folder(tmp_path, "finetune") as lock:
                assert lock is own
                with pytest.raises(BlockingIOError), locked_folder(tmp_path, "finetune"):
                    pass
        with locked_folder(tmp_path, "finetune") as lock, reserved(lock), locked_folder(tmp_path, "finetune"):
            pass  # a library within a command
        with locked_folder(tmp_path, "finetune") as lock:
            assert lock is own
    assert names(tmp_path) == [] and not locks._reserved and not locks._held


# ---------------------------------------------------------------------------------------------------------------- forks


def test_a_forked_child_neither_has_the_lock_nor_keeps_it(tmp_path):
    """A child that outlives its parent would be a holder that nobody can find."""
    end, go = os.pipe(), os.pipe()
    parent = os.fork()
    if not parent:
        taken = locked_folder(tmp_path, "finetune")
        taken.__enter__()
        if not os.fork():
            with_lock = bytes([len(locks._held)])
            os.write(end[1], with_lock)
            os.read(go[0], 1)
            taken.__exit__(None, None, None)  # removes nothing
            os.write(end[1], bytes([(tmp_path / LOCK).exists()]))
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(end[0], 1) == b"\0"
    with locked_folder(tmp_path, "finetune"):  # while the child lives
        os.write(go[1], b"!")
        assert os.read(end[0], 1) == b"\1"
    for handle in (*end, *go):
        os.close(handle)


# -------------------------------------------------------------------------------------------------------------- many


def enter_often(folder, times, results):
    entered = 0
    for _ in range(times):
        try:
            with locked_folder(folder, "finetune"):
                (folder / "inside").touch(exist_ok=False)  # FileExistsError: two were inside
                (folder / "inside").unlink()
                entered += 1
        except BlockingIOError:
            pass
    results.put(entered)


@pytest.mark.long
@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_rivals_are_never_both_inside_and_nothing_is_left(tmp_path, times):
    """The lock's file and its folder are made and removed all the time: a lock on a file without a name would show."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=enter_often, args=(tmp_path / "run", times, results)) for _ in range(3)]
    for child in children:
        child.start()
    entered = [results.get() for _ in children]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0] and max(entered) > 0
    # whoever made the folder finds another's lock in it at times, and leaves it
    assert not [path for path in tmp_path.rglob("*") if path != tmp_path / "run"]


def test_a_folder_that_nobody_can_make_is_told_and_not_waited_for(tmp_path, monkeypatch):
    def nowhere(*_, **__):  # what Linux says of /proc/x
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(Path, "mkdir", nowhere)
    monkeypatch.setattr(locks, "GRACE", 0.1)
    with (
        pytest.raises(FileNotFoundError, match="run cannot be made: name another"),
        locked_folder(tmp_path / "run", "x"),
    ):
        pass


def test_the_lock_of_another_user_is_named_and_not_the_folder(tmp_path, monkeypatch):
    (tmp_path / LOCK).touch()

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(locks.os, "open", denied)
    with (
        pytest.raises(PermissionError, match=f"{LOCK} is the lock of another user .*: remove it if no command"),
        locked_folder(tmp_path, "finetune"),
    ):
        pass
