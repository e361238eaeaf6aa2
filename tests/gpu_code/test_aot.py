"""Machine code is read rightly, and that of every rung is what its docstring claims.

Outside truth: hand-made listings, NVIDIA's rules for occupancy worked by hand, and the machine code of bitsandbytes,
read by the same code in the same run.
"""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path

import pytest

from bench import machine_code as bench
from qlora_lab import cli
from qlora_lab.gpu_code import aot
from qlora_lab.gpu_code.cards import CARDS, LIMITS, occupancy, roof
from qlora_lab.gpu_code.machine_code import Instruction, accesses, loops, main_loop, mix, parse, sections, way

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles on Linux only")
ROOT = Path(__file__).parents[2]
H100 = next(card for card in CARDS if card.name == "H100")

# as nvdisasm -c prints it: a guard, a loop with a way for edges and one for full tiles, an end, padding
LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_1:
        /*0020*/                   ISETP.GE.AND P2, PT, R5, R38, PT ;
        /*0030*/              @!P2 BRA `(.L_x_2) ;
        /*0040*/              @!P3 LDG.E.64.CONSTANT R4, desc[UR4][R2.64] ;
        /*0050*/              @!P4 LDG.E.64.CONSTANT R6, desc[UR4][R2.64+0x8] ;
        /*0060*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
.L_x_3:
        /*0080*/                   NOP ;
        /*0090*/                   FFMA.FTZ R0, R4, R5, R0 ;
        /*00a0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/              @!P0 BRA `(.L_x_1) ;
        /*00c0*/                   F2FP.BF16.F32.PACK_AB R7, RZ, R0 ;
        /*00d0*/                   STG.E.U16 desc[UR4][R2.64], R7 ;
        /*00e0*/                   EXIT ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
        /*0100*/                   NOP;
"""


def names(code: list[Instruction]) -> str:
    return " ".join(instruction.name for instruction in code)


def test_nops_and_the_endless_branch_are_no_instructions():
    code = parse(LISTING)
    assert len(code) == 14 and code[-1].opcode == "EXIT" and "NOP" not in names(code)
    assert (code[1].predicate, code[3].target, code[6].target, code[10].target) == ("@P0", 7, 8, 2)


def test_text_without_code_is_refused():
    with pytest.raises(ValueError, match="holds no instruction"):
        parse("// nothing")


def test_a_full_tile_is_counted_not_its_edge():
    code = parse(LISTING)
    assert names(way(code)) == "LDC EXIT ISETP BRA LDG FFMA UIADD3 BRA F2FP STG EXIT"
    assert loops(code) == [(2, 10)]
    assert names(main_loop(code)) == "ISETP BRA LDG FFMA UIADD3 BRA"
    assert sum(instruction.access for instruction in main_loop(code)) == 16


def test_work_is_not_skipped_for_a_shorter_way():
    """A lane that has nothing to load jumps ahead; a lane of a full tile does not."""
    code = parse(
        """
        /*0000*/               @P1 BRA `(.L_x_1) ;
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   BRA.U UP0, `(.L_x_2) ;
        /*0030*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;
.L_x_2:
        /*0040*/               @P0 CALL.REL.NOINC `(.L_x_3) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   EXIT ;
"""
    )
    assert code[2].conditional and code[0].conditional and not code[5].conditional
    assert names(way(code)) == "BRA LDG BRA UTCHMMA CALL EXIT"
    assert loops(code) == [(2, 5)] and mix(main_loop(code))["tensor core"] == 1


def test_a_rare_case_behind_the_end_is_no_loop():
    code = parse(
        """
        /*0000*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/                   MUFU.RCP R4, R4 ;
        /*0040*/                   BRA `(.L_x_1) ;
