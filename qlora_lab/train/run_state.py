"""Everything that changes from one step of a run to the next, how it is saved and how it comes back; and the result.

Random numbers need no state: what a step draws follows from (seed, step, process) alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_lab.adapters.adapter import adapters, learned
from qlora_lab.adapters.layer_patterns import WRAPPER
from qlora_lab.adapters.peft_format import adapter_tensors
from qlora_lab.data.batches import Batches
from qlora_lab.data.dataset import Encoded, EncodeReport
from qlora_lab.files import disk
from qlora_lab.files.checksums import sha256
from qlora_lab.train.checkpoint import BEST, FACTS, TENSORS, load_checkpoint, save_checkpoint, state_file
from qlora_lab.train.cost import Cost
from qlora_lab.train.identity import arithmetic
from qlora_lab.train.resumed import check_facts, check_tensors, read_saved_log
from qlora_lab.train.run_folder import ADAPTER, LOG
from qlora_lab.train.run_record import adopt_saved, check_same_run, comparable, computes_in
from qlora_lab.train.settings import Settings


@dataclass(frozen=True)
class Run:
    """What a run did. losses: nats per answer token, one per step. held_out: (step, loss) of each evaluation."""

    folder: Path
    settings: Settings
    data: EncodeReport
    losses: list[float] = field(repr=False)
    held_out: list[tuple[int, float]] = field(repr=False)
    seconds: float  # of all steps, those before a resume included
    tokens: int
    ended: str  # "all steps", "early stopping", or STOPPED: it can be resumed
    cost: Cost  # processor and GPU seconds, joules

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / ADAPTER

    @property
    def best(self) -> Path:
        """The folder of the adapter with the lowest held-out loss; without evaluations, that of the last adapter."""
        return self.folder / BEST if self.held_out else self.adapter

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class RunState:
    """The state between two steps. record: what decided the run (run_record.py); it is saved too, for a resume."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches  # which examples come next
    record: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)  # of the log, one per step
    best: dict[str, Any] = field(default_factory=lambda: {"loss": None, "step": 0, "since": 0})  # evaluation so far
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        # float16 overflows at 65,504 and loses values below 6e-8, so its gradients are computed on a scaled loss.
        half = computes_in(self.model) == torch.float16
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=half)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' parameters, in the optimizer's order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def save(self, folder: Path, keep: int) -> None:
        """Write a checkpoint of this state to the run in `folder`; the newest `keep` checkpoints stay."""
        disk.sync(folder / LOG)  # the log may not end before the state that follows from it
        tensors = {f"adapter.{key}": tensor for key, tensor in self._adapter().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            # qmap: bitsandbytes' look-up tables, which are constants
            moments = {name: tensor for name, tensor in state.items() if not name.startswith("qmap")}
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
        facts = {
            "run": comparable(self.record),
            "batches": self.batches.state(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "arithmetic": arithmetic(self.model),  # how sums were rounded
            "log_sha256": sha256(folder / LOG),
        }
        best = folder / BEST if self.best["step"] else None  # a later best must not outlive this state
        save_checkpoint(folder, len(self.lines), tensors, facts, keep, best)

    def resume(
        self, folder: Path, step: int, settings: Settings, encoded: list[Encoded], other_arithmetic: bool
    ) -> None:
        """Become the state that the run in `folder` had after `step`; nothing changes before everything is checked."""
        tensors, facts = load_checkpoint(folder, step)
        check_facts(facts, state_file(folder, step, FACTS))
        if step >= settings.steps:
            done = f"{folder} was saved at step {step}, so all of steps={settings.steps} are done"
            raise ValueError(f"{done}: ask for more steps")
        check_same_run(folder, facts["run"], self.record, encoded)
        lines = read_saved_log(folder / LOG, step, facts)
        file = state_file(folder, step, TENSORS)
        check_tensors(file, tensors, self._adapter(), self.parameters, settings.optimizer_bits)
        adopt_saved(self.model, facts["arithmetic"], folder, other_arithmetic)
        self._take(tensors)
        self.batches.restore(facts["batches"])
        self.scaler.load_state_dict(facts["scaler"])
        self.best = facts["best"]
        self.lines = lines

    def _adapter(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the adapters, by its key: what learns, and constants, which belong to it.

        Another processor may decompose the same weight into singular vectors with opposite signs.
        """
        constants = {
            f"{path.replace(WRAPPER, '')}.{name}": constant
            for path, adapter in adapters(self.model).items()
            for name, constant in adapter.constants().items()
        }
        return adapter_tensors(self.model) | constants

    @torch.no_grad()
    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in self._adapter().items():
            tensor.copy_(tensors[f"adapter.{key}"])
        state: dict[int, dict[str, torch.Tensor]] = {}  # parameter number -> name -> moment
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")  # such as optimizer.27.exp_avg
                state.setdefault(int(number), {})[name] = tensor
        groups = self.optimizer.state_dict()["param_groups"]  # each step sets its learning rate anew
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_trained(model: torch.nn.Module) -> None:
    """Raise ValueError for a model without adapters, or one that trains anything else, which would not be saved."""
    # By identity, because a parameter may be reachable under several names.
    known = {id(p) for p in learned(model).values()}
    if others := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        message = "adapters alone are trained and saved: requires_grad_(False) freezes it"
        raise ValueError(f"{others[0]}{more} would be trained as well, but {message}")
