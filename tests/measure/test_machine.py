"""The machine's facts: all there, none empty."""

import qlora_lab as ql


def test_facts():
    facts = ql.machine()
    assert list(facts) == ["Python", "torch", "processor", "memory", "GPU", "computes in"]
    assert all(facts.values()) and facts["computes in"] in ("float32", "bfloat16", "float16")
