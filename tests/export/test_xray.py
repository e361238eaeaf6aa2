"""Looking into checkpoints in 4 bits: every key, every byte, every fault by name."""

import json
import os
import pickle
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bench.timing import peak_bytes
from qlora_lab.export.xray import Checkpoint, byte_at, constants, scanned, values
from qlora_lab.export.xray_diff import compare
from qlora_lab.files.tensor_header import read_header
from qlora_lab.quant.quantize import dequantize, quantize
from qlora_lab.quant.serialize import from_tensors, to_tensors
from tools.fuzz_damage import in_safetensors

WEIGHT = torch.randn(37, 29, generator=torch.Generator().manual_seed(0))  # 1,073 weights: odd, with a partial block
OPTIONS = [("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, True), ("int4", 16, False), ("nf3", 64, True)]
OPTIONS += [(torch.tensor([-1.0, -0.3, 0.0, 0.5, 1.0]), 64, False)]  # five levels of three bits


def stored(*options, weight=WEIGHT):
    """Plain tensors of a quantised weight "w", each with memory of its own."""
    return {name: tensor.clone() for name, tensor in to_tensors(quantize(weight, *options), "w").items()}


def saved(tensors, folder, name="model.safetensors"):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / name)
    return folder / name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_key_and_every_weight_is_decoded(tmp_path, options, dtype):
    """Bit for bit as the library reads the whole tensor."""
    tensors = stored(*options, weight=WEIGHT.to(dtype))
    checkpoint = Checkpoint(saved(tensors, tmp_path))
    assert scanned(checkpoint, progress=False) == []
    (found,) = checkpoint.tensors.values()
    q = from_tensors(tensors, "w")
    assert (found.shape, found.dtype, found.block_size) == (q.shape, dtype, q.block_size)
    assert found.bits_per_parameter == q.bits_per_parameter
    assert (found.quant_type, found.bits, found.offset is not None) == (q.codebook, q.bits, q.double_quant)
    assert set(found.names) == set(checkpoint.parts) == set(tensors) and checkpoint.plain == []
    assert torch.equal(constants(checkpoint, "w", 0, found.n_blocks), q.absmax)
    assert torch.equal(values(checkpoint, "w", 0, found.numel), dequantize(q).flatten())
    assert torch.equal(values(checkpoint, "w", 200, 331), dequantize(q).flatten()[200:331])


@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 1, 2, 3)], ids=str)
def test_every_byte_is_explained(tmp_path, options):
    tensors = stored(*options)
    path = saved(tensors, tmp_path)
    checkpoint = Checkpoint(path)
    q = from_tensors(tensors, "w")
    weight = dequantize(q)
    raw = path.read_bytes()
    for offset in (*range(0, 536, 7), 536):
        byte = byte_at(checkpoint, "w", offset)
        assert raw[byte.at] == byte.value == q.packed[offset]
        for half, index in zip(byte.halves, (2 * offset, 2 * offset + 1), strict=True):
            if index == WEIGHT.numel():
                assert (half.index, half.code) == (None, q.codes.new_tensor(int(q.packed[-1]) & 15))
                continue
            assert (half.index, half.code, half.place) == (index, q.codes[index], divmod(index, 29))
            assert (half.block, half.constant) == (index // q.block_size, q.absmax[index // q.block_size])
            assert half.level == q.levels[half.code] and half.value == weight[half.place]
            if q.double_quant:
                assert half.group == 0 and half.scale == q.constants.absmax_scale[0]
                assert half.constant_code == q.constants.absmax_codes[half.block]


def test_a_second_group_of_constants_has_its_own_scale(tmp_path):
    weight = torch.randn(300 * 64, generator=torch.Generator().manual_seed(1))
    tensors = stored("nf4", 64, True, weight=weight)
    byte = byte_at(Checkpoint(saved(tensors, tmp_path)), "w", 290 * 32)
    q = from_tensors(tensors, "w")
    assert byte.halves[0].group == 1 and byte.halves[0].scale == q.constants.absmax_scale[1]
    assert byte.halves[0].constant == q.absmax[290]


@pytest.mark.slow
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_writes_is_read(tmp_path, storage, quant_type, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))  # blocks that cross rows it misreads
    options = {"blocksize": 64, "compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    packed, state = functional.quantize_4bit(weight, **options)
    tensors = {f"w.{name}": tensor for name, tensor in state.as_dict(packed=True).items()} | {"w": packed}
    checkpoint = Checkpoint(saved(tensors, tmp_path))
    assert scanned(checkpoint, progress=False) == []
    q = from_tensors(tensors, "w")
    theirs = dequantize(q) if nested else functional.dequantize_4bit(packed, state)  # tests/quant compares those
    assert torch.equal(values(checkpoint, "w", 0, weight.numel()), theirs.flatten())
    assert byte_at(checkpoint, "w", 7).value == packed.view(torch.uint8).flatten()[7]


# -------------------------------------------------------------------------------------------------------------- faults


def damaged(change):
    tensors = stored("nf4", 64, True)
    change(tensors)
    return tensors


def described(tensors, **fields):
    """Change fields of the description."""
    (name,) = (name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[name].tolist())) | fields
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def digits(tensors, key, count):
    """A size that Python reads."""
    (name,) = (name for name in tensors if "quant_state" in name)
    text = bytes(tensors[name].tolist()).replace(b'"shape": [37, 29]', b'"shape": [' + b"9" * count + b"]")
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)


