"""The folder of a run: what lies in it, when a new run may have it, and where an earlier run goes meanwhile.

adapter/      the adapter in PEFT's format           log.jsonl     one line per step: loss, rate, tokens, speed
best/         the one with the lowest held-out loss  checkpoints/  all that is needed to go on (checkpoint.py)
settings.json what decided the run                   result.json   how it ended; written last
qlora-lab.json  the mark that the folder is a run's (ownership.py)
qlora-lab.sha256  checksums of settings.json and, once the run is complete, of all but checkpoints/ (checksums.py)

A file under one of these names that no run wrote is refused, even with `overwrite`; files with other names stay as they
are. Links are followed: a file is moved within its own folder, and so stays on its own disk.

A run that replaces an earlier one sets its files aside in scratch, settings.json first, and keeps them until it has an
adapter of its own. So if a run was killed and left no settings, it had not begun, and the next command puts the earlier
files back (restore_earlier).
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lab.adapters.peft_format import CONFIG, WEIGHTS
from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, replace_sums
from qlora_lab.files.lock import locked_folder, reserved
from qlora_lab.files.out_path import out_folder, resolved
from qlora_lab.files.ownership import MARK, RUN, is_marked, is_marked_otherwise, mark, scratch_name
from qlora_lab.files.replace import replacing_file
from qlora_lab.train.checkpoint import BEST, CHECKPOINT_FILES, FOLDER, forget, restore_best, saved_steps, step_folders

LOG = "log.jsonl"
RECORD = "settings.json"
RESULT = "result.json"
ADAPTER = "adapter"
RUN_FILES = (RECORD, ADAPTER, BEST, FOLDER, LOG, RESULT, SUMS)
WEIGHTS_FILES = (CONFIG, WEIGHTS, SUMS)  # all that a run writes to adapter/ and best/
STARTS = {LOG: b'{"step": 1', RESULT: b'{\n  "ended": ', RECORD: b'{\n  "steps": '}  # the first bytes of our own
EARLIER = "earlier-"  # begins the name of a folder in scratch with the files of an earlier run
_warned: set[Path] = set()  # where earlier runs are kept: this process warns of each place once


def check_free(out: str | Path, overwrite: bool = False, resume: bool | int = False) -> None:
    """Raise FileExistsError if a run may not write to `out`: not a folder, or one with a run or a user's own files.

    With overwrite or resume, `out` may hold a run. Raises ValueError for an empty path, or overwrite with resume.
    """
    out = _checked(out, overwrite, resume)
    if resume is not False and (out / RESULT).exists():
        raise FileExistsError(f"{out} holds a run that is complete: there is nothing to resume")
    if overwrite:
        return
    steps = saved_steps(out)
    if resume is not False:
        if (out / ADAPTER).exists() and not steps:
            raise FileExistsError(f"{out} holds an adapter and no checkpoint to resume from: choose another folder")
        return
    if steps:
        raise FileExistsError(
            f"{out} holds an earlier run, saved at step {steps[-1]}: resume it (resume=True; --resume on the "
            "command line), choose another folder, or overwrite it (overwrite=True; --overwrite)"
        )
    if (out / ADAPTER).exists():
        message = "choose another folder, or overwrite it (overwrite=True; --overwrite on the command line)"
        raise FileExistsError(f"{out} holds an earlier run: {message}")


def _checked(out: str | Path, overwrite: bool, resume: bool | int) -> Path:
    """`out` as a path. Raises if no run could write to it, whatever options it has."""
    out = out_folder(out)
    if out.is_file():
        raise FileExistsError(f"{out} is a file: name a folder for the run")
    if os.path.lexists(out) and not out.is_dir():
        raise FileExistsError(f"{out} is a device, or a link to nothing: name a folder for the run")
    if overwrite and resume is not False:
        raise ValueError("overwrite and resume exclude each other: choose one")
    check_ours(out)
    return out


# ------------------------------------------------------------------------------------------------------ what is a run's


def check_ours(folder: Path) -> None:
    """Raise FileExistsError for the first file under a run's names that no run wrote, or that is another run's."""
    for link in filter(Path.is_symlink, [folder / name for name in RUN_FILES]):
        home = resolved(link).parent
        if home != resolved(folder) and is_marked(home, RUN):
            raise FileExistsError(f"{link} leads into another run, {home}: remove the link, or choose another folder")
    for stranger in _strangers(folder):
        raise FileExistsError(
            f"{stranger} was not written by a run of qlora_lab: move it away, or choose another folder"
        )


def _strangers(folder: Path) -> Iterator[Path]:
    if is_marked_otherwise(folder, RUN):
        yield folder / MARK
    ours = is_marked(folder, RUN)
    for name in (LOG, RECORD, RESULT, SUMS):
        if os.path.lexists(folder / name) and not (ours and _is_of_a_run(folder / name)):
            yield folder / name
    for name in (ADAPTER, BEST):
        set_aside = ours and (folder / name).is_symlink() and not (folder / name).exists()  # what the link led to
        if os.path.lexists(folder / name) and not set_aside:
            yield from _others(folder / name, WEIGHTS_FILES) if ours else [folder / name]
    if os.path.lexists(folder / FOLDER):
        # With an empty folder, or a link to one, a user chooses the place of checkpoints: it is ours from now on.
        yield from [] if ours and (folder / FOLDER).is_dir() else _others(folder / FOLDER, ())
        for step in step_folders(folder):
            yield from _others(step, CHECKPOINT_FILES)


def _is_of_a_run(file: Path) -> bool:
    """Whether the file begins as a run writes it: a user may put a result.json of their own into a run's folder."""
    start = STARTS.get(file.name, b"")
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        begun = opened.read(len(start)).rstrip(b"\0")  # a kill leaves part of a line, a power cut leaves zeros
    return begun == start or (file.name == LOG and start.startswith(begun))


