"""What stays on a page when the kernel is gone: a still picture in place of a live view, and a line that says why.

JupyterLab saves no widgets, and of the forms in one output it prefers the view of a widget, even of one that is gone:
"Error displaying widget: model not found". So `show_over` makes two outputs: the still, then the view alone. While the
view is on the page, CSS hides the still; afterwards it hides that error, of progress bars too.

Not here: the pictures (figure.py) and the controls (slider.py).
"""

import sys

import traitlets as T

from qlora_lab.show.control import Shown

VIEW = "application/vnd.jupyter.widget-view+json"
LIVE = ":is(.qlora-explorer, .qlora-live)"  # what a view holds while it lives
# JupyterLab puts each output into a child of the cell's output area. A view that has not come yet, or never will, is
# an output without a type that holds a line of text and no element.
_CSS = f"""
.jp-OutputArea-child:has(.qlora-still):has(+ .jp-OutputArea-child {LIVE}),
.jp-OutputArea-output:not([data-mime-type], :has(*)) {{ display: none; }}
"""


def show_over(still, widget):
    """Show the live view of `widget` over `still`, a bundle with text/html that stays when the notebook is closed."""
    page = f'<div class="qlora-still"><style>{_CSS}</style>{still["text/html"]}</div>'
    display = sys.modules["IPython"].display.display  # ipywidgets has imported it
    display({**still, "text/html": page}, raw=True)
    # as ipywidgets 8 describes a view; version 7, which hosted services keep, has no _repr_mimebundle_ to ask
    display({VIEW: {"model_id": widget.model_id, "version_major": 2, "version_minor": 0}}, raw=True)


class StatusLine(Shown):
    """A line that is empty as long as all is well.

    It says what a control has refused, until a control moves. When the kernel has stopped, it says so and disables
    the controls beside it: a slider that moves while its picture does not would say something false.
    """

    text = T.Unicode().tag(sync=True)

    _esm = """
    const GONE = ["terminating", "restarting", "autorestarting", "dead"];
    export default { render({ model, el }) {
      const session = model.widget_manager?.context?.sessionContext;  // JupyterLab's; other pages have none
      el.classList.add("qlora-status"); el.setAttribute("role", "status");
      const say = () => { el.textContent = model.get("text"); };
      const look = () => {
        const kernel = session.session?.kernel;
        if (kernel && !GONE.includes(kernel.status)) return;
        el.textContent = "The kernel has stopped: run this cell again.";
        for (const control of el.parentElement.querySelectorAll(".qlora-control")) control.inert = true;
      };
      model.on("change:text", say); say();
      session?.statusChanged.connect(look); session?.kernelChanged.connect(look);
      return () => { session?.statusChanged.disconnect(look); session?.kernelChanged.disconnect(look); };
    } };
    """
    _css = """
    .qlora-status { font-weight: 600; color: var(--jp-ui-font-color1, inherit); }
    .qlora-status:empty { display: none; }
    .qlora-control[inert] { opacity: 0.4; }
    .qlora-explorer code { overflow-wrap: anywhere; }  /* the line to copy has long words */
    """

    def __init__(self, *controls):
        super().__init__()
        self._controls = controls
        for control in controls:
            control.observe(self._clear, control.moved)
            control.observe(self._say, "refused")

    def _clear(self, _change):
        for control in self._controls:
            control.refused = ""

    def _say(self, change):
        self.text = change["new"]
