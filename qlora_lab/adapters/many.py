"""Many adapters over one base: name them, switch between them, and let each row of a batch use its own.

    bank = AdapterBank(model)
    bank.add("french", "adapters/french")
    bank.use("french")                           # the model is now an ordinary model with one adapter
    with bank.rows(["french", "german", None]):  # three rows; None: the answer of the base
        model(**batch)

In: a model without adapters, and folders of adapters. Out: the same model; the adapters that it does not use lie beside
it, each as it would stand in the model. So an adapter in use trains, is saved and is counted as any other.

Rows of a batch: y_i = base(x_i) + scaling_k (x_i A_k^T) B_k^T, with k the adapter of row i. The base multiplies all
rows at once, which is what costs most; rows of one adapter lie side by side, and all adapters are one batched product.
Source: LoRA (arXiv 2106.09685) section 4.1 for the equation; Punica (arXiv 2310.18547) section 3 for such a batch.

Not here: choosing the adapter of a prompt (measure/routed.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter, adapters, has_adapters, put_into, remove_adapter
from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.adapters.full import FullTuning
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.peft_format import load_adapter, method_in, save_adapter
from qlora_lab.model.layer_kinds import out_and_in
from qlora_lab.model.linear4bit import Linear4bit

MIXED = "rows of a batch use several adapters here, which can only answer: leave the `with bank.rows(...)` block first"


class AdapterBank:
    """Named adapters for one model. Each is of any method; rows of one batch can differ in LoRA's alone.

    Raises ValueError for a model that has adapters already.
    """

    def __init__(self, model: nn.Module):
        if has_adapters(model):
            raise ValueError("this model has adapters already: save them, and call qlora_lab.remove_adapter(model)")
        self.model = model
        self._sets: dict[str, dict[str, Adapter]] = {}  # name -> path -> adapter

    @property
    def names(self) -> list[str]:
        """Names in the order in which they were added."""
        return list(self._sets)

    @property
    def nbytes(self) -> int:
        """Bytes of what all adapters learned. The base, which they share, is not counted."""
        return sum(
            p.nbytes for made in self._sets.values() for layer in made.values() for p in layer.learned().values()
        )

    @property
    def in_use(self) -> str | None:
        """The name of the adapter that the model has now; None: it is the base."""
        own = next((module for module in self.model.modules() if isinstance(module, Adapter)), None)
        if own is None:
            return None
        if isinstance(own, RowsLinear):
            raise ValueError(MIXED)
        name = next((name for name, made in self._sets.items() if own in made.values()), None)
        if name is None:
            raise ValueError(
                "this model has an adapter that is not the bank's: save it, and call remove_adapter(model)"
            )
        return name

    def add(self, name: str, folder: str | Path) -> None:
        """Load the adapter in `folder` under a name. The model goes on with the adapter that it uses.

        Raises what load_adapter raises, and ValueError for a name that is taken, and for all weights of a model. Warns
        as load_adapter does.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}, but an adapter's name is a word such as 'french'")
        if name in self._sets:
            raise ValueError(f"the name {name!r} is taken: remove({name!r}) first, or choose another name")
        if method_in(folder) == FullTuning.method:  # its weights would take the place of the base
            raise ValueError(f"{folder} holds a whole model, not an adapter beside one: load it as a model of its own")
        with self._base():
            self._sets[name] = adapters(load_adapter(self.model, folder))

    def use(self, name: str | None) -> None:
        """Let the model use the adapter of this name; None: the base alone. Raises ValueError for an unknown name."""
        if name is not None:
            self._check(name)
        if self.in_use is not None:  # raises for a model that has other adapters
            remove_adapter(self.model)
        if name is not None:
            self._put(name)

    def remove(self, name: str) -> None:
        """Forget the adapter of this name, and free its memory. Raises ValueError for an unknown name."""
        self._check(name)
        if self.in_use == name:
            self.use(None)
        del self._sets[name]

    def save(self, name: str, folder: str | Path) -> Path:
        """Write the adapter of this name to `folder`; see save_adapter, which also says what it raises."""
        self._check(name)
        with self._base():
            self._put(name)
            return save_adapter(self.model, folder)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Let each row of a batch use an adapter of its own inside the `with` block; afterwards all is as before.

        names: one for each row, in order; None: the base alone. Inside, the model answers, with or without a cache,
        but does not train, and takes batches of exactly len(names) rows. The adapters in use are copied for the time of
        the block, so a name that several rows share costs no more than one that a single row uses.
        Raises ValueError for an unknown name, for one whose adapter is no LoRA, or for no names.
        """
        self.check_rows(names)
        used = [name for name in dict.fromkeys(names) if name is not None]
        paths = dict.fromkeys(path for name in used for path in self._sets[name])  # in order
        with self._base():
            for path in paths:
                here = {name: self._sets[name][path] for name in used if path in self._sets[name]}
                RowsLinear(self.model.get_submodule(path), here, names).put_into(self.model, path)
            yield

    def check_rows(self, names: Sequence[str | None]) -> None:
        """Raise ValueError for names that `rows` does not take."""
        if isinstance(names, str) or not names:
            raise ValueError(f"names is {names!r}: give one name for each row, such as ['french', None]")
        for name in names:
            if name is None:
                continue
            self._check(name)
            for adapter in self._sets[name].values():
                if isinstance(adapter, LoRAStack):  # a router mixes the rows
                    raise ValueError(f"{name!r} adapts experts, to which rows come mixed: use one adapter at a time")
                if type(adapter).forward is not LoRALinear.forward:  # another equation
                    raise ValueError(f"{name!r} is of method {adapter.method}, but rows can differ in LoRA's alone")

    def _put(self, name: str) -> None:
        for adapter in self._sets[name].values():
            beside = adapter.base.weight if hasattr(adapter, "base") else next(self.model.parameters())
            adapter.to(beside.device)  # the model may have moved since
        put_into(self.model, lambda: self._sets[name])

    def _check(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._sets:
            known = ", ".join(map(repr, self._sets)) or "none yet"
            raise ValueError(f"there is no adapter {name!r}: choose from {known}, or add it")

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Give the model back without adapters inside the `with` block, whatever is put in there."""
        before = self.in_use
        self.use(None)
        try:
            yield
        finally:
            if has_adapters(self.model):
                remove_adapter(self.model)
            self.use(before)