"""
    )
    assert loops(code) == [] and main_loop(code) == [] and names(way(code)) == "BRA STG EXIT"


@pytest.mark.parametrize(
    "opcode, kind, access",
    [
        ("LDG.E.128.CONSTANT", "global load", 16),
        ("LDG.E.LTC128B.64", "global load", 8),
        ("LDG.E.U8", "global load", 1),
        ("LDGSTS.E.BYPASS.128", "global load", 16),
        ("UTMALDG.2D", "global load", 0),
        ("STG.E", "global store", 4),
        ("STG.E.U16", "global store", 2),
        ("LDSM.16.M88.4", "shared memory", 0),
        ("STL.64", "local memory", 0),
        ("HGMMA.64x128x16.F32.BF16", "tensor core", 0),
        ("IMAD.MOV.U32", "integer", 0),
        ("ULOP3.LUT", "integer", 0),
        ("HFMA2.MMA.BF16_V2", "float", 0),
        ("F2FP.BF16.F32.PACK_AB", "conversion", 0),
        ("ULDC.64", "other", 0),
        ("BAR.SYNC.DEFER_BLOCKING", "other", 0),
    ],
)
def test_kinds_and_widths(opcode, kind, access):
    assert (Instruction(opcode).kind, Instruction(opcode).access) == (kind, access)


def test_accesses_are_named_without_hints():
    assert accesses(parse(LISTING)) == {"LDG.E.128": 1, "LDG.E.64": 2, "STG.E.U16": 1}


def test_each_kernel_has_its_section():
    text = "".join(f"//{'-' * 21} .text.{name} {'-' * 26}\n{LISTING}" for name in ("_short_kernel   ", "_Z3long"))
    assert list(sections(text)) == ["_short_kernel", "_Z3long"] and len(parse(sections(text)["_Z3long"])) == 14


@pytest.mark.parametrize(
    "arch, registers, shared, warps, expected",
    [
        (80, 32, 0, 4, 64 / 64),  # 32 * 32 registers, 16 warps for each scheduler
        (90, 48, 0, 4, 40 / 64),  # 1536 registers, 10 warps for each scheduler
        (90, 41, 0, 4, 40 / 64),  # registers come in eights of a thread: as 48
        (80, 255, 0, 8, 8 / 64),  # 8192 registers, 2 warps for each scheduler, one block
        (80, 24, 0, 1, 32 / 64),  # 32 blocks at most
        (80, 16, 40 * 1024, 4, 16 / 64),  # 41 KiB with the system's, four times in 164
        (90, 16, 40 * 1024, 4, 20 / 64),  # five times in 228
        (80, 16, 164 * 1024, 4, 0),  # a block has 163 at most
        (100, 32, 227 * 1024, 8, 8 / 64),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert occupancy(arch, registers, shared, warps) == expected


def test_an_unknown_arch_is_named():
    with pytest.raises(ValueError, match="arch=86 is not known: choose one of"):
        occupancy(86, 48, 0, 4)


def test_roof_is_the_slowest_of_three():
    found = roof(H100, moved=3350e6, operations=0, dtype="bfloat16", instructions=0)
    assert (found.memory, found.product, found.seconds, found.bound) == (1e-3, 0, 1e-3, "memory")
    found = roof(H100, moved=0, operations=989e9, dtype="bfloat16", instructions=0)
    assert (found.seconds, found.bound) == (1e-3, "product")
    found = roof(H100, moved=0, operations=0, dtype="bfloat16", instructions=32 * 4 * 132 * 1.98e6)
    assert found.seconds == pytest.approx(1e-3) and found.bound == "issue"
    t4 = next(card for card in CARDS if card.name == "T4")
    assert roof(t4, 1.0, 1.0, "bfloat16", 1.0).seconds is None  # no unit for it


EXAMPLE = aot.Report(
    "dequantize_nf4", "_dequantize_nf4_kernel", 90, "bfloat16", 4, 48, 3072, 0, 0, 0.625, 200, 32.0, False,
    dict.fromkeys(mix([]), 0.0), 6.0, {}, 3.0, 2.5625, None,
)  # fmt: skip


def test_roofline_by_hand():
    found, faster = aot.roofline(EXAMPLE, (4096, 4096))
    assert faster.card == "H200" and faster.memory == pytest.approx(found.memory * 3350 / 4800)
    assert found.memory == pytest.approx(2**24 * 2.5625 / 3350e9) and found.bound == "memory"  # 12.8 us
    assert found.issue == pytest.approx(2**24 * 6 / 32 / (4 * 132 * 1.98e9)) and found.product == 0
    product = replace(EXAMPLE, rung="matmul_nf4", mix=EXAMPLE.mix | {"tensor core": 1.0}, tokens=64, least=0.5)
    found, faster = aot.roofline(product, (1024, 2048), tokens=100)
    assert (faster.product, faster.issue) == (found.product, found.issue)
    assert found.product == pytest.approx(2 * 100 * 2**21 / 989e12)
    assert found.memory == pytest.approx((0.5 * 2**21 + 100 * 3072 * 2) / 3350e9)  # the weight once, x and y
    assert found.issue == pytest.approx(2 * 2**21 * 6 / 32 / (4 * 132 * 1.98e9))  # two tiles of tokens
    found, _ = aot.roofline(replace(product, rung="gemv_nf4", mix=EXAMPLE.mix, tokens=1), (1024, 2048), tokens=100)
    assert found.memory == pytest.approx((0.5 * 2**21 + 3072 * 2) / 3350e9) and found.product == 0
    constants = replace(EXAMPLE, rung="double_dequantize", dtype="float32")
    assert aot.roofline(constants)[0].memory == pytest.approx(aot.roofline(EXAMPLE)[0].memory / 64)
    with pytest.raises(ValueError, match="tokens=0 are not allowed: each must be from 1 to 2,147"):
        aot.roofline(EXAMPLE, tokens=0)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["quantise"], "rung 'quantise' is not known: choose from quantize_nf4, dequantize_nf4,"),
        (["--sass", "quantise"], "rung 'quantise' is not known"),
        (["--ptx", "quantise"], "rung 'quantise' is not known"),
        (["dequantize_nf4", "--arch", "75"], "arch=75 is not known: compute capability times ten, 80, 90, 100"),
        (["dequantize_nf4", "--dtype", "int8"], "dtype 'int8' is not known: choose from float32, bfloat16, float16"),
        (["matmul_nf4", "--dtype", "float32"], "matmul_nf4 does not take float32: it takes bfloat16, float16"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(aot, "_child", None)  # nothing is compiled
    assert cli.main(["kernels", *argv]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out


def test_help_shows_an_example_and_a_word_is_no_architecture(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["kernels", "--help"])
    assert stop.value.code == 0 and "example: qlora-lab kernels" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as stop:
        cli.main(["kernels", "--arch", "hopper"])
    assert stop.value.code == 2


def test_without_triton_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(aot, "find_spec", lambda name: None)
    monkeypatch.setattr(aot, "_compiled", {})
    assert cli.main(["kernels", "dequantize_nf4"]) == 2
    assert "Triton, which compiles the kernels, is not installed" in capsys.readouterr().err


def test_without_bitsandbytes_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(aot, "find_spec", lambda name: None)
    aot._bitsandbytes.cache_clear()
    found, why = aot.bitsandbytes_report(90)
    aot._bitsandbytes.cache_clear()
    assert found is None and why.startswith("bitsandbytes is not installed")
    with pytest.raises(ValueError, match="arch=75"):
        aot.bitsandbytes_report(75)


def test_importing_is_light():
    code = "import sys, qlora_lab.gpu_code.aot; print([m for m in ('torch', 'triton', 'numba') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


RESULT = json.loads((ROOT / "bench" / "machine_code.json").read_text("utf-8"))


def test_the_page_is_made_from_the_json():
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    assert bench.in_page(page, RESULT) == page, "run: python bench/machine_code.py --render"
    with pytest.raises(ValueError, match="docs/gpu.md needs one line"):
        bench.in_page(f"{bench.BEGIN} {bench.BEGIN} {bench.END}", RESULT)


# ------------------------------------------------------------------------------------------------- real machine code

DTYPES = tuple(aot.DTYPES)
ARCHS = tuple(LIMITS)
# rung -> the load of packed weights and the store of the result, and 128-bit loads of x or grad by a thread in bf16
WIDE = {
    "dequantize_nf4": ("LDG.E.128", "STG.E.128", 0),
    "dequantize_double": ("LDG.E.128", "STG.E.128", 0),
    "gemv_nf4": ("LDG.E.128", None, 1),  # 1 token, 1024 columns, 128 threads; four rows' results are all it stores
    "matmul_nf4": ("LDGSTS.E.BYPASS.128", "STG.E.128", 4),  # 128 tokens, 64 columns, 256 threads
    "matmul_nf4_backward": ("LDGSTS.E.BYPASS.128", "STG.E.128", 4),
}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int, str], aot.Report]:
    """Every rung, architecture and dtype; half a minute."""
    found = {}
    for dtype in DTYPES:
        for one in aot.report(None, ARCHS, dtype):
            found[one.rung, one.arch, dtype] = one
    return found


@pytest.fixture(scope="module")
def theirs() -> dict[tuple[str, str], aot.Report]:
    """(rung, dtype) -> bitsandbytes' kernel on sm_90, the first listed for a rung."""
    found = {}
    for dtype in DTYPES:
        reports, why = aot.bitsandbytes_report(90, dtype)
        assert reports, why
        for one in reports:
            found.setdefault((one.rung, dtype), one)
    return found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rung", aot.RUNGS)
