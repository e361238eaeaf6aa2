"""Three folders that are not ours, in which commands of ours must change nothing.

trainer: what transformers' Trainer leaves with save_steps=500, TensorBoard and `trainer.save_model()`; its weights are
those of the model that is given. user: a person's own files under all names that we use. unmarked: most of them.
"""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

STATE = {"best_metric": None, "epoch": 1.0, "global_step": 500, "log_history": [{"loss": 2.5, "step": 500}]}
CHECKPOINT = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
OUR_FILES = ["settings.json", "result.json", "log.jsonl", "plan.json", "rows.jsonl", "qlora-lab.json"]
OUR_FILES += ["quantizing.json", "qlora-lab.sha256", "SHA256SUMS", "source.json", "README.md"]
OUR_FILES += ["model.safetensors.index.json"]
OUR_FOLDERS = ["best", "adapter", "checkpoints/checkpoint-500", "checkpoints/step-00000020", ".best-practices"]
OUR_FOLDERS += [".adapter-old", ".earlier-work", ".qlora-lab-0123456789abcdef0123456789abcdef", "smollm2-135m"]
CONTENTS = ["state.safetensors", "state.json", "adapter_config.json", "adapter_model.safetensors", "notes.md"]


def trainer(home: Path, model: Path) -> Path:
    """The output folder of a Trainer."""
    for folder in (home, home / "checkpoint-500", home / "checkpoint-1000"):
        shutil.copytree(model, folder)
        (folder / "training_args.bin").write_bytes(pickle.dumps({"output_dir": str(home)}))
        if folder != home:
            (folder / "trainer_state.json").write_text(json.dumps(STATE))
            for name in CHECKPOINT:
                (folder / name).write_bytes(b"PK\3\4 of " + name.encode())
    (home / "README.md").write_text("---\nlibrary_name: transformers\n---\n# My model\n")
    (home / "all_results.json").write_text('{"train_loss": 2.5}')
    events = home / "runs" / "Nov26_18-57-08_host" / "events.out.tfevents.1764183428.host.1.0"
    events.parent.mkdir(parents=True)
    events.write_bytes(bytes(range(256)))
    return home


def user(home: Path, model: Path) -> Path:
    """A person's own folder: `model` is not needed."""
    names = [*OUR_FILES, *(f"{folder}/{name}" for folder in OUR_FOLDERS for name in CONTENTS), "notes/thesis.tex"]
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(f'{{"application": "my own", "file": "{name}"}}\n')
    return home


def unmarked(home: Path, model: Path) -> Path:
    """The same without what a command refuses at its first look: other names must protect themselves."""
    user(home, model)
    for name in ("qlora-lab.json", "quantizing.json"):
        (home / name).unlink()
    for name in ("adapter", "checkpoints/step-00000020"):
        shutil.rmtree(home / name)
    return home


def fingerprint(home: Path) -> dict[str, tuple]:
    """Kind, mode, bytes and time of change of each file; names of all folders."""
    found = {}
    for path in sorted(home.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        times = (path.stat().st_mtime_ns, path.stat().st_ino) if path.is_file() else ()
        found[str(path.relative_to(home))] = (os.lstat(path).st_mode, content, *times)
    return found
