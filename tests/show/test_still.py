"""A live view is shown by its model alone, as every version of ipywidgets has it."""

from qlora_lab.show.still import VIEW, show_over


def test_a_view_needs_no_bundle_of_the_widget(monkeypatch):
    """ipywidgets 7 makes none, and on a hosted service the service's version is kept."""
    import ipywidgets

    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    widget = ipywidgets.HTML("x")
    wanted = widget._repr_mimebundle_()[VIEW]
    monkeypatch.delattr(ipywidgets.Widget, "_repr_mimebundle_")
    show_over({"text/html": "<p>", "text/plain": "a"}, widget)
    still, view = shown
    assert still["text/html"].endswith("<p></div>") and still["text/plain"] == "a"
    assert view == {VIEW: wanted}
