"""Tensors that are not what a model can be made of: refused by file and name, wherever they are loaded from."""

import hashlib
import math
import warnings

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file

import qlora_lab as ql
from qlora_lab.data.examples import Example
from qlora_lab.model.model_files import ModelError
from qlora_lab.model.stored import Stored
from qlora_lab.quant.finite import first_not_finite, is_finite
from qlora_lab.train.checkpoint import saved_steps
from qlora_lab.train.settings import Settings
from qlora_lab.train.trainer import Training

pytestmark = pytest.mark.usefixtures("one_thread")
EMBEDDING, NORM, LINEAR = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@given(
    size=st.integers(0, 400),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 0.0]),
    place=st.integers(0, 399),
    strided=st.booleans(),
)
def test_one_pass_finds_what_isfinite_finds(size, dtype, value, place, strided):
    tensor = torch.linspace(-1, 1, max(size, 1)).to(dtype)[:size]
    if place < size:
        tensor[place] = value
    tensor = tensor[::3] if strided else tensor
    found = (~tensor.isfinite()).nonzero().flatten().tolist()
    assert is_finite(tensor) == (not found)
    where = first_not_finite(tensor)
    assert where is None if not found else where.endswith(f" at [{found[0]}]")


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def put(name, value):
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tiny model's share in 4 bits
        return ql.load(folder, progress=False, **options)


@pytest.mark.long
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, LINEAR])
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, name, value):
    rewrite(folder / "model.safetensors", put(name, value))
    place = [3] if name == NORM else [0, 3]
    wanted = f"{folder / 'model.safetensors'}: {name} holds {value} at {place}, but weights are finite: take another"
    for read in (load, lambda folder: load(folder, codebook=None)):
        with pytest.raises(ModelError) as error:
            read(folder)
        assert str(error.value).startswith(wanted)
    with pytest.raises(ModelError, match=" holds .*, but weights are finite"):
        ql.quantize_folder(folder, tmp_path / "small", progress=False)


