"""The checksum that identifies an adapter on disk."""

import hashlib

import pytest

from qlora_lab.adapters.peft_format import CONFIG, WEIGHTS
from qlora_lab.adapters.saving import adapter_checksum


def test_a_checksum_is_that_of_both_files_and_of_no_name(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CONFIG).write_bytes(b"{}")
        (tmp_path / name / WEIGHTS).write_bytes(b"numbers")
    want = hashlib.sha256(hashlib.sha256(b"{}").digest() + hashlib.sha256(b"numbers").digest()).hexdigest()
    assert adapter_checksum(tmp_path / "one") == adapter_checksum(str(tmp_path / "other")) == want
    (tmp_path / "one" / WEIGHTS).write_bytes(b"others")
    (tmp_path / "other" / CONFIG).write_bytes(b"{ }")
    assert len({want, adapter_checksum(tmp_path / "one"), adapter_checksum(tmp_path / "other")}) == 3


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_without_an_adapter_is_an_error(tmp_path, name):
    (tmp_path / ({CONFIG, WEIGHTS} - {name}).pop()).touch()
    with pytest.raises(FileNotFoundError, match=f"has no {name}: name a folder that holds an adapter in PEFT's format"):
        adapter_checksum(tmp_path)
