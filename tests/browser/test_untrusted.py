"""Another script on the page sends impossible states: nothing changes, nothing is raised, and one sentence says why."""

import nbformat
import pytest
from playwright.sync_api import expect

DOOR = """import anywidget
class Door(anywidget.AnyWidget):
    _esm = "export default { render({ model }) { window.manager = model.widget_manager } }"
Door()"""
CELLS = [
    "from qlora_lab.show.data_types import CodebookExplorer",
    "from qlora_lab.show.normal_float import NormalFloatExplorer",
    DOOR,
    "NormalFloatExplorer()",
    "CodebookExplorer()",
]
LISTEN = """() => {
  window.raised = [];
  window.jupyterapp.shell.currentWidget.sessionContext.iopubMessage.connect((_, message) => {
    if (["error", "stream"].includes(message.header.msg_type)) window.raised.push(message.content);
  });
}"""
SEND = """async ([name, state]) => {
  for (const [field, value] of Object.entries(state)) if (value === "NaN") state[field] = NaN;
  const models = await Promise.all(Object.values(window.manager._models));
  const model = models.find((one) => one.get("description") === name);
  for (const [field, value] of Object.entries(state)) model.set(field, value);
  model.save_changes();
  while (model._pending_msgs) await new Promise((done) => setTimeout(done, 5));  // else the next one joins this one
}"""
LEVELS = [round(-0.8 + 0.1 * i, 1) for i in range(16)]
ANYTHING = ["x", "x" * 100_000, None, "NaN", 1.5, [1], {"a": 1}, -1]
NO_LEVELS = [LEVELS[::-1], [*LEVELS, 0.9], [LEVELS] * 16, [None] * 16, ["a"] * 16]
HOSTILE = {
    "Bits": [{"position": value} for value in [*ANYTHING, 10**9]],
    "Symmetric": [{"value": value} for value in [*ANYTHING, 3]],
    "Reset": [{"clicks": value} for value in ANYTHING],
    "Levels": [{"value": value} for value in [*ANYTHING, *NO_LEVELS]],
}
FOREIGN = [{"labels": ["x"]}, {"unit": 3}, {"layout": None}, {"colour": "red"}]


@pytest.fixture(scope="module")
def lab(open_notebook, tmp_path_factory):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    path = tmp_path_factory.mktemp("untrusted") / "untrusted.ipynb"
    nbformat.write(notebook, path)
    lab = open_notebook(path)
    lab.page.wait_for_function("() => window.manager")
    lab.page.evaluate(LISTEN)
    return lab


@pytest.mark.parametrize("name", HOSTILE)
def test_an_impossible_state_changes_nothing_and_is_named(lab, name):
    control = "Level 0" if name == "Levels" else "Bits"
    explorer = lab.page.locator(".qlora-explorer").filter(has=lab.slider(control))
    picture, said = explorer.locator("img"), explorer.get_by_role("status")
    before = [picture.get_attribute(attribute) for attribute in ("alt", "src")]
    for state in [*HOSTILE[name], *FOREIGN]:
        lab.page.evaluate(SEND, [name, state])
        expect(said).to_contain_text(f'Refused: "{name}" got {next(iter(state))}')
    assert [picture.get_attribute(attribute) for attribute in ("alt", "src")] == before
    assert lab.page.evaluate("window.raised") == []
    lab.move(control, "ArrowRight")  # the control has its true state again and moves on from there
    expect(said).to_be_hidden()
    lab.move(control, "ArrowLeft")
