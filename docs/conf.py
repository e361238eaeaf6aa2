"""The settings of the site. tools/make_site.py copies this file beside the pages and calls Sphinx."""

from docutils import nodes
from latex2mathml.converter import convert

project = "QLoRA Lab"
html_title = project
author = copyright = "the authors of QLoRA Lab"
extensions = ["myst_nb"]
root_doc = "index"
nitpicky = False
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown as they are stored
suppress_warnings = [
    "myst.header",  # headings of notebooks may skip a level
    "ref.python",  # two rooms may have a class of one name
]
html_theme = "sphinx_book_theme"
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_toc_level": 1,
    "use_download_button": True,
}
html_static_path = ["docs/static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_extra_path = ["extra"]  # playable explorers: whole pages, which frames show
highlight_language = "none"  # for code without a language: commands and their output
toc_object_entries_show_parents = "hide"
html_show_sourcelink = False
html_math_renderer = "mathml"  # the browser draws formulas itself: a page opened from disk needs no network


def _inline(writer, node: nodes.math) -> None:
    writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _display(writer, node: nodes.math_block) -> None:
    writer.body.append(convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app) -> None:
    """Formulas as MathML."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
