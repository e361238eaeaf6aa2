"""What the system says, told apart from what it does not say."""

import os

import pytest
import torch

from qlora_lab.doctor import free_memory as module
from qlora_lab.doctor.free_memory import free_memory

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemAvailable:    3000 kB\nHugePages_Total: 0\n")
    return tmp_path


def limit(system, bound):
    (system / "memory.max").write_text(f"{bound}\n")
    (system / "memory.stat").write_text("anon 1000000\nfile 7000000\n")


def test_this_machine():
    free = free_memory(CPU)
    assert free is None or 2**20 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_the_kernel_calls_available(system):
    assert free_memory(CPU) == 3000 * 1024


@pytest.mark.parametrize(
    "bound, free", [("1500000", 500_000), ("9000000", 3000 * 1024), ("max", 3000 * 1024), ("5", 0)]
)
def test_a_container_can_have_less(system, bound, free):
    limit(system, bound)
    assert free_memory(CPU) == free


def test_systems_without_proc(system, monkeypatch):
    (system / "meminfo").unlink()
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 7, "SC_PAGE_SIZE": 4096}[name])
    assert free_memory(CPU) == 7 * 4096
    monkeypatch.setattr(os, "sysconf", lambda name: int("unknown name"))
    assert free_memory(CPU) is None


def test_a_gpu_counts_what_torch_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    assert free_memory(torch.device("cuda")) == 1200
