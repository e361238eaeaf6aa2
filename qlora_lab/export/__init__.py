"""The export room: a model with an adapter in, a model without one out, and a report of what that changed.

Read merge.py first. parity.py compares both models; layerwise.py runs the second one without loading it.
"""
