"""The machine's facts: all there, none empty."""

from qlora_lab.measure.machine import machine


def test_facts():
    facts = machine()
    assert list(facts) == ["Python", "torch", "processor", "memory", "GPU", "computes in"]
    assert all(facts.values()) and facts["computes in"] in ("float32", "bfloat16", "float16")