def test_a_float64_beyond_float32_is_not_finite(folder):
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({NORM: tensors[NORM].double() * 1e300}))
    with pytest.raises(ModelError, match=rf"{NORM} holds inf at \[0\], but weights are finite"):
        load(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", [EMBEDDING, NORM, pytest.param(LINEAR, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_integers_and_complex_numbers_are_no_weights(folder, tmp_path, name, dtype):
    small = tmp_path / "small"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ql.quantize_folder(folder, small, progress=False)
    files = [folder / "model.safetensors"]
    files += [small / "model-00001-of-00001.safetensors"] * (name != LINEAR)
    for file in files:
        rewrite(file, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
        with pytest.raises(ModelError, match=f"^{file}: {name} is {dtype}, but weights are float32, bfloat16 or float"):
            load(file.parent)


@pytest.mark.parametrize("name", [EMBEDDING, NORM, f"{LINEAR}.nested_absmax"])
def test_a_folder_in_4_bits_with_values_that_are_not_finite_is_refused(folder, tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = ql.quantize_folder(folder, tmp_path / "small", progress=False)
    file = small / "model-00001-of-00001.safetensors"
    rewrite(file, lambda tensors: tensors[name].view(-1)[:1].fill_(math.nan))
    with pytest.raises(ModelError, match=f"^{file}: model.*(holds nan at|has NaN or infinity in its nested constants)"):
        load(small)


def test_a_buffer_of_integers_takes_no_floats(tmp_path):
    stored = Stored("positions", torch.Size([3]), {"positions": tmp_path / "m.safetensors"}, is_float=False)
    assert stored.checked(torch.arange(3)).tolist() == [0, 1, 2]
    with pytest.raises(ModelError, match="m.safetensors: positions is torch.float32, but the model has integers there"):
        stored.checked(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_an_adapter_of_another_dtype_is_refused(folder, tmp_path, dtype):
    model, _ = load(folder)
    saved = ql.save_adapter(ql.add_lora(model, r=2), tmp_path / "adapter")
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    rewrite(saved / "adapter_model.safetensors", lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    with pytest.raises(ValueError, match=f"^the adapter in {saved} has model.*up_proj.lora_A in {dtype}: save it in"):
        ql.load_adapter(load(folder)[0], saved)


# --------------------------------------------------------------------------------------------------------- checkpoints

EXAMPLES = [Example((("user", f"{i} and {i}"), ("assistant", "two"))) for i in range(9)]
LORA_A = "adapter.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MOMENTS = {32: ("exp_avg", "exp_avg_sq"), 8: ("state1", "absmax1")}


def training(folder, out, bits, resume=False):
    model, tokenizer = load(folder, dtype=torch.float32)
    settings = Settings(steps=4, batch_size=2, save_every=2, max_length=40, optimizer_bits=bits)
    return Training(ql.add_lora(model, r=2), tokenizer, EXAMPLES, out, settings, resume=resume, progress=False)


def forge(run, step, change):
    """Change the tensors of a checkpoint, and its checksums with them."""
    folder = run / "checkpoints" / f"step-{step:08}"
    rewrite(folder / "state.safetensors", change)
    digest = hashlib.sha256((folder / "state.safetensors").read_bytes()).hexdigest()
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    lines = [f"{digest}  state.safetensors" if line.endswith("  state.safetensors") else line for line in lines]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return folder / "state.safetensors"


@pytest.fixture
def interrupted(folder, tmp_path):
    """A function: a run that was stopped after its second step, with moments of so many bits."""

    def begun(bits):
        run = training(folder, tmp_path / "run", bits)
        for line in run:
            if line["step"] == 2:
                run.stop()
        assert saved_steps(tmp_path / "run") == [2]
        return tmp_path / "run"

    return begun


@pytest.mark.long
@pytest.mark.parametrize("bits", [32, pytest.param(8, marks=pytest.mark.slow)])
def test_a_forged_checkpoint_is_refused_by_its_tensor(folder, interrupted, bits):
    run = interrupted(bits)
    first, second = (f"optimizer.0.{name}" for name in MOMENTS[bits])
    damages = {
        f"{LORA_A} holds nan at [0, 3]": put(LORA_A, math.nan),
        f"{LORA_A} is torch.int64 of shape (2, 16), but the run has torch.float32 of shape (2, 16)": lambda tensors: (
            tensors.update({LORA_A: tensors[LORA_A].long()})
        ),
        f"{LORA_A} is torch.float32 of shape (2, 15), but the run has": lambda tensors: tensors.update(
            {LORA_A: tensors[LORA_A][:, :15].clone()}
        ),
        f"{LORA_A} is missing": lambda tensors: tensors.pop(LORA_A),
        f"{second} holds inf at [0": lambda tensors: tensors[second].view(-1)[:1].fill_(math.inf),
        f"{first} is missing": lambda tensors: tensors.pop(first),
        f"{first} is torch.float64 of": lambda tensors: tensors.update({first: tensors[first].double()}),
        "optimizer.0.step is torch.float32 of shape (2,), but": lambda tensors: tensors.update(
            {"optimizer.0.step": torch.ones(2)}
        ),
        "optimizer.999.step is not part of this run": lambda tensors: tensors.update(
            {"optimizer.999.step": torch.tensor(2.0)}
        ),
        "extra is not part of this run": lambda tensors: tensors.update({"extra": torch.ones(1)}),
    }
    file = run / "checkpoints/step-00000002/state.safetensors"
    good = file.read_bytes()
    for fault, damage in damages.items():
        assert forge(run, 2, damage) == file
        with pytest.raises(ValueError) as error:
            training(folder, run, bits, resume=True).run()
        assert str(error.value).startswith(f"{file}: {fault}") and "\n" not in str(error.value)
        file.write_bytes(good)
    forge(run, 2, lambda tensors: None)
    assert training(folder, run, bits, resume=True).run().ended == "all steps"


def test_a_step_in_digits_of_another_script_is_no_checkpoint(tmp_path):
    for name in ("step-00000002", "step-００００００１２", "step-2"):  # full-width: int() reads them
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [2]
