"""What reaches a disk: by one home only, whole or not at all, never without a name; a full disk is the disk's error."""

import ast
import errno
import os
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

import qlora_lab as ql
from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.files import disk, tensor_file
from qlora_lab.files.out_path import check_apart
from qlora_lab.files.replace import replace_bytes, replace_text, replacing_folder
from qlora_lab.files.tensor_file import save_tensors
from tests.faults import disk_faults

ROOM = Path(ql.__file__).parent
NAMES = "write_text write_bytes rename renames unlink rmdir mkdir makedirs touch fsync symlink_to hardlink_to truncate "
NAMES += "rmtree copy2 copyfile copytree copymode mkdtemp mkstemp TemporaryDirectory TemporaryFile savefig tofile "
NAMES += "NamedTemporaryFile save_file serialize_file"
EXCEPTIONS = {
    ("files/lock.py", "mkdir"): "the lock makes its own folder, and removes it",
    ("files/lock.py", "unlink"): "the lock's own file",
    ("files/lock.py", "fsync"): "by number: the file that is locked",
    ("gpu_code/aot.py", "TemporaryDirectory"): "what a compiler leaves, in the system's temporary folder",
    ("gpu_code/aot.py", "write_bytes"): "the same",
    ("gpu_code/aot.py", "open"): "the same",
    ("measure/best_plan.py", "open"): "/dev/null",
    ("model/fetch.py", "open"): "what pip says, in scratch",
    ("files/tensor_file.py", "save_file"): "the home of this one",
    ("train/resident.py", "write_text"): "/proc",
    ("measure/seeing_rows.py", "TemporaryFile"): "what a run prints",
    ("measure/seeing_rows.py", "rmtree"): "models of its own, in its work folder",
    ("measure/seeing_rows.py", "save_file"): "a projector of its own, in its work folder",
    ("files/results_file.py", "truncate"): "a row that was torn off, of an open file",
    ("show/figure.py", "savefig"): "into memory",
    ("doctor/lab.py", "open"): "what JupyterLab says, in the system's temporary folder",
    ("doctor/machine.py", "TemporaryDirectory"): "where the check works",
    ("doctor/machine.py", "TemporaryFile"): "the question whether a folder takes a file",
}


