"""Show which tokens a model learns from: all tokens in a row, the learned ones marked.

In: (text, learned) records, as data.show_labels makes them. Out: HTML for a notebook, in which learned tokens have a
coloured ground and an underline, and plain text in which they stand in [brackets].
"""

from qlora_lab.show.escape import for_html

STYLE = "background:#e69f0055;border-bottom:2px solid #e69f00"  # the line shows on a grey print, too


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
