"""Two checkpoints side by side: each kind of difference is counted where it was made."""

import pytest
import torch
from safetensors.torch import save_file

from qlora_lab.export import xray, xray_diff
from qlora_lab.export.xray import Checkpoint
from qlora_lab.export.xray_diff import compare
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors
from tests.export.test_xray import WEIGHT, saved, stored


@pytest.fixture
def differences(tmp_path):
    """Save two dicts of tensors; return their differences and whether pieces of any size say the same."""

    def found(first, second):
        a, b = (Checkpoint(saved(tensors, tmp_path, name)) for name, tensors in (("a", first), ("b", second)))
        whole = compare(a, b, progress=False)
        with pytest.MonkeyPatch.context() as patch:
            for module in (xray, xray_diff):
                patch.setattr(module, "PIECE", 128)  # several pieces, of whole blocks
            assert compare(a, b, progress=False) == whole
        return {one.name: one for one in whole}

    return found


@pytest.mark.parametrize("options", [("nf4", 64, False), ("fp4", 32, True), ("nf3", 64, True)], ids=str)
def test_a_checkpoint_equals_itself(differences, options):
    tensors = stored(*options) | {"b": WEIGHT, "c": torch.ones(3, dtype=torch.int64)}
    found = differences(tensors, tensors)
    assert found.keys() == {"w", "b", "c"} and all(one.is_equal for one in found.values())


def test_one_nibble(differences):
    first, second = stored("nf4", 64, False), stored("nf4", 64, False)
    second["w"][100] ^= 0x10  # the high half: weight 200, in block 3
    found = differences(first, second)["w"]
    assert (found.bytes_differ, found.codes_differ, found.values_differ) == (1, 1, 1)
    assert (found.blocks_differ, found.first_blocks, found.n_blocks, found.numel) == (1, (3,), 17, 1073)
    a, b = (dequantize(from_tensors(tensors, "w")).flatten() for tensors in (first, second))
    assert found.largest == (a - b).abs().max() > 0


def test_one_constant(differences):
    first, second = stored("nf4", 64, False), stored("nf4", 64, False)
    second["w.absmax"][16] *= 2  # of the last block, which is partial
    found = differences(first, second)["w"]
    a, b = (dequantize(from_tensors(tensors, "w")).flatten() for tensors in (first, second))
    assert (found.bytes_differ, found.codes_differ, found.constants_differ) == (0, 0, 1)
    assert (found.first_blocks, found.values_differ) == ((16,), int((a != b).sum()))


def test_padding_is_a_byte_and_no_weight(differences):
    first, second = stored("nf4", 64, False), stored("nf4", 64, False)
    second["w"][-1] ^= 1
    found = differences(first, second)["w"]
    assert (found.bytes_differ, found.codes_differ, found.values_differ, found.blocks_differ) == (1, 0, 0, 0)
    assert not found.is_equal


def test_noise_is_counted_as_by_hand(differences):
    """Many codes and constants differ, some of them in the same block."""
    noise = torch.randn(WEIGHT.shape, generator=torch.Generator().manual_seed(3))
    weights = WEIGHT, WEIGHT + 0.01 * noise
    found = differences(*(stored("nf4", 64, True, weight=weight) for weight in weights))["w"]
    a, b = (quantize(weight, "nf4", 64, True) for weight in weights)
    other = a.codes != b.codes
    assert 0 < found.codes_differ == int(other.sum()) < WEIGHT.numel() / 4
    assert found.bytes_differ == int((a.packed != b.packed).sum())
    assert found.constants_differ == int((a.absmax != b.absmax).sum())
    assert found.values_differ == int((dequantize(a) != dequantize(b)).sum())
    assert found.largest == (dequantize(a) - dequantize(b)).abs().max().item()
    assert found.blocks_differ == 17 and found.first_blocks == tuple(range(10))


def test_other_block_sizes_and_types_are_compared_by_weights(differences):
    first = stored("nf4", 64, False)
    for options, said in (
        (("nf4", 32, False), "block size 64 and 32"),
        (("fp4", 64, False), "data type nf4 and fp4"),
        (("int3", 64, False), "data type nf4 and int3"),
        (("nf4", 64, True), "double quantization False and True"),
    ):
        second = stored(*options)
        found = differences(first, second)["w"]
        a, b = (dequantize(from_tensors(tensors, "w")) for tensors in (first, second))
        assert found.what == said and not found.is_equal
        assert found.values_differ == int((a != b).sum()) > 0
        assert (found.constants_differ is None) == (found.blocks_differ is None) == (options[1] == 32)
        assert (found.bytes_differ is None) == (options[0] == "int3")
        assert found.codes_differ == (
            int((quantize(WEIGHT, *options).codes != quantize(WEIGHT).codes).sum()) if options[0] == "nf4" else None
        )


def test_what_only_one_has(differences):
    four = stored("nf4", 64, False)
    found = differences(four | {"b": WEIGHT}, {"w": WEIGHT, "c": WEIGHT})
    said = {name: one.what for name, one in found.items()}
    assert not any(one.is_compared for one in found.values())
    assert said == {"w": "decoded in 4 bits only in the first", "b": "only in the first", "c": "only in the second"}
    other = stored("nf4", 64, False, weight=WEIGHT[:36])
    assert differences(four, other)["w"].what == "shape (37, 29) and (36, 29)"


def test_plain_tensors_bit_for_bit(differences):
    first = {"b": WEIGHT, "c": torch.tensor([0.0, 1.0, torch.nan]), "d": torch.ones(4, dtype=torch.int64), "e": WEIGHT}
    second = {"b": WEIGHT.clone(), "c": torch.tensor([-0.0, 1.5, torch.nan]), "d": torch.arange(4), "e": WEIGHT.half()}
    second["b"][3, 4] += 2
    found = differences(first, second)
    assert (found["b"].values_differ, found["c"].values_differ, found["d"].values_differ) == (1, 2, 3)
    assert found["b"].largest == pytest.approx(2) and found["c"].largest == 0.5
    assert found["e"].what == "dtype F32 and F16"


def test_a_code_that_the_table_lacks_is_said_and_not_raised(tmp_path):
    tensors = to_tensors(quantize(WEIGHT, torch.linspace(-1, 1, 11), 64), "w")
    save_file(tensors, tmp_path / "good.safetensors")
    save_file(tensors | {"w": torch.full_like(tensors["w"], 255)}, tmp_path / "bad.safetensors")
    first, second = (Checkpoint(tmp_path / f"{name}.safetensors") for name in ("good", "bad"))
    (found,) = compare(first, second, progress=False)
    assert found.what == "w holds code 15, but its table has 11 levels"


def test_codes_of_two_tables_are_not_counted(tmp_path):
    for name in ("nf4", "fp4"):
        save_file(to_tensors(quantize(WEIGHT, name, 64), "w"), tmp_path / f"{name}.safetensors")
    (found,) = compare(*(Checkpoint(tmp_path / f"{name}.safetensors") for name in ("nf4", "fp4")), progress=False)
    assert found.codes_differ is None and found.bytes_differ and found.values_differ
