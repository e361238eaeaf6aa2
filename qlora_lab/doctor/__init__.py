"""The doctor room: checks for failures that raise no error, of a run before it starts (diagnose.py: read it first), and
of a machine before a lesson (machine.py). lab.py starts JupyterLab, for a check and for `qlora-lab open`; websocket.py
runs in it."""
