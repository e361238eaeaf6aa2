"""The show room: pictures and controls. Data in, something to look at out. No maths lives here.

slider.py    named controls: `Slider`, `Toggle`, `Button`
figure.py    matplotlib -> `<img alt=...>`: `new_figure`, `picture`, `Blit`
source.py    a function -> its highlighted source: `show_source`
explorer.py  controls + figure + one sentence of numbers: `Explorer`
playable.py  an explorer -> a page that plays without a kernel: `explorer.save_html`
live.py      a Training -> its Run, watched and stopped in a notebook: `live`
follow_weight.py  a weight -> its way through all stations of the course: `FollowWeight`
chat_panel.py  a model -> a conversation in a notebook: `ChatPanel`
"""
