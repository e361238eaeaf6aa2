"""The folder of a run: what lies in it, when a new run may have it, and where an earlier one goes meanwhile.

adapter/      the adapter in PEFT's format           log.jsonl     one line a step: loss, rate, tokens, speed
best/         the one with the lowest held-out loss  checkpoints/  all that is needed to go on (checkpoint.py)
settings.json what decided the run                   result.json   how it ended; there once it has
qlora-lab.json  the mark that the folder is a run's (ownership.py)
qlora-lab.sha256  checksums of settings.json and, once the run is complete, of all but checkpoints/ (checksums.py)

What lies there under one of these names and was not written by a run is refused by name, with `overwrite` as well; what
has another name is left alone. Links are followed: files are moved beside where they are, so on their own disk.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_lab.finetune.checkpoint import BEST, CHECKPOINT_FILES, FOLDER, saved_steps, step_folders
from qlora_lab.finetune.checksums import SUMS
from qlora_lab.finetune.files import sync
from qlora_lab.finetune.ownership import MARK, RUN, is_marked, is_marked_otherwise, mark, read_object
from qlora_lab.finetune.peft_format import CONFIG, WEIGHTS
from qlora_lab.quant.out_path import out_path

LOG, RECORD, RESULT, ADAPTER = "log.jsonl", "settings.json", "result.json", "adapter"
RUN_FILES = (ADAPTER, BEST, FOLDER, LOG, RECORD, RESULT, SUMS)
WEIGHTS_FILES = (CONFIG, WEIGHTS, SUMS)  # all that a run writes to adapter/ and best/
EARLIER = "earlier-"  # in scratch: what the files of an earlier run are set aside in


def check_free(out: str | Path, overwrite: bool = False, resume: bool | int = False) -> None:
    """Raise FileExistsError if a run may not write to `out`: it is no folder, or holds a run, or a user's own files.

    A run that may be overwritten or resumed is free. ValueError: an empty path, or overwrite with resume.
    """
    out = out_path(out)
    if out.is_file():
        raise FileExistsError(f"{out} is a file: name a folder for the run")
    if os.path.lexists(out) and not out.is_dir():
        raise FileExistsError(f"{out} is a device, or a link to nothing: name a folder for the run")
    if overwrite and resume is not False:
        raise ValueError("overwrite and resume exclude each other: choose one")
    check_ours(out)
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
            f"{out} holds an earlier run, saved at step {steps[-1]}: go on with it (resume=True; --resume on the "
            "command line), choose another folder, or overwrite it (overwrite=True; --overwrite)"
        )
    if (out / ADAPTER).exists():
        message = "choose another folder, or overwrite it (overwrite=True; --overwrite on the command line)"
        raise FileExistsError(f"{out} holds an earlier run: {message}")


# ------------------------------------------------------------------------------------------------------ what is a run's


def check_ours(folder: Path) -> None:
    """Raise FileExistsError, naming it, for the first thing under a run's names that no run wrote."""
    for stranger in _strangers(folder):
        raise FileExistsError(
            f"{stranger} was not written by a run of qlora_lab: move it away, or choose another folder"
        )


def _strangers(folder: Path) -> Iterator[Path]:
    if is_marked_otherwise(folder, RUN):
        yield folder / MARK
    ours = is_marked(folder, RUN) or _is_unmarked_run(folder)
    for name in (LOG, RECORD, RESULT, SUMS):
        if os.path.lexists(folder / name) and not (ours and (folder / name).is_file()):
            yield folder / name
    for name in (ADAPTER, BEST):
        if os.path.lexists(folder / name):
            yield from _others(folder / name, WEIGHTS_FILES) if ours else [folder / name]
    if os.path.lexists(folder / FOLDER):
        # an empty folder, or a link to one, is how a user says where checkpoints are to be: ours from now on
        yield from [] if ours and (folder / FOLDER).is_dir() else _others(folder / FOLDER, ())
        for step in step_folders(folder):
            yield from _others(step, CHECKPOINT_FILES)


def _others(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """What lies in `folder` besides `names`; the folder itself, where it is none."""
    if not folder.is_dir():
        return [folder]
    return sorted(path for path in folder.iterdir() if path.name not in names)


def _is_unmarked_run(folder: Path) -> bool:
    """Whether a version that wrote no mark began a run here: nobody else writes such settings."""
    settings = read_object(folder / RECORD)
    return isinstance(settings.get("base_sha256"), str) and isinstance(settings.get("adapter"), dict)


# ------------------------------------------------------------------------------------------------------ replacing a run


@contextmanager
def replacing_run(folder: Path, resume: bool) -> Iterator[Path]:
    """Yields `folder`; an earlier run in it is set aside, and put back if the new one saves nothing.

    Raises FileExistsError for what no run wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_ours(folder)
    scratch = mark(folder, RUN)
    sync(folder)
    places = {path.resolve().parent for path in _parts(folder)} | {folder.resolve(), (folder / FOLDER).resolve()}
    places = [place / scratch for place in places]
    for stale in (path for place in places for path in place.glob("*")):  # of a process that was killed
        if not stale.name.startswith(EARLIER):  # the run that it was to replace stays until another has an adapter
            shutil.rmtree(stale)
    earlier = [] if resume else [path.resolve() for path in _parts(folder)]
    aside = f"{EARLIER}{secrets.token_hex(4)}"
    kept = {path: path.parent / scratch / aside / path.name for path in earlier}
    try:
        for path in earlier:
            kept[path].parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept[path])
        yield folder
    finally:
        moved = [path for path in earlier if kept[path].exists()]
        began = len(moved) == len(earlier)
        if earlier and not (began and ((folder / ADAPTER).exists() or saved_steps(folder))):
            for path in _parts(folder) if began else moved:  # what the new run left, if it began
                _remove(path.resolve())
            for path in moved:
                kept[path].rename(path)
            for place in places:
                shutil.rmtree(place / aside, ignore_errors=True)
        elif (folder / ADAPTER).exists():  # until then the earlier run stays aside, whatever happens to this one
            for place in places:
                shutil.rmtree(place, ignore_errors=True)
        for place in places:
            with suppress(OSError):  # it is not there, or holds an earlier run
                place.rmdir()


def _parts(folder: Path) -> list[Path]:
    """What a run has written: its files and folders, and each checkpoint for itself."""
    parts = [folder / name for name in RUN_FILES if name != FOLDER]
    return [path for path in parts if path.exists()] + step_folders(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
