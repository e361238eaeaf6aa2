"""Which tokens a model learns from: its tokens in a row, the learned ones marked.

Enters: (text, learned) records, as finetune.data.show_labels makes them. Leaves: HTML for a notebook, marked by a
coloured ground and a line underneath, and plain text in which learned tokens stand in [brackets].
"""

from qlora_lab.show.escape import for_html

STYLE = "background:#e69f0055;border-bottom:2px solid #e69f00"  # not colour alone: the line shows on a grey print


class LabelView:
    """Tokens with the learned ones marked, for display."""

    def __init__(self, records):
        self.records = list(records)

    def __repr__(self):
        return "".join(f"[{text}]" if learned else text for text, learned in self.records)

    def _repr_mimebundle_(self, include=None, exclude=None):
        spans = (f'<span style="{STYLE}">{_ink(t)}</span>' if learned else _ink(t) for t, learned in self.records)
        page = f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div>'
        return {"text/html": page, "text/plain": repr(self)}


def _ink(text):
    return for_html(text).replace("\n", "⏎\n")