HARMLESS = ("something more", "no table of constants")  # only bitsandbytes refuses these
FAULTS = {
    "no codes": (lambda t: t.pop("w"), "w is missing"),
    "no constants": (lambda t: t.pop("w.absmax"), "w.absmax is missing"),
    "no scales": (lambda t: t.pop("w.nested_absmax"), "w.nested_absmax is missing"),
    "no table": (lambda t: t.pop("w.quant_map"), "w.quant_map is missing"),
    "no description": (lambda t: t.pop("w.quant_state.bitsandbytes__nf4"), "expected one key that starts with"),
    "two descriptions": (lambda t: t.update({"w.quant_state.x": torch.zeros(2)}), "expected one key that starts with"),
    "no table of constants": (lambda t: t.pop("w.nested_quant_map"), "w.nested_quant_map is missing: bitsandbytes"),
    "something more": (lambda t: t.update({"w.SCB": torch.zeros(2)}), "w.SCB is not part of its 4-bit tensor"),
    "codes too short": (lambda t: t.update(w=t["w"][:-1]), "w has 536 entries, but shape (37, 29) needs 537"),
    "constants too many": (lambda t: t.update({"w.absmax": torch.zeros(18, dtype=torch.uint8)}), "w.absmax has 18"),
    "scales too many": (lambda t: t.update({"w.nested_absmax": torch.zeros(2)}), "w.nested_absmax has 2 entries"),
    "constants of floats": (lambda t: t.update({"w.absmax": torch.ones(17)}), "w.absmax is F32, but uint8 is needed"),
    "codes of int32": (lambda t: t.update(w=torch.zeros(135, dtype=torch.int32)), "w is I32, but uint8"),
    "scales of NaN": (lambda t: t["w.nested_absmax"].fill_(torch.nan), "w has NaN or infinity"),
    "scales below 0": (lambda t: t["w.nested_absmax"].fill_(-1), "w.nested_absmax holds -1"),
    "a table of its own": (lambda t: t["w.quant_map"].neg_(), "w.quant_map is not the table of nf4"),
    "a huge table": (lambda t: t.update({"w.quant_map": torch.zeros(9999)}), "but at most 4096 are needed"),
    "an unknown data type": (lambda t: described(t, quant_type="nf5"), "w is stored as 'nf5'"),
    "an unknown field": (lambda t: described(t, colour="red"), "w is stored with colour='red'"),
    "a size of 64 bits": (lambda t: described(t, shape=[2**63]), "cannot be read"),
    "sizes of many digits": (lambda t: described(t, shape=[10**400] * 9), "cannot be read"),
    "a size of thousands of digits": (lambda t: digits(t, "w", 3900), "cannot be read"),
    "a block size of 0": (lambda t: described(t, blocksize=0), "cannot be read"),
    "a huge block size": (lambda t: described(t, blocksize=2**20), "block_size=1048576 is not allowed"),
    "another shape": (lambda t: described(t, shape=[37, 30]), "w has 537 entries, but shape (37, 30) needs 555"),
    "no JSON": (lambda t: t["w.quant_state.bitsandbytes__nf4"].fill_(7), "cannot be read: the checkpoint is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_other_tensors_are_read(tmp_path, fault):
    change, said = FAULTS[fault]
    tensors = damaged(change)
    others = {f"v{name[1:]}": tensor for name, tensor in stored("nf4", 64, True).items()}
    checkpoint = Checkpoint(saved(tensors | others, tmp_path))
    found = scanned(checkpoint, progress=False)
    assert said in " ".join(found) and all(len(sentence.splitlines()) == 1 for sentence in found)
    assert "v" in checkpoint.tensors and ("w" in checkpoint.tensors) == (fault in HARMLESS)
    assert checkpoint.plain == []
    if fault not in HARMLESS:
        with pytest.raises((KeyError, ValueError)):
            from_tensors(tensors, "w")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_a_constant_that_no_block_can_have_is_found_among_the_values(tmp_path, bad):
    tensors = stored("nf4", 64, False)
    tensors["w.absmax"][13] = bad
    checkpoint = Checkpoint(saved(tensors, tmp_path))
    assert checkpoint.faults == []
    (said,) = scanned(checkpoint, progress=False)
    assert said.startswith("w.absmax holds")


def test_padding_is_no_code(tmp_path):
    """Of nine levels, the last weight has one; the half byte beside it may hold anything."""
    tensors = stored(torch.linspace(-1, 1, 9), 64, False, weight=WEIGHT[:1])
    tensors["w"][-1] |= 15
    checkpoint = Checkpoint(saved(tensors, tmp_path))
    assert scanned(checkpoint, progress=False) == []
    last, padding = byte_at(checkpoint, "w", 14).halves
    assert last.index == 28 and (padding.code, padding.level, padding.index) == (15, None, None)
    assert from_tensors(tensors, "w").shape == (1, 29)


def test_a_code_without_a_level_is_found_among_the_values(tmp_path):
    tensors = stored(*OPTIONS[-1])
    tensors["w"][100] = 255
    (said,) = scanned(Checkpoint(saved(tensors, tmp_path)), progress=False)
    assert said == "w holds code 7, but its table has 5 levels"


LARGE = 2**26  # bytes of codes, in a file that holds zeros alone and takes no room on the disk
MIB = 2**20


def large(path):
    """A file of 72 MiB."""
    small = stored("nf4", 64, False)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2 * LARGE]}
    described(small, **state)
    text = bytes(small["w.quant_state.bitsandbytes__nf4"].tolist())
    levels = small["w.quant_map"].numpy().tobytes()
    sizes = {"w.quant_state.bitsandbytes__nf4": len(text), "w.quant_map": 64, "w.absmax": LARGE // 8, "w": LARGE}
    header, end = {}, 0
    for name, size in sizes.items():
        kind = {"shape": [size // 4]} if name in ("w.quant_map", "w.absmax") else {"shape": [size]}
        header[name] = kind | {"dtype": "F32" if kind["shape"] != [size] else "U8", "data_offsets": [end, end + size]}
        end += size
    start = json.dumps(header).encode()
    path.write_bytes(len(start).to_bytes(8, "little") + start + text + levels)
    os.truncate(path, 8 + len(start) + end)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """bench/xray.json has the figures of 4 GB. 24 MiB: some pieces of a MiB, and what malloc keeps."""
    path = large(tmp_path / "large")

    def look():
        checkpoint = Checkpoint(path)
        assert scanned(checkpoint, progress=False) == []
        assert byte_at(checkpoint, "w", LARGE - 1).halves[1].index == 2 * LARGE - 1
        (found,) = compare(checkpoint, Checkpoint(path), progress=False)
        assert found.is_equal

    assert path.stat().st_size > 72 * MIB and peak_bytes(look) < 24 * MIB


def test_a_byte_that_is_not_there(tmp_path):
    checkpoint = Checkpoint(saved(stored("nf4", 64, False) | {"b": torch.ones(2)}, tmp_path))
    with pytest.raises(ValueError, match="w has bytes 0 to 536, but byte 537 is asked for"):
        byte_at(checkpoint, "w", 537)
    with pytest.raises(ValueError, match="byte -1 is asked for"):
        byte_at(checkpoint, "w", -1)
    with pytest.raises(KeyError, match="b is not a 4-bit tensor"):
        byte_at(checkpoint, "b", 0)
    with pytest.raises(ValueError, match="w has 3 bits a code"):
        byte_at(Checkpoint(saved(stored(*OPTIONS[4]), tmp_path, "three.safetensors")), "w", 0)


def test_a_file_that_becomes_shorter_is_an_error_and_no_crash(tmp_path):
    path = saved(stored("nf4", 64, False), tmp_path)
    checkpoint = Checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(ValueError, match="has become shorter since it was opened"):
        for name in checkpoint.parts:
            checkpoint.read(name)


# ------------------------------------------------------------------------------------------------------------- headers


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def written(path, header, n_bytes=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_bytes))
    return path


HEADERS = {
    "overlapping": ({"a": entry(0, 5), "b": entry(4, 8)}, "b begins at byte .* and overlaps the tensor before it"),
    "a gap": ({"a": entry(0, 3), "b": entry(4, 8)}, "b begins at byte .* and leaves a gap"),
    "beyond the end": ({"a": entry(0, 9)}, "a ends at byte .*, but the file has .*: it is cut off"),
    "bytes left over": ({"a": entry(0, 7)}, "has 1 bytes after its last tensor"),
    "backwards": ({"a": entry(8, 0, shape=[8])}, "must have a start and an end"),
    "below 0": ({"a": entry(-8, 0)}, "must have a start and an end"),
    "offsets of floats": ({"a": entry(0, 8.0, shape=[8])}, "must have a start and an end"),
    "another size": ({"a": entry(0, 8, "F32")}, r"a has 8 bytes, but F32 of shape \(8,\) takes 32"),
    "a huge size": ({"a": entry(0, 8, shape=[2**62, 2**62])}, "a has 8 bytes, but U8 of shape"),
    "a size of 64 bits": ({"a": entry(0, 8, shape=[2**63])}, "at most 64 whole numbers below 2\\^63"),
    "a size of 4,000 digits": ({"a": entry(0, 8, shape=[10**4000])}, "at most 64 whole numbers below 2\\^63"),
    "offsets of 4,000 digits": ({"a": entry(0, 10**4000, shape=[8])}, "must have a start and an end"),
    "sizes without end": ({"a": entry(0, 8, shape=[2**62] * 10**5)}, "at most 64 whole numbers"),
    "a number of a million digits": (b'{"a": ' + b"9" * 10**6 + b"}", "a number has too many digits: write one of"),
    "a shape below 0": ({"a": entry(0, 8, shape=[-8])}, "a list of at most 64 whole numbers"),
    "an unknown dtype": ({"a": entry(0, 8, "F13")}, "a has dtype 'F13'"),
    "a dtype that is a list": ({"a": entry(0, 8, ["U8"])}, "a has dtype"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [8]}}, "must have a dtype, a shape and data_offsets"),
    "a list": ([1], "no header of safetensors"),
    "half a character": (b'{"\\ud800": 1}', "half of a surrogate pair"),
    "two of one name": (b'{"a": 1, "a": 2}', "the key 'a' appears twice"),
    "not JSON": (b"{'a': 1}", "not JSON"),
    "not UTF-8": (b'{"\xff\xfe', "is not UTF-8"),
    "a space first": (b' {"a": 1}', "no header of safetensors"),
    "nested without end": (b'{"a":' * 99999, "cannot be read|ends too early|nested"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_is_named(tmp_path, kind):
    header, said = HEADERS[kind]
    path = written(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=said) as error:
        Checkpoint(path)
    assert str(path) in str(error.value)
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt").__enter__()


def test_what_is_no_safetensors_file_is_named(tmp_path):
    file = tmp_path / "a.safetensors"
    for protocol in (2, 3, 4, 5):
        file.write_bytes(pickle.dumps({"w": [1.0] * 99}, protocol))
        with pytest.raises(ValueError, match="is a pickle, which can run any program: only safetensors"):
            Checkpoint(file)
    torch.save({"w": WEIGHT}, file)
    with pytest.raises(ValueError, match="a zip archive, which torch.save writes: it holds a pickle"):
        Checkpoint(file)
    file.write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(ValueError, match="is a GGUF file"):
        Checkpoint(file)
    for content in (b"", b"123", b"12345678", bytes([255] * 8)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="no header of safetensors: it is cut off, or of another format"):
            Checkpoint(file)
    with pytest.raises(FileNotFoundError):
        Checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_as_a_pickle_does_is_read(tmp_path, length):
    text = json.dumps({"a": entry(0, 8)}).encode().ljust(length)
    assert Checkpoint(written(tmp_path / "a.safetensors", text)).plain == ["a"]


def test_a_file_without_tensors_is_empty(tmp_path):
    checkpoint = Checkpoint(written(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}}, 0))
    assert (checkpoint.parts, checkpoint.tensors, checkpoint.faults) == ({}, {}, [])


