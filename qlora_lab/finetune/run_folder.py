"""The folder of a run: what lies in it, when a new run may have it, and where an earlier one goes meanwhile.

adapter/      the adapter in PEFT's format           log.jsonl     one line a step: loss, rate, tokens, speed
best/         the one with the lowest held-out loss  checkpoints/  all that is needed to go on (checkpoint.py)
settings.json what decided the run                   result.json   how it ended; there once it has
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lab.finetune.checkpoint import BEST, FOLDER, saved_steps

LOG, RECORD, RESULT, ADAPTER = "log.jsonl", "settings.json", "result.json", "adapter"
RUN_FILES = (ADAPTER, BEST, FOLDER, LOG, RECORD, RESULT)


def check_free(out: str | Path, overwrite: bool = False, resume: bool | int = False) -> None:
    """Raise FileExistsError if `out` holds a run that may not be overwritten or resumed, or is a file."""
    out = Path(out)
    if out.is_file():
        raise FileExistsError(f"{out} is a file: name a folder for the run")
    if overwrite and resume is not False:
        raise ValueError("overwrite and resume exclude each other: choose one")
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


@contextmanager
def replacing_run(folder: Path, resume: bool) -> Iterator[Path]:
    """Yields `folder`; an earlier run in it is set aside, and put back if the new one saves nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (path for name in RUN_FILES for path in folder.glob(f".{name}-*")):  # of a process that was killed
        _remove(stale)
    earlier = [] if resume else [name for name in RUN_FILES if (folder / name).exists()]
    aside = Path(tempfile.mkdtemp(prefix=".earlier-", dir=folder)) if earlier else None
    try:
        for name in earlier:
            (folder / name).rename(aside / name)
        yield folder
    finally:
        moved = [name for name in earlier if (aside / name).exists()]
        if aside and not (len(moved) == len(earlier) and ((folder / ADAPTER).exists() or saved_steps(folder))):
            for name in RUN_FILES if len(moved) == len(earlier) else moved:  # what the new run left, if it began
                _remove(folder / name)
            for name in moved:
                (aside / name).rename(folder / name)
            shutil.rmtree(aside)
        elif (folder / ADAPTER).exists():  # until then the earlier run stays aside, whatever happens to this one
            for old in folder.glob(".earlier-*"):
                shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
