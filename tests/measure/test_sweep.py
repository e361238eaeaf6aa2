"""A sweep: rows that load and perplexity agree with, weights that come back, and a file that survives everything."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lab import cli
from qlora_lab.files.checksums import DIFFERS, OK
from qlora_lab.files.results_file import ROW, START, append_result, open_results, read_results, verify_rows
from qlora_lab.measure import in_place, sweep as module
from qlora_lab.measure.code_use import code_counts
from qlora_lab.measure.in_place import Source, Variant, quantised_in_place
from qlora_lab.measure.perplexity import perplexity
from qlora_lab.measure.sweep import sweep, variants
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.load import load
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.quant.quantize import dequantize, quantize
from tests.model.families import tiny

TEXT = "the sum of the two numbers is a number, and nothing else. " * 4
pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = (-1.0, -0.25, 0.0, 0.25, 1.0)


@pytest.fixture
def results(tmp_path):
    return tmp_path / "there" / "results.jsonl"


def quiet(folder, settings, results, **kwargs):
    options = {"windows": 3, "length": 12, "text": TEXT, "progress": False}
    return sweep(folder, settings, results, **options | kwargs)


@pytest.fixture
def counted(monkeypatch):
    """How many settings were measured; `at` raises KeyboardInterrupt at that one."""
    seen, real = {"n": 0, "at": None}, module.window_losses

    def losses(*args):
        seen["n"] += 1
        if seen["n"] == seen["at"]:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "window_losses", losses)
    return seen


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_says_what_load_and_perplexity_say(folder, results, dtype):
    settings = [Variant(None), Variant("nf4", 32), ("nf3", 64, True), ("e2m1", 16, False)]
    rows = quiet(folder, settings, results, dtype=dtype)
    for (codebook, *how), row in zip(settings, rows, strict=True):
        options = {"codebook": codebook} | dict(zip(("block_size", "double_quant"), how, strict=False))
        model, tokenizer = load(folder, **options, dtype=dtype, progress=False)
        want = perplexity(model, tokenizer, TEXT, 12, 3)
        assert row["perplexity"] == pytest.approx(want, rel=1e-4 if dtype == torch.float32 else 0.05)
        assert row["perplexity"] == pytest.approx(math.exp(sum(row["window_losses"]) / 3))
        layers = [m.weight for m in model.modules() if isinstance(m, Linear4bit)]
        bits = 8 * sum(q.nbytes for q in layers) / sum(q.numel for q in layers) if layers else 32
        assert row["bits_per_parameter"] == pytest.approx(bits)


@pytest.mark.long
def test_experts_of_a_mixture_are_swept_as_load_quantises_them(tmp_path, tokenizer, results):
    mixture = tiny("Mixtral", vocab_size=280, initializer_range=0.3)
    mixture.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain, row = quiet(tmp_path / "model", [Variant(None), Variant("nf3", 32, True)], results)
    model, _ = load(tmp_path / "model", "nf3", 32, True, dtype=torch.float32, device="cpu", progress=False)
    assert row["perplexity"] == pytest.approx(perplexity(model, tokenizer, TEXT, 12, 3), rel=1e-4)
    packed = [m.weight for m in model.modules() if isinstance(m, PackedModule)]
    assert row["bits_per_parameter"] == 8 * sum(q.nbytes for q in packed) / sum(q.numel for q in packed)
    stacks = {f"model.layers.*.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert stacks < set(row["layer_errors"]) and len(row["layer_errors"]["model.layers.*.mlp.experts.down_proj"]) == 2
    assert row["perplexity"] != plain["perplexity"]

    source, before = Source(mixture, tmp_path / "model"), parameters(mixture)
    with quantised_in_place(source, Variant("fp4", 32)):
        changed = {name for name, weight in parameters(mixture).items() if not torch.equal(weight[1], before[name][1])}
        assert changed == set(source.names) and len(changed) == 2 * (4 + 2)  # routers, embeddings and norms stay
    assert same(mixture, before)


def test_errors_and_codes_are_those_of_the_weights(folder, results):
    (row,) = quiet(folder, [Variant("nf4", 32)], results)
    stored = load_file(folder / "model.safetensors")
    weights = {name: stored[name] for name in stored if name.endswith("_proj.weight")}
    q = {name: quantize(weight, "nf4", 32) for name, weight in weights.items()}
    square = {name: (dequantize(q[name]) - weight).square().sum() for name, weight in weights.items()}
    everything = sum(weight.square().sum() for weight in weights.values())
    assert row["relative_error"] == pytest.approx(float(sum(square.values()) / everything))
    assert set(row["layer_errors"]) == {re.sub(r"\.\d\.", ".*.", n.removesuffix(".weight")) for n in weights}
    down = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    want = [float(square[name] / weights[name].square().sum()) for name in down]
    assert row["layer_errors"]["model.layers.*.mlp.down_proj"] == pytest.approx(want, rel=1e-4)
    counts = sum(torch.bincount(one.codes.int(), minlength=16) for one in q.values())
    share = counts.double() / counts.sum()
    assert row["code_share"] == pytest.approx(share.tolist(), rel=1e-4)
    assert row["entropy"] == pytest.approx(-float((share * share.log2()).sum()))


@pytest.mark.parametrize("codebook", ["nf2", "nf3", "nf4", "int5", "int8"])
@pytest.mark.parametrize("n", [64, 65])  # the last byte is full, or filled up
def test_codes_are_counted_without_the_filling(codebook, n):
    q = quantize(torch.randn(n, generator=torch.Generator().manual_seed(0)), codebook)
    assert code_counts(q).tolist() == torch.bincount(q.codes.int(), minlength=2**q.bits).tolist()


@pytest.mark.long
def test_levels_by_hand_and_levels_fitted(folder, results):
    settings = [Variant("mine", 32, False, LEVELS), Variant("lloyd-max", 32), Variant("lloyd-max3", 32), ("nf4", 32)]
    mine, fitted, smaller, nf4 = quiet(folder, settings, results)
    assert mine["levels"] == list(LEVELS) and mine["codebook"] == "mine" and len(mine["code_share"]) == 8
    assert (len(fitted["levels"]), len(smaller["levels"]), nf4["levels"]) == (16, 8, None)
    assert fitted["relative_error"] < nf4["relative_error"] < smaller["relative_error"]
    other = quiet(folder, [Variant("mine", 32, False, torch.tensor([*LEVELS[:-1], 0.9]))], results)
    assert other[0]["relative_error"] != mine["relative_error"] and len(read_results(results)) == 5  # not mistaken


def test_a_row_says_where_it_comes_from(folder, results):
    (row,) = quiet(folder, [Variant(None)], results)
    assert row["model"]["source"] == "a local folder" and row["model"]["name"] == str(folder)
    assert row["config"] == {"windows": 3, "length": 12, "dtype": "float32", "device": "cpu"}
    assert row["data"]["name"] == "text of the caller" and row["seed"] is None
    assert row["data"]["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert {"processor", "GPU", "instructions"} <= row["machine"].keys()
    assert row["versions"]["torch"] == torch.__version__ and row["seconds"] > 0
    assert row["processor_seconds"] > 0
    assert row.keys() == {*ROW, "seed", "date", "commit", "machine", "seconds", "processor_seconds", "sha256"}
    assert json.loads(results.read_text()) == row and results.read_bytes().startswith(START)
    (folder / "source.json").write_text('{"source": "a wheel"}')
    assert module.model_record("known", folder)["source"] == "a wheel"
    cached = folder.parent / "models--org--name" / "snapshots" / "c0ffee"
    shutil.copytree(folder, cached)
    for note in ("{}", "[1]", "no JSON"):  # somebody else's file of that name
        (cached / "source.json").write_text(note)
        assert module.model_record("org/name", cached)["source"] == "hub org/name, commit c0ffee"
    (cached / "source.json").unlink()
    assert module.model_record("org/name", cached)["source"] == "hub org/name, commit c0ffee"


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "qlora_lab" / "measure" / "sweep.py"))
    assert module.commit() is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", module.commit())


# -------------------------------------------------------------------------------------------------------------- restore


def parameters(model):
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def same(model, before):
    now = parameters(model)
    return all(now[name][0] == where and torch.equal(now[name][1], value) for name, (where, value) in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_bit_in_the_same_memory(folder, dtype):
    model, _ = load(folder, None, dtype=dtype, progress=False)
    source, before = Source(model, folder), parameters(model)
    with quantised_in_place(source, Variant("nf4", 64)):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n][1])]
        assert sorted(changed) == sorted(source.names) and len(changed) == 14 and "lm_head.weight" not in changed
        name = source.names[0]
        want = dequantize(quantize(load_file(folder / "model.safetensors")[name], "nf4"), dtype)
        assert torch.equal(model.get_parameter(name), want)
    assert same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_after_an_error(folder, error, monkeypatch):
    model, _ = load(folder, None, dtype=torch.float32, progress=False)
    source, before = Source(model, folder), parameters(model)
    with pytest.raises(error), quantised_in_place(source, Variant("nf4", 64)):
        raise error
    assert same(model, before)
    real, calls = in_place.dequantize, []

    def stopped(*args):  # after five weights
        calls.append(args)
        if len(calls) > 5:
            raise error
        return real(*args)

    monkeypatch.setattr(in_place, "dequantize", stopped)
    with pytest.raises(error), quantised_in_place(source, Variant("nf4", 64)):
        raise AssertionError("it was not stopped")
    assert len(calls) == 6 and same(model, before)


def test_ctrl_c_waits_for_a_tensor_and_for_all_that_come_back(folder, monkeypatch):
    model, _ = load(folder, None, dtype=torch.float32, progress=False)
    source, before = Source(model, folder), parameters(model)
    real, read = source.stored, []

    def pressed(name):
        if name == source.names[4]:
            signal.raise_signal(signal.SIGINT)
        read.append(name)
        return real(name)

    with pytest.raises(KeyboardInterrupt), quantised_in_place(source, Variant("nf4", 64)):
        monkeypatch.setattr(source, "stored", pressed)
    assert read == source.names and same(model, before)
    with pytest.raises(KeyboardInterrupt):
        source.read(source.names[4])
    assert read[-1] == source.names[4]  # not within it


# --------------------------------------------------------------------------------------------------------------- resume

FOUR = variants(["nf4"], [32, 64]) + [Variant("fp4", 32)]


@pytest.mark.long
def test_an_interrupted_sweep_goes_on(folder, results, tmp_path, counted):
    counted["at"] = 3
    with pytest.raises(KeyboardInterrupt, match=r"2 of 4 settings are in .*results.jsonl; the same call goes on"):
        quiet(folder, FOUR, results)
    first = results.read_bytes()
    assert len(first.splitlines()) == 2
    rows = quiet(folder, FOUR, results)
    assert counted["n"] == 3 + 2 and results.read_bytes().startswith(first)
    assert quiet(folder, [*FOUR, FOUR[1]], results) == [*rows, rows[1]] and counted["n"] == 5
    whole = quiet(folder, FOUR, tmp_path / "whole.jsonl")
    assert [row["window_losses"] for row in rows] == [row["window_losses"] for row in whole]


@pytest.mark.long
@pytest.mark.parametrize("change", ["text", "length", "dtype", "weights", "config", "version"])
def test_a_row_of_something_else_is_not_taken(folder, results, counted, change, monkeypatch):
    quiet(folder, [Variant(None)], results)
    options = {"text": {"text": TEXT.upper()}, "length": {"length": 10}, "dtype": {"dtype": torch.bfloat16}}
    if change == "weights":
        stored = load_file(folder / "model.safetensors")
        stored["model.norm.weight"][0] += 1
        save_file(stored, folder / "model.safetensors")
    if change == "config":  # the weights stay, and rotate by other angles
        config = folder / "config.json"
        config.write_text(config.read_text().replace("10000.0", "20.0"))
    if change == "version":
        monkeypatch.setattr(module, "installed_version", lambda name: "9")
    quiet(folder, [Variant(None)], results, **options.get(change, {}))
    first, second = read_results(results)
    assert counted["n"] == 2
    assert (first["perplexity"] == second["perplexity"]) == (change == "version")


@pytest.mark.long
def test_a_row_of_another_quantiser_is_not_taken(folder, results, counted, monkeypatch):
    quiet(folder, [("nf4", 64)], results)
    real = in_place.quantize
    monkeypatch.setattr(in_place, "quantize", lambda weight, *args, **kwargs: real(0.999 * weight, *args, **kwargs))
    quiet(folder, [("nf4", 64), Variant(None)], results)
    assert counted["n"] == 3 and len({row["quantiser"] for row in read_results(results)}) == 3
    quiet(folder, [("nf4", 64), Variant(None)], results)
    assert counted["n"] == 3


@pytest.mark.long
def test_a_seed_decides_only_where_it_draws(folder, results, counted, monkeypatch):
    monkeypatch.setattr(in_place, "SAMPLE", 256)  # a part of the weights
    settings = [Variant(None), ("nf4", 64, True), ("lloyd-max", 16)]
    rows = quiet(folder, settings, results)
    assert [row["seed"] for row in rows] == [None, None, 0]
    assert quiet(folder, [(None, 99), ("nf4", 64, 1), settings[2]], results, seed=0) == rows and counted["n"] == 3
    again = quiet(folder, settings, results, seed=1)
    assert again[:2] == rows[:2] and counted["n"] == 4
    assert again[2]["seed"] == 1 and again[2]["levels"] != rows[2]["levels"]


# ----------------------------------------------------------------------------------------------------- the results file


@pytest.mark.long
@pytest.mark.parametrize("left", [1, 0.5, -2])  # bytes, or a share, of the last line with its new line
def test_a_torn_last_line_is_removed_and_run_again(folder, results, counted, left):
    rows = quiet(folder, FOUR[:2], results)
    first, last = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(first + last[: int(left * len(last)) if isinstance(left, float) else left])
    torn = results.read_bytes()
    with pytest.warns(UserWarning, match=r"line 2 was torn off and is left out, .* it began '\{"):
        assert read_results(results) == rows[:1]
    assert results.read_bytes() == torn  # a plot changes nothing
    with pytest.warns(UserWarning, match="line 2 was torn off"):
        again = quiet(folder, FOUR[:2], results)
    assert counted["n"] == 3 and again[1]["window_losses"] == rows[1]["window_losses"]
    assert results.read_bytes().startswith(first) and read_results(results) == again


def test_a_last_line_without_its_end_is_kept(folder, results):
    quiet(folder, FOUR[:2], results)
    whole = results.read_bytes()
    results.write_bytes(whole[:-1])
    with pytest.warns(UserWarning, match="line 2 was torn off behind its last character, so nothing is lost"):
        quiet(folder, FOUR[:2], results)
    assert results.read_bytes() == whole


def test_every_bit_of_a_row_is_covered_by_its_checksum(folder, results, capsys):
    quiet(folder, FOUR[:2], results)
    assert cli.main(["verify", str(results)]) == 0 and capsys.readouterr().out == "row 1  ok\nrow 2  ok\n"
    whole = results.read_bytes()
    first, second = whole.splitlines(keepends=True)
    *fields, digest = json.loads(first).items()
    text = json.dumps(dict(fields)).encode()
    assert digest == ("sha256", hashlib.sha256(text).hexdigest())
    for position in range(0, len(first) - 1, 97):
        changed = first[:position] + bytes([first[position] ^ 1]) + first[position + 1 :]
        results.write_bytes(changed + second)
        assert [part.state for part in verify_rows(results)] == [DIFFERS, OK]
    results.write_bytes(first + second[:-9])
    assert cli.main(["verify", str(results)]) == 1 and "row 2  differs" in capsys.readouterr().out
    results.write_bytes(first + text + b"\n")  # a row that has lost its checksum
    assert [part.state for part in verify_rows(results)] == [OK, DIFFERS]


@pytest.mark.long
def test_a_file_without_end_is_not_read_to_be_verified(tmp_path, capsys):
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.truncate(2**40)  # without blocks on the disk
    assert cli.main(["verify", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl has 1,048,576.0 MiB, but at most 64 are read" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"", b"{}", b"[1]", b"7", b'{"model": "nf4"}', b'{"codebook": "nf4"', b"\xff"])
def test_any_other_damage_is_named_and_left(results, line):
    results.parent.mkdir()
    damaged = line + b"\n" + b"and more"
    results.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"line 1 is not a row of a sweep \(.*mend it, or name another file"):
        quiet("nowhere", [Variant(None)], results)
    assert results.read_bytes() == damaged


@pytest.mark.parametrize(
    "last", [b'["notes of mine"]', b"7", b'{"model": {"name": 1}}', b"notes", b'{"cells": [', b"{", 9 * b"\0"]
)
def test_a_file_of_something_else_is_not_cut_for_want_of_a_new_line(results, last):
    results.parent.mkdir()
    results.write_bytes(last)
    with pytest.raises(ValueError, match="line 1 is not a row of a sweep"):
        quiet("nowhere", [Variant(None)], results)
    assert results.read_bytes() == last


@pytest.mark.long
def test_what_editors_and_power_cuts_do_to_a_file(folder, results, counted):
    rows = quiet(folder, FOUR[:2], results)
    lines = results.read_bytes().splitlines()
    results.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n" + 9 * b"\0")
    with pytest.warns(UserWarning, match="line 3 was torn off"):
        assert quiet(folder, FOUR[:2], results) == rows and counted["n"] == 2


@pytest.mark.parametrize("lacking", ["quantiser", "entropy", "weights_sha256", "config_sha256"])
def test_a_row_that_lacks_a_field_is_refused(folder, results, lacking):
    (row,) = quiet(folder, [Variant(None)], results)
    (row["model"] if lacking.endswith("sha256") else row).pop(lacking)
    results.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"line 1 is not a row of a sweep \(.*'{lacking}'.*\): mend it"):
        read_results(results)


def test_two_sweeps_do_not_write_to_one_file(folder, results, counted):
    with open_results(results), pytest.raises(BlockingIOError, match=r"is in use by this very process \(sweep\) since"):
        quiet(folder, [Variant(None)], results)
    assert not counted["n"] and quiet(folder, [Variant(None)], results) == read_results(results)


def test_a_file_system_without_locks_will_do(results, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", none)
    said = "cannot be locked .Function not implemented.: let no other command write there"
    with pytest.warns(UserWarning, match=said), open_results(results) as (rows, _):
        assert rows == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="it is a device of Linux")
def test_a_full_disk_is_told_with_the_name_of_the_file():
    said = "/dev/full: a row cannot be written .No space left on device.; earlier rows are safe"
    with open("/dev/full", "ab", buffering=0) as full, pytest.raises(OSError, match=said):
        append_result(full, {"codebook": "nf4"})


def test_a_disk_that_is_full_within_a_row_is_told(tmp_path):
    resource = pytest.importorskip("resource")  # which Windows has not
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "rows").open("ab", buffering=0) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9, before[1]))  # bytes of a file
        try:
            with pytest.raises(OSError, match=r"rows: a row cannot be written \(File too large\)"):
                append_result(file, {"codebook": "nf4"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "rows").read_bytes() == b'{"codeboo'


def test_what_is_no_file_is_said_before_anything_is_loaded(tmp_path):
    for name in (tmp_path, os.devnull):
        with pytest.raises(OSError, match="is a folder or a device: name a file for the results"):
            quiet("nowhere", [Variant(None)], name)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "setting, error, message",
    [
        (("nf5", 64), ValueError, "codebook 'nf5' is not known"),
        (("lloyd-max9", 64), ValueError, "'lloyd-max9' is not known: .* int8, lloyd-max, or give levels"),
        (("nf4", 8), ValueError, "block_size=8 is not allowed"),
        (("mine", 64, False, [0.0, 0.0, 1.0]), ValueError, "mine: level 1, 0, is repeated"),
        (("nf4", 64, False, LEVELS), ValueError, "under the name 'nf4', which stands for others"),
        (("none", 64, False, LEVELS), ValueError, "under the name 'none', which stands for others"),
        ((None, 64, False, LEVELS), ValueError, "levels are given without a name"),
        ("nf4", TypeError, "setting 'nf4': give a Variant, or a tuple"),
        ((torch.tensor(LEVELS), 64), TypeError, "give a Variant, or a tuple"),
        ((), TypeError, "give a Variant, or a tuple"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(results, setting, error, message):
    with pytest.raises(error, match=message):
        quiet("nowhere", [Variant(None), setting], results)
    assert not results.exists()


@pytest.mark.parametrize("options", [{"windows": 0}, {"length": 1}, {"seed": -1}, {"seed": 2**63}])
def test_options_are_checked_before_anything_is_loaded(results, options):
    with pytest.raises(ValueError, match="(seed=|windows=0|length=1)"):
        quiet("nowhere", [Variant(None)], results, **options)
    assert not results.exists()


def test_a_mistyped_model_leaves_no_results(tmp_path):
    with pytest.raises(ValueError, match="unknown model 'smolm'"):
        quiet("smolm", [Variant(None)], tmp_path / "made" / "rows.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["empty.jsonl", "link.jsonl"])
def test_an_empty_file_and_a_link_of_a_users_stay(tmp_path, name):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("target.jsonl")
    with pytest.raises(ValueError, match="unknown model 'smolm'"):
        quiet("smolm", [Variant(None)], tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "link.jsonl"]


def test_windows_longer_than_those_the_model_was_made_for_are_told(folder, tiny_llama, results):
    tiny_llama.config.max_position_embeddings = 11
    tiny_llama.save_pretrained(folder)
    with pytest.warns(UserWarning, match="a window has 12 tokens, but LlamaForCausalLM was made for 11 positions"):
        quiet(folder, [Variant(None)], results)


def test_a_quantised_folder_is_no_original(folder, results, tmp_path):
    quantize_folder(folder, tmp_path / "small", "nf4", 64, True, progress=False)
    with pytest.raises(ValueError, match="is quantised already, as .*: a sweep starts from the original"):
        quiet(tmp_path / "small", [Variant(None)], results)


@pytest.mark.parametrize("losses", [[1.0, math.nan], [1e3, 1e3]])  # exp(1000) is no float
def test_a_loss_that_is_no_number_is_no_row(folder, results, monkeypatch, losses):
    monkeypatch.setattr(module, "window_losses", lambda *args: losses)
    with pytest.raises(FloatingPointError, match="nf4, blocks of 64: the losses of the windows are"):
        quiet(folder, [Variant()], results)
    assert read_results(results) == []


def test_weights_that_are_all_zero_have_no_error():
    record = in_place.Figures({"q.weight": 0.0}, {"q.weight": 0.0}, bits=72, weights=16).record()
    assert record["relative_error"] == 0 and record["layer_errors"] == {"q": [0.0]}


def test_a_file_as_large_as_a_disk_is_not_read_to_be_verified(tmp_path):
    with (tmp_path / "disk.img").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="disk.img has 1,048,576.0 MiB, but at most 64 are read"):
        verify_rows(tmp_path / "disk.img")