def test_nothing_is_spilled(compiled, rung, arch):
    reports = [one for key, one in compiled.items() if key[:2] == (rung, arch)]
    assert len(reports) >= 2  # a rung takes two dtypes or is reported for all three
    for one in reports:
        assert (one.spills, one.local, one.mix["local memory"]) == (0, 0, 0), one.dtype
        assert one.occupancy > 0 and one.registers <= 255
        assert one.moved >= 0.5 and one.weights >= 1 and one.per_weight == pytest.approx(sum(one.mix.values()))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("rung", "dtype"), [(rung, dtype) for rung in WIDE for dtype in aot.RUNGS[rung].dtypes])
def test_packed_weights_and_results_move_in_128_bits(compiled, rung, arch, dtype):
    """In a tile, or a pass of the loop, a thread loads its packed weights, 32 at a time, and x, and nothing as wide."""
    load, store, others = WIDE[rung]
    one = compiled[rung, arch, dtype]
    code = parse(aot.sass(rung, arch, dtype))
    counted = accesses(main_loop(code) if one.loop else way(code))
    assert counted[load] == one.weights / 32 + others * aot.DTYPES[dtype][1] / 2, counted
    store = store or f"STG.E.{4 * 8 * aot.DTYPES[dtype][1]}"
    assert {name for name in one.accesses if name.startswith("ST")} == {store}, one.accesses