def test_what_the_header_names_is_what_safetensors_reads(tmp_path):
    tensors = stored("nf4", 64, True) | {"b": torch.ones(3, 0), "c": torch.tensor(2.0), "d": WEIGHT.bfloat16()}
    path = saved(tensors, tmp_path)
    raw = path.read_bytes()
    parts = read_header(path)
    assert parts.keys() == tensors.keys()
    for name, tensor in load_file(path).items():
        assert raw[parts[name].start : parts[name].stop] == tensor.flatten().view(torch.uint8).numpy().tobytes()
        assert parts[name].shape == tensor.shape


def test_mutated_headers_are_read_or_refused_and_never_more_freely_than_by_safetensors(tmp_path):
    """A bounded part; `tools/fuzz.py X-ray` draws as many as you like."""
    good = saved(stored("nf4", 64, True), tmp_path).read_bytes()
    path = tmp_path / "b.safetensors"
    counts = {True: 0, False: 0}
    for seed in range(40):
        path.write_bytes(in_safetensors(good, Random(seed)))
        try:
            found = scanned(Checkpoint(path), progress=False)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            counts[False] += 1
            continue
        counts[True] += 1
        tensors = load_file(path)
        if not found and "w" in tensors:
            from_tensors(tensors, "w")
    assert min(counts.values()) > 4


