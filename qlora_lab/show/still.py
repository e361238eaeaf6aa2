"""What stays on a page when the kernel is gone: a still picture in place of a live view, and controls that say why.

JupyterLab saves no widgets, and of the forms in one output it prefers the view of a widget, even of one that is gone:
"Error displaying widget: model not found". So `show_over` makes two outputs: the still, then the view alone. While the
view is on the page, CSS hides the still; afterwards it hides that error, of progress bars too.

Not here: the pictures (figure.py) and the controls (slider.py).
"""

import sys

import anywidget

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
    display({VIEW: widget._repr_mimebundle_()[VIEW]}, raw=True)


class KernelWatch(anywidget.AnyWidget):
    """A line that is empty while the kernel lives. When it has stopped, it says so and takes the controls beside it out
    of use: a slider that moves while its picture does not would say something false."""

    _esm = """
    const GONE = ["terminating", "restarting", "autorestarting", "dead"];
    export default { render({ model, el }) {
      const session = model.widget_manager?.context?.sessionContext;  // JupyterLab's; other pages have none
      el.classList.add("qlora-watch"); el.setAttribute("role", "status");
      const look = () => {
        const kernel = session.session?.kernel;
        if (kernel && !GONE.includes(kernel.status)) return;
        el.textContent = "The kernel has stopped: run this cell again.";
        for (const control of el.parentElement.querySelectorAll(".qlora-control")) control.inert = true;
      };
      session?.statusChanged.connect(look); session?.kernelChanged.connect(look);
      return () => { session?.statusChanged.disconnect(look); session?.kernelChanged.disconnect(look); };
    } };
    """
    _css = """
    .qlora-watch { font-weight: 600; color: var(--jp-ui-font-color1, inherit); }
    .qlora-watch:empty { display: none; }
    .qlora-control[inert] { opacity: 0.4; }
    """