def writers(path: Path) -> set[str]:
    """Names of calls in a file that write, rename or remove, besides those of files/disk.py."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        name = node.func.attr if owner else getattr(node.func, "id", "")
        if isinstance(owner, ast.Name) and owner.id == "disk":
            continue
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        writes = name == "open" and any(re.fullmatch(r"[rwaxbt+]*[wax+][bt+]*", mode) for mode in modes)
        moves = name == "replace" and (len(node.args) == 1 or (isinstance(owner, ast.Name) and owner.id == "os"))
        copies = isinstance(owner, ast.Name) and owner.id == "shutil" and name not in ("which", "disk_usage")
        if name in NAMES.split() or writes or (moves and not node.keywords) or copies:
            found.add(name)
    return found


@pytest.mark.long
def test_nothing_else_writes_to_a_disk():
    found = {
        (path.relative_to(ROOM).as_posix(), name)
        for path in ROOM.rglob("*.py")
        if path.name != "disk.py"
        for name in writers(path)
    }
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "line",
    ["p.write_text('x')", "open(p, 'w')", "p.open('ab')", "p.replace(q)", "os.replace(p, q)", "save_file({}, p)"],
)
def test_the_test_above_can_fail(tmp_path, line):
    (tmp_path / "a.py").write_text(line)
    assert writers(tmp_path / "a.py")
    (tmp_path / "a.py").write_text("open(p)\ndisk.write_text(p, 'x')\n'a'.replace('a', 'b')\np.open('rb')")
    assert not writers(tmp_path / "a.py")


# ------------------------------------------------------------------------------------------------- never without a name


@pytest.fixture(params=["exchange", *disk.NO_EXCHANGE], ids=["exchange", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EPERM"])
def outcome(request, monkeypatch, tmp_path):
    """The system exchanges two names, or refuses in each way that means that it cannot."""
    if request.param == "exchange":
        for name in "ab":
            (tmp_path / name).mkdir()
        if not disk.exchange(tmp_path / "a", tmp_path / "b"):
            pytest.skip("this file system cannot exchange names")
        return True

    def refused(a, b):
        raise OSError(request.param, os.strerror(request.param), str(a))

    monkeypatch.setattr(disk, "_renameat2", refused)
    return False


def test_a_folder_is_replaced_in_either_way(tmp_path, outcome):
    for content in ("first", "second"):
        with replacing_folder(tmp_path / "adapter") as new:
            (new / content).write_text(content)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["second"]
    assert not list(tmp_path.glob(".*"))


def test_names_change_places_and_keep_what_they_hold(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    if disk.exchange(tmp_path / "a", tmp_path / "b"):
        assert [(tmp_path / name / "content").read_text() for name in "ab"] == ["b", "a"]


def test_an_error_that_is_none_of_the_systems_limits_is_raised(tmp_path):
    (tmp_path / "a").mkdir()
    if disk._exchanging():
        with pytest.raises(FileNotFoundError, match="No such file or directory: .*a.* -> .*nowhere"):
            disk.exchange(tmp_path / "a", tmp_path / "nowhere")


def test_an_older_c_library_has_no_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_exchanging", lambda: None)
    assert disk.exchange(tmp_path / "a", tmp_path / "b") is False


def read_while_saving(folder, save, saves):
    """How often a reader, who looks without pause, finds no whole adapter; and how often it looked."""
    missed, looked, done = [], [], threading.Event()

    def read():
        while not done.is_set():
            looked.append(1)
            try:
                with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
                    file.keys()
                (folder / "adapter_config.json").read_text()
            except (OSError, SafetensorError) as error:
                missed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(saves):
        save()
    done.set()
    reader.join()
    return missed, len(looked)


@pytest.mark.long
@pytest.mark.parametrize("saves", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_reader_always_finds_a_whole_adapter(tmp_path, tiny_llama, saves):
    model, folder = add_lora(tiny_llama, r=2), tmp_path / "adapter"
    save_adapter(model, folder)
    (tmp_path / "b").mkdir()
    if not disk.exchange(folder, tmp_path / "b") or not disk.exchange(folder, tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    missed, looked = read_while_saving(folder, lambda: save_adapter(model, folder), saves)
    assert not missed and looked >= saves


# --------------------------------------------------------------------------------------------------------- full disks

REFUSALS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG]


@pytest.mark.parametrize("number", REFUSALS, ids=lambda number: errno.errorcode[number])
def test_what_safetensors_says_of_the_disk_is_the_disks(tmp_path, monkeypatch, number):
    def refusing(*_, **__):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(tensor_file, "save_file", refusing)
    with pytest.raises(OSError) as error:
        save_tensors({}, tmp_path / "x.safetensors")
    assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "x.safetensors"))


def test_another_error_of_safetensors_is_a_bug(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise SafetensorError("Error while serializing: invalid header")

    monkeypatch.setattr(tensor_file, "save_file", broken)
    with pytest.raises(SafetensorError):
        save_tensors({}, tmp_path / "x.safetensors")


def test_safetensors_says_it_so_today(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_tensors({"x": torch.ones(1)}, tmp_path / "nowhere" / "x.safetensors")


def test_half_a_write_is_followed_by_the_rest():
    class Part:
        name, written = "file", b""

        def write(self, data):
            self.written += bytes(data[:3])
            return min(3, len(data))

    disk.write_all(file := Part(), b"ten letters")
    assert file.written == b"ten letters"


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True])
def test_every_fault_of_save_adapter_leaves_the_old_one_or_the_new(tmp_path, tiny_llama, tokenizer, lasting):
    """All points of it, at a first save and over an earlier adapter."""
    model, root = add_lora(tiny_llama, r=2), tmp_path / "work"
    other = tmp_path / "other"
    torch.nn.init.ones_(next(p for p in model.parameters() if p.requires_grad))
    save_adapter(model, other)
    old = _bytes(other)
    torch.nn.init.zeros_(next(p for p in model.parameters() if p.requires_grad))
    save_adapter(model, tmp_path / "new")
    new = _bytes(tmp_path / "new")
    assert old != new
    for before in (None, other):
        for number in range(1, 100):
            root.mkdir()
            if before:
                disk.copy_folder(before, root / "adapter")
            with disk_faults(root, at=number, lasting=lasting) as seen:
                try:
                    save_adapter(model, root / "adapter")
                except OSError as error:
                    assert error.errno == errno.ENOSPC and (error.filename or str(root) in str(error))
            assert not (root / "adapter").exists() or _bytes(root / "adapter") in (old, new)
            assert before is None or (root / "adapter").exists()
            save_adapter(model, root / "adapter")
            assert _bytes(root / "adapter") == new
            load_adapter(model, root / "adapter")
            disk.remove(root)
            if len(seen.operations) < number:
                break
        assert 15 < number < 99


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_file_is_replaced_whole_through_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    replace_text(tmp_path / "link.txt", "größer")
    assert (tmp_path / "real.txt").read_text("utf-8") == "größer" and (tmp_path / "link.txt").is_symlink()
    replace_bytes(tmp_path / "link.txt", b"\xff")
    assert (tmp_path / "real.txt").read_bytes() == b"\xff" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["save_adapter", "save_pretrained"])
def test_an_adapter_is_not_written_into_its_model(tmp_path, tiny_llama, kind):
    model = add_lora(tiny_llama, r=2)
    model.name_or_path = str(tmp_path / "model")
    save = partial(save_adapter, model) if kind == "save_adapter" else model.save_pretrained
    save(tmp_path / "model" / "adapter")  # no model lies there
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lies inside .*model, which is an input: choose a place outside of it"):
        save(tmp_path / "model" / "other")
    with pytest.raises(ValueError, match="lies inside|is not part of an adapter"):
        save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["adapter", "config.json"]
    save(tmp_path / "adapter")


def test_what_is_written_lies_apart_from_what_is_read(tmp_path):
    check_apart(tmp_path / "org/name/out", tmp_path / "org/name")  # a name on a hub is no folder
    (tmp_path / "a/model").mkdir(parents=True)
    for out in ("a/model", "a/other", "a/modelled/b"):
        check_apart(tmp_path / out, tmp_path / "a/model")
    for out, said in (("a/model/b/c", "lies inside"), ("a", "contains"), ("a/x/..", "contains")):
        with pytest.raises(ValueError, match=f"{said} .*model, which is an input: choose a"):
            check_apart(tmp_path / out, tmp_path / "other", tmp_path / "a/model")