def _others(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """What lies in `folder` besides `names`; `folder` itself if it is not a folder."""
    if not folder.is_dir():
        return [folder]
    return sorted(path for path in folder.iterdir() if path.name not in names)


# ------------------------------------------------------------------------------------------------------ replacing a run


@contextmanager
def reserved_run(out: str | Path, overwrite: bool, resume: bool | int) -> Iterator[None]:
    """Hold the folder while this process prepares a run inside the block, so that rivals are refused at once.

    Raises as check_free and replacing_run do.
    """
    with locked_folder(_checked(out, overwrite, resume), "finetune") as lock, reserved(lock):
        restore_earlier(out_folder(out))
        check_free(out, overwrite, resume)
        yield


@contextmanager
def replacing_run(folder: Path, overwrite: bool = False, resume: bool | int = False) -> Iterator[Path]:
    """Lock `folder`, set an earlier run aside, yield; afterwards put it back if the new run saved nothing.

    Raises BlockingIOError if another process writes to `folder`, and what check_free raises, as the folder may have
    changed since it was checked. Warns of an earlier run that is still set aside, with its place.
    """
    with locked_folder(folder, "finetune"):
        restore_earlier(folder)
        check_free(folder, overwrite, resume)
        scratch = mark(folder, RUN)  # the name of the folder for what is set aside
        disk.sync(folder)
        with _aside(folder, scratch, set_aside=resume is False):
            yield folder


@contextmanager
def _aside(folder: Path, scratch: str, set_aside: bool) -> Iterator[None]:
    places = _places(folder)
    parts = [resolved(path) for path in _parts(folder)] if set_aside else []
    aside = f"{EARLIER}{len(_kept_aside(folder, scratch)) + 1:04}"
    kept = {path: path.parent / scratch / aside / path.name for path in parts}
    try:
        for path in parts:
            disk.make_folder(kept[path].parent)
            disk.rename(path, kept[path])
        yield
    finally:
        moved = [path for path in parts if kept[path].exists()]
        began = len(moved) == len(parts)
        if parts and not (began and ((folder / ADAPTER).exists() or saved_steps(folder))):
            for path in reversed(_parts(folder)) if began else ():  # of the new run; its settings last
                disk.remove(resolved(path))
            _put_back(places, scratch, aside)
        elif (folder / ADAPTER).exists():  # until then the earlier run stays aside, whatever happens
            for place in places:
                disk.remove_if_possible(place / scratch)
        for place in places:
            disk.remove_if_empty(place / scratch)  # it may be missing, or hold an earlier run


def _places(folder: Path) -> set[Path]:
    """The folders where parts of a run lie, links followed; parts that are set aside lie in them too."""
    steps = {resolved(path).parent for path in step_folders(folder)}
    return {resolved(folder / name).parent for name in RUN_FILES} | {resolved(folder / FOLDER)} | steps


def _parts(folder: Path) -> list[Path]:
    """What a run has written: its settings first, its other files and folders, each checkpoint."""
    parts = [folder / name for name in RUN_FILES if name != FOLDER]
    return [path for path in parts if path.exists()] + step_folders(folder)


# ------------------------------------------------------------------------------------------------ a run begins and ends


def rewind(folder: Path, lines: list[dict], record: dict, keep: int) -> None:
    """Make the folder that of a run which made the steps of `lines` and no more; write `record`."""
    step = len(lines)
    steps = saved_steps(folder)
    if step:
        restore_best(folder, step, folder / BEST)
    # Newer checkpoints would outlive the log that belongs to them. A kill within a save leaves one too many.
    newer = [saved for saved in steps if saved > step]
    forget(folder, newer + [saved for saved in steps if saved <= step][:-keep])
    disk.remove(folder / SUMS)  # of what is replaced now
    with replacing_file(folder / LOG) as new:  # without steps after the checkpoint, or half a line
        disk.write_text(new, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    with replacing_file(folder / RECORD) as new:
        disk.write_text(new, json.dumps(record, indent=2) + "\n")
    disk.remove(folder / RESULT)  # the run is not complete any more
    replace_sums(folder, [RECORD])


def write_result(folder: Path, result: dict) -> None:
    """Write the last file of a run, which says that the run is complete, and checksums of all the run made."""
    content = (json.dumps(result, indent=2, allow_nan=False) + "\n").encode()
    files = [folder / name / file for name in (ADAPTER, BEST) for file in WEIGHTS_FILES]
    made = [path.relative_to(folder).as_posix() for path in files if path.is_file()]  # best/ may be missing
    replace_sums(folder, [RECORD, LOG, *made], {RESULT: content})
    with replacing_file(folder / RESULT) as new:
        disk.write_bytes(new, content)


# ------------------------------------------------------------------------------------------------------- after a kill


def restore_earlier(folder: Path) -> None:
    """Remove what a killed process was writing. Put an earlier run back if its successor was killed before it began.

    The caller has the lock. Warns of a run that was put back or, if its successor did begin, of the place where it is.
    """
    scratch = scratch_name(folder) if is_marked(folder, RUN) else None
    if scratch:
        _clear(folder, scratch)
    kept = _kept_aside(folder, scratch) if scratch else []
    if kept and not (folder / RECORD).exists():
        _put_back(_places(folder), scratch, kept.pop())
        cause = "a run that was to replace the one before it was killed before it began"
        warnings.warn(f"{folder}: {cause}: the earlier one is in its place again", stacklevel=2)
    if kept and (place := folder / scratch / kept[-1]) not in _warned:
        _warned.add(place)
        state = f"is kept in {place} until this one has an adapter"
        warnings.warn(f"{folder}: the run before this one {state}", stacklevel=2)


def find_adapter(folder: Path) -> None:
    """If the adapter `folder` is missing because a run was killed, put the earlier run back, or say where it is kept.

    Raises FileNotFoundError if the earlier run is still set aside, and BlockingIOError while its successor runs.
    """
    run = folder.parent
    if folder.exists() or not is_marked(run, RUN) or not _kept_aside(run, scratch_name(run)):
        return
    with locked_folder(run, "generate"):
        if not (run / RECORD).exists():
            restore_earlier(run)
            return
        aside = resolved(folder).parent / scratch_name(run) / _kept_aside(run, scratch_name(run))[-1]
    kept = aside / resolved(folder).name
    raise FileNotFoundError(f"{folder} is not there, as a run was begun anew in {run}: the earlier one is {kept}")


def _kept_aside(folder: Path, scratch: str) -> list[str]:
    """Names of folders in scratch that hold an earlier run, the newest last."""
    kept = [path for place in _places(folder) for path in (place / scratch).glob(f"{EARLIER}*") if any(path.iterdir())]
    return sorted({path.name for path in kept})


def _put_back(places: set[Path], scratch: str, aside: str) -> None:
    paths = [path for place in places for path in (place / scratch / aside).glob("*")]
    for path in sorted(paths, key=lambda path: path.name == RECORD):  # settings last: until then this may be repeated
        target = path.parents[2] / path.name
        disk.remove(target)  # what a successor wrote: its log comes first
        disk.rename(path, target)
    for place in places:
        disk.remove_if_possible(place / scratch / aside)
        disk.remove_if_empty(place / scratch)


def _clear(folder: Path, scratch: str) -> None:
    """Remove what a killed process was writing; what it set aside stays until another run has an adapter."""
    replaced = (folder / RECORD).exists() and (folder / ADAPTER).exists()
    for place in _places(folder):
        for stale in (place / scratch).glob("*"):
            if replaced or not (stale.name.startswith(EARLIER) and any(stale.iterdir())):
                disk.remove(stale)
        disk.remove_if_empty(place / scratch)