OTHER_LAUNCHES = """
import json, sys
from dataclasses import replace
from pathlib import Path
from qlora_lab.gpu_code import aot
from qlora_lab.kernels.triton.matmul_nf4 import FEW
plain = {"GROUP_SIZE": 0, "scale": None, "offset": None, "table": None}
changes = [plain, plain | {"RANK": 0, "u": None, "lora_B": None}]
changes += [{"n_tokens": 3, "TOKENS": tokens} for tokens in (2, 4, 8)] + [{"BLOCK_SIZE": size} for size in (32, 4096)]
changes += [{"BLOCK_SIZE": 4096, "TILE": 4096, "num_warps": 4}, {"RANK": 256}]
changes += [dict(zip(("TOKENS", "ROWS", "COLUMNS", "num_warps"), FEW))]
rungs = dict(aot.RUNGS)
folder, launches = sys.argv[1], json.loads(sys.argv[2])
for name, number in launches:
    change, rung = changes[number], rungs[name]
    if name == "gemv_nf4" and "TOKENS" in change:
        from qlora_lab.kernels.triton.gemv_nf4 import TILES
        change |= dict(zip(("ROWS", "WORDS"), TILES[change["TOKENS"]]))
    if change.get("GROUP_SIZE") == 0:
        double = "absmax:*u8 scale:*fp32 offset:*fp32 table:*fp32"
        rung = replace(rung, signature=rung.signature.replace(double, "absmax:*fp32"))
    if change.get("RANK") == 0:
        rung = replace(rung, signature=rung.signature.replace(" u:*T lora_B:*T", ""))
    aot.RUNGS[name] = replace(rung, launch=lambda m: rungs[name].launch(m) | change)
    (Path(folder) / f"{name}-{number}").mkdir()
    aot._main(f"{folder}/{name}-{number}", json.dumps([[name, arch, "bfloat16"] for arch in (80, 90)]))
"""


LAUNCHES = {
    "gemv_nf4": [0, 2, 3, 4, 5, 6],
    "matmul_nf4": [0, 1, 5, 6, 8, 9],
    "matmul_nf4_backward": [0],
    "quantize_nf4": [5, 7],
    "dequantize_double": [6],
}


