"""What controls share: a message from the page is accepted or refused as a whole, with one sentence that says why.

A widget's state is untrusted: any script on the page can send any state. So a control names the one field that a reader
moves and what it may become. Anything else changes nothing, and the page gets the control's true state again.

A widget that only shows something takes no state at all.

Not here: what the controls look like (slider.py, levels.py) and where the sentence is shown (still.py).
"""

import reprlib
import textwrap

import anywidget
import traitlets as T


class Control(anywidget.AnyWidget):
    """A named widget with one field, `moved`, that a page may change.

    A subclass adds two methods: takes(value) says whether the field may become `value`, which can be anything that JSON
    or a buffer holds, and rule() ends the sentence "it must be ...".
    A control of an explorer adds a third: rounds() lists values of the field from coarse to fine, for a page without a
    kernel (playable.py).
    """

    moved = "value"
    description = T.Unicode().tag(sync=True)  # its accessible name
    refused = T.Unicode()  # why the last message was refused, or empty; stays in Python

    def set_state(self, sync_data):
        """Take in a message from the page, or refuse it. ipywidgets calls this."""
        self.refused = ""  # the same sentence again is news, too
        self.refused = self._refusal(sync_data)
        if self.refused:
            self.send_state()  # the page shows the true state again
        else:
            super().set_state(sync_data)

    def on_page(self, stops):
        """Return what a page with these stops alone changes of the state, and what `moved` is there for each stop."""
        return {}, stops

    def _refusal(self, sync_data):
        start = f'Refused: "{self.description}" got'
        if not isinstance(sync_data, dict):
            return f"{start} a state without fields, but a page may change only its {self.moved}."
        return next(filter(None, (self._fault(start, *item) for item in sync_data.items())), "")

    def _fault(self, start, field, value):
        if field != self.moved:
            return f"{start} {reprlib.repr(field)[1:-1]}, but a page may change only its {self.moved}."
        short = textwrap.shorten(reprlib.repr(value), 60, placeholder=" ...")  # a message can be of any length
        return "" if self.takes(value) else f"{start} {field} {short}, which must be {self.rule()}."


class Shown(anywidget.AnyWidget):
    """A widget of which a page may change nothing."""

    def set_state(self, sync_data):
        """Refuse a message from the page, which is sent the true state again. ipywidgets calls this."""
        self.send_state()