class RowsLinear(Adapter):
    """`base`, a linear layer, and LoRA adapters beside it, of which row i of a batch uses the one called names[i].

    loras: name -> adapter; a row with another name, or None, gets what the base gives. Ranks may differ: the rows
    and columns that a smaller one lacks are zeros.
    """

    method = "rows"

    def __init__(self, base: nn.Module, loras: dict[str, LoRALinear], names: Sequence[str | None]):
        super().__init__()
        self.base = base
        self.count = len(names)
        device = base.weight.device
        groups = [[row for row, name in enumerate(names) if name == own] for own in loras]
        largest = max(map(len, groups))
        # (adapters x largest): row that fills each place; a short group repeats its first row, and drops the result
        taken = [row for group in groups for row in group + group[:1] * (largest - len(group))]
        self.taken = torch.tensor(taken, dtype=torch.int64, device=device)
        self.in_order = self.taken.tolist() == list(range(len(names)))
        places = {row: place * largest + i for place, group in enumerate(groups) for i, row in enumerate(group)}
        self.adapted = torch.tensor(list(places), dtype=torch.int64, device=device)  # the rows that have an adapter
        # where the result of each lies
        self.places = torch.tensor(list(places.values()), dtype=torch.int64, device=device)
        r = max(layer.r for layer in loras.values())
        out_features, in_features = out_and_in(base)
        self.A = torch.zeros(len(loras), in_features, r, dtype=torch.float32, device=device)
        self.B = torch.zeros(len(loras), r, out_features, dtype=torch.float32, device=device)
        for number, layer in enumerate(loras.values()):
            self.A[number, :, : layer.r] = layer.lora_A.data.t()
            self.B[number, : layer.r] = layer.scaling * layer.lora_B.data.t()  # as the CPU's product scales it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (rows, length, in_features) -> (rows, length, out_features)."""
        if self.training:
            raise ValueError("rows of a batch that use several adapters cannot learn: call model.eval(), or train one")
        shape = tuple(x.shape)
        if x.dim() != 3:  # OPT lays all rows in one; tokens that a router sends to an expert are of any row
            raise ValueError(f"a layer reads {shape}, which has lost its rows: use one adapter at a time in this model")
        if len(x) != self.count:
            raise ValueError(f"{self.count} rows have names, but the input is {shape}: give as many names as rows")
        y = self.base(x)
        # as in LoRALinear: float32 beside the CPU's product, otherwise the dtype of x
        dtype = torch.float32 if isinstance(self.base, Linear4bit) and self.base.takes_adapter else x.dtype
        grouped = x if self.in_order else x[self.taken]
        grouped = grouped.to(dtype).reshape(len(self.A), -1, x.shape[-1])  # (adapters, places x length, in)
        low = torch.bmm(grouped, self.A.to(dtype))  # (adapters, places x length, r)
        beside = (y if self.in_order else y[self.taken]).to(dtype).reshape(len(low), low.shape[1], -1)
        added = torch.baddbmm(beside, low, self.B.to(dtype)).view(-1, *y.shape[1:]).to(y.dtype)
        return added if self.in_order else y.index_copy(0, self.adapted, added[self.places])

    def _apply(self, fn, recurse: bool = True):
        nn.Module._apply(self, fn, recurse)  # the base: copies of adapters follow it, but are never cast
        for name in ("taken", "adapted", "places", "A", "B"):
            setattr(self, name, getattr(self, name).to(self.base.weight.device))
        return self

    def learned(self) -> dict[str, nn.Parameter]:
        """Raise ValueError: training, saving and counting bytes ask for this."""
        raise ValueError(MIXED)