# ------------------------------------------------------------------------------------------------------------- folders


def sharded(folder, where=None):
    tensors = stored("nf4", 64, True)
    first = {name: tensor for name, tensor in tensors.items() if "absmax" in name}
    saved(first, folder, "model-00001-of-00002.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    saved(rest, folder, "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(rest, where or "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def test_parts_of_a_tensor_may_lie_in_several_files(tmp_path):
    q = from_tensors(sharded(tmp_path), "w")
    checkpoint = Checkpoint(tmp_path)
    assert scanned(checkpoint, progress=False) == []
    assert torch.equal(values(checkpoint, "w", 0, WEIGHT.numel()), dequantize(q).flatten())


@pytest.mark.parametrize("where", ["../elsewhere.safetensors", "/etc/passwd", "a\\b.safetensors"])
def test_an_index_that_climbs_out_of_its_folder_is_refused(tmp_path, where):
    sharded(tmp_path, where)
    with pytest.raises(ValueError, match="it must be a \\*.safetensors file beside the index"):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no \\*.safetensors"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for number in (1, 2):
        saved(stored("nf4", 64, False), tmp_path, f"model-0000{number}-of-00002.safetensors")
    with pytest.raises(ValueError, match="is in model-00001-of-00002.safetensors and in model-00002"):
        Checkpoint(tmp_path)
