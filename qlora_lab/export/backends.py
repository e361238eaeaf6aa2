"""Put implementations of 4-bit quantization behind one face, so that conformance.py can judge each by the same vectors.

In: the name of a backend. Out: a Backend, whose `encode` and `read` take a case of data/conformance and give tensors by
bitsandbytes' key names, and values. Four are this library's own: its readable functions, its CPU kernels with 16
look-ups at once, the same with plain loops, and its Triton kernels. Two are other libraries, which are imported only
if they are asked for by name.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import torch

import qlora_lab.kernels as kernels
from qlora_lab.kernels import Choice
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors
from qlora_lab.train.identity import installed_version

KEY = "weight"  # of a case's tensors: weight, weight.absmax, ...
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One case of the vectors. The fields from `kind` on say how its input is quantised."""

    name: str
    why: str
    shape: tuple[int, ...]
    kind: str  # nf4 or fp4
    block: int  # weights in a block
    dtype: str  # of the input, and of what is decoded
    nested: bool  # double quantization
    storage: str  # the dtype as which packed bytes are stored
    refused: bool  # an input that has no result
    input: torch.Tensor  # of `shape` and `dtype`
    tensors: Tensors = field(default_factory=dict)  # the expected checkpoint: weight, weight.absmax, ...
    decoded: torch.Tensor | None = None  # the expected values, of `shape` and `dtype`


@dataclass(frozen=True)
class Backend:
    """An implementation. Both functions raise what it raises for an input that it refuses.

    refuses: pattern of "TypeOfError: message" for such an input; any other error is a crash.
    encode: a case -> tensors by bitsandbytes' key names, and the values that these decode to.
    read: a case -> values decoded from its expected tensors; None for a backend with a format of its own.
    """

    name: str
    version: str
    refuses: str
    encode: Callable[[Case], tuple[Tensors, torch.Tensor]]
    read: Callable[[Case], torch.Tensor | None]


OURS = ("reference", "cpu", "cpu-plain", "triton")
OTHERS = {
    "bitsandbytes": "pip install bitsandbytes",
    "torchao": "pip install --no-deps torchao==0.18.0",
}  # name -> how to get it
BACKENDS = (*OURS, *OTHERS)
NOT_FINITE = r"ValueError: .*\b(nan|-?inf)\b"
REFUSES = {  # name -> what its refusals say
    **dict.fromkeys((*OURS, "bitsandbytes"), NOT_FINITE),
    "torchao": "ValueError: NF4Tensor has no|AssertionError: (Input tensor must be divisible|expect input tensor dim)",
}
NF4 = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"  # its place in torchao 0.18


class NotHereError(ValueError):
    """A backend that is known, but cannot run here."""


def check_backend(name: str) -> None:
    """Raise ValueError for a name that is not one of BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name[:60]!r} is not known: choose one of {', '.join(BACKENDS)}")


@contextmanager
def running(name: str) -> Iterator[Backend]:
    """Yield the backend `name`, ready within the `with` block.

    Raises ValueError for an unknown name, and NotHereError for a backend that cannot run here, with the reason.
    """
    check_backend(name)
    if name in OURS:
        with _kernels(name):
            version = installed_version("qlora-lab") or "from source"
            yield Backend(name, version, REFUSES[name], _our_encode, _our_read)
        return
    if find_spec(name) is None:
        raise NotHereError(f"{name} is not installed, so it cannot be judged: {OTHERS[name]}")
    encode, read = (_bnb_encode, _bnb_read) if name == "bitsandbytes" else (_torchao_encode, lambda case: None)
    version = installed_version(name) or "of unknown version"
    with _quiet():
        _check_import(name, version)
        yield Backend(name, version, REFUSES[name], encode, read)


def _check_import(name: str, version: str) -> None:
    """Raise NotHereError for a version that keeps what is judged elsewhere, or that cannot be imported here."""
    module = NF4 if name == "torchao" else "bitsandbytes.functional"
    function = "to_nf4" if name == "torchao" else "quantize_4bit"
    try:
        is_there = hasattr(import_module(module), function)
    except (ImportError, OSError) as error:  # OSError: of a library that it loads
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise NotHereError(f"{name} {version} cannot be judged ({why}): {OTHERS[name]}") from None
    if not is_there:
        raise NotHereError(f"{name} {version} cannot be judged, it has no {function} in {module}: {OTHERS[name]}")


# ----------------------------------------------------------------------------------------------------------------- ours


@contextmanager
def _kernels(name: str) -> Iterator[None]:
    """Make the library choose one implementation for every CPU tensor."""
    chosen = _choice(name)
    usual, kernels.choose = kernels.choose, lambda device="cpu": chosen  # whatever QLORA_LAB_KERNELS asks for
    try:
        if name == "cpu-plain":
            with _plain_loops():
                yield
        else:
            yield
    finally:
        kernels.choose = usual


def _choice(name: str) -> Choice:
    why = "conformance asks for it"
    if name == "reference":
        return Choice(name, why)
    if name == "triton":
        if find_spec("triton") is None:
            raise NotHereError("Triton is not installed, so its kernels cannot be judged: it exists for Linux")
        from qlora_lab.kernels.triton import dispatch  # with TRITON_INTERPRET=1: conformance.py starts such a process

        return Choice(name, why, dispatch, dispatch)
    from qlora_lab.kernels import cpu

    return Choice(name, why, cpu)


@contextmanager
def _plain_loops() -> Iterator[None]:
    """Take the form of the kernels that CPUs without 16 look-ups at once run."""
    from qlora_lab.kernels import cpu

    usual, cpu.FAST = cpu.FAST, False
    try:
        yield
    finally:
        cpu.FAST = usual


def _our_encode(case: Case) -> tuple[Tensors, torch.Tensor]:
    tensors = to_tensors(quantize(case.input, case.kind, case.block, case.nested), KEY)
    return tensors, dequantize(from_tensors(tensors, KEY))


def _our_read(case: Case) -> torch.Tensor:
    return dequantize(from_tensors(case.tensors, KEY))


# --------------------------------------------------------------------------------------------------- other libraries


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what they log and warn, and run their code as it is written: torch.compile would start a C++ compiler."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _bnb_encode(case: Case) -> tuple[Tensors, torch.Tensor]:
    bnb = import_module("bitsandbytes.functional")
    packed, state = bnb.quantize_4bit(
        case.input,
        blocksize=case.block,
        quant_type=case.kind,
        compress_statistics=case.nested,
        quant_storage=getattr(torch, case.storage),
    )
    parts = {f"{KEY}.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {KEY: packed} | parts, bnb.dequantize_4bit(packed, state)


def _bnb_read(case: Case) -> torch.Tensor:
    bnb = import_module("bitsandbytes.functional")
    parts = {name.removeprefix(f"{KEY}."): part for name, part in case.tensors.items() if name != KEY}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    return bnb.dequantize_4bit(case.tensors[KEY], state)


def _torchao_encode(case: Case) -> tuple[Tensors, torch.Tensor]:
    """Its constants have a format of their own; they share a scale in groups of 256, or one for all where it must."""
    if case.kind != "nf4":
        raise ValueError(f"NF4Tensor has no {case.kind}")
    n_blocks = -(-case.input.numel() // case.block)
    group = n_blocks if n_blocks % 256 else 256
    quantised = import_module(NF4).to_nf4(case.input, case.block, group)
    return {KEY: quantised.quantized_data}, quantised.get_original_weight()
