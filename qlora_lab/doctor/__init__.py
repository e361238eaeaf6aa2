"""The doctor room: checks for failures that raise no error, of a run before it starts (diagnose.py: read it first), and
of a machine before a lesson (machine.py)."""
