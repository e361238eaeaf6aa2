"""The doctor room: checks, before a run, for failures that raise no error. Read diagnose.py first."""