@needs_triton
@pytest.mark.slow
def test_other_launches_compile_without_spills(tmp_path, monkeypatch):
    """Constants that are not quantised, no adapter, more and fewer tokens, the smallest and the largest blocks.

    One process, which imports torch and Triton once, compiles all of them.
    """
    monkeypatch.delenv("TRITON_INTERPRET")
    launches = [(rung, number) for rung, numbers in LAUNCHES.items() for number in numbers]
    command = [sys.executable, "-W", "ignore", "-c", OTHER_LAUNCHES, str(tmp_path), json.dumps(launches)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = {cubin: aot._resources(cubin) for cubin in tmp_path.glob("*/*.cubin")}
    assert len(used) == 2 * len(launches)
    local = {cubin: [kernel["local"] for kernel in kernels.values()] for cubin, kernels in used.items()}
    assert local == dict.fromkeys(used, [0])  # one kernel each; the folder names rung and change


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rung", ["dequantize_nf4", "dequantize_double"])
def test_a_third_of_the_instructions_of_bitsandbytes(compiled, theirs, rung, dtype):
    """Against its kernel for constants that are ready: where they are quantised, it launches one more."""
    ours, peer = compiled[rung, 90, dtype], theirs[rung, dtype]
    assert peer.kernel.startswith("kDequantizeBlockwise<") and peer.weights == 16
    assert 20 < peer.per_weight < 30  # 0.50.2: 424 instructions in bf16 and fp16, 404 in float32
    assert ours.per_weight <= 0.35 * peer.per_weight


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rung", ["matmul_nf4", "matmul_nf4_backward"])
def test_tensor_cores_work_inside_the_loop(compiled, rung, arch):
    for dtype in aot.HALVES:
        one = compiled[rung, arch, dtype]
        assert one.loop and one.mix["tensor core"] > 0
        assert one.moved < 4  # one pass: with two unrolled, or none found, counts for each weight would be wrong


@needs_triton
@pytest.mark.slow
def test_the_json_is_of_these_kernels(compiled):
    """Another version of Triton may compile otherwise; it compiles the same kernels."""
    new = bench.records(compiled.values())
    assert {(row["rung"], row["arch"], row["dtype"]) for row in new} == {
        (row["rung"], row["arch"], row["dtype"]) for row in RESULT["ours"]
    }
    if version("triton") == RESULT["versions"]["triton"]:
        key = itemgetter("rung", "arch", "dtype")
        assert sorted(new, key=key) == sorted(RESULT["ours"], key=key), "run: python bench/machine_code.py"


@needs_triton
@pytest.mark.slow
def test_code_can_be_read(compiled, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the child compiles all the same
    monkeypatch.setattr(aot, "_compiled", {})
    text = aot.sass("dequantize_nf4", 90, "bfloat16")
    assert len(parse(text)) == compiled["dequantize_nf4", 90, "bfloat16"].instructions
    assert ".target sm_90" in aot.ptx("dequantize_nf4", 90, "bfloat16")
    assert cli.main(["kernels", "--sass", "dequantize_nf4"]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


@needs_triton
@pytest.mark.slow
def test_the_command_prints_a_table_or_json(compiled, theirs, capsys):
    assert cli.main(["kernels", "dequantize_nf4", "gemv_nf4", "--arch", "90", "--compare", "--json", "--quiet"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["kernel"].split("<")[0] for one in shown["kernels"]] == [
        "_dequantize_nf4_kernel", "kDequantizeBlockwise", "_gemv_nf4_kernel", "gemm_4bit_simt",
        "kgemm_4bit_inference_naive",
    ]  # fmt: skip
    assert shown["kernels"][0]["per_weight"] == compiled["dequantize_nf4", 90, "bfloat16"].per_weight
    assert shown["kernels"][0]["roofline"][0]["card"] == "H100" and len(shown["notes"]) == 1
    assert cli.main(["kernels", "--arch", "80", "--arch", "90", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["rung", "sm", "tensor"] and max(map(len, lines)) <= 120
    assert sum(line.startswith("matmul_nf4 ") for line in lines) == 6  # two architectures in three tables
    assert "a model, not a measurement" in " ".join(lines)
