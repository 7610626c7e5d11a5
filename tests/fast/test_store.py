"""Stores of tensors by key: bounds, disk, and several that share a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graft.fast.store import Store


def held(store: Store, key: bytes) -> Tensor:
    found = store.get(key)
    assert found is not None
    return found


def test_the_store_goes_to_disk_and_then_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.fast.store.SHARD", 64)
    one = torch.arange(8.0)
    store = Store(memory=40, folder=tmp_path / "trunk", disk=100, key="k")
    assert [store.put(bytes([i]), one + i) for i in range(5)] == [True, True, True, True, False]
    assert (store.in_memory, store.on_disk, len(store)) == (32, 96, 4)
    for i in range(4):
        torch.testing.assert_close(held(store, bytes([i])), one + i, rtol=0, atol=0)
    assert store.get(b"x") is None
    store.close(delete=False)
    again = Store(memory=0, folder=tmp_path / "trunk", disk=1000, key="k")
    assert len(again) == 3 and torch.equal(held(again, bytes([2])), one + 2)  # what was in memory found no room
    other = Store(memory=0, folder=tmp_path / "trunk", disk=1000, key="other")
    assert len(other) == 0 and other.put(b"x", one)
    again.close()
    other.flush()
    assert torch.equal(held(other, b"x"), one)
    other.close()
    assert not (tmp_path / "trunk").exists()


def test_stores_of_one_folder_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.fast.store.SHARD", 1)
    (tmp_path / "notes.txt").write_text("mine")
    first, second = (Store(memory=0, folder=tmp_path, disk=2**20, key="k") for _ in range(2))
    for i in range(4):
        for store, sign in ((first, 1.0), (second, -1.0)):
            assert store.put(bytes([i, int(sign > 0)]), torch.full((8,), sign * i))
    third = Store(memory=0, folder=tmp_path, disk=2**20, key="k")
    for store in (first, second, third):
        for i in range(4):
            for sign in (1.0, -1.0) if store is third else (1.0 if store is first else -1.0,):
                assert torch.equal(held(store, bytes([i, int(sign > 0)])), torch.full((8,), sign * i))
    second.close()
    assert third.get(bytes([1, 1])) is None and bytes([1, 1]) not in third  # deleted by another: computed again
    assert third.put(bytes([1, 1]), torch.ones(8)) and torch.equal(held(third, bytes([1, 1])), torch.ones(8))
    assert (tmp_path / "notes.txt").read_text() == "mine"


WRITER = """
import sys, time
from pathlib import Path
import torch
from graft.fast import store
store.SHARD = 256
folder, me = Path(sys.argv[1]), sys.argv[2]
kept = store.Store(memory=3000, folder=folder, disk=2**20, key="k")
(folder / me).touch()
end = time.monotonic() + 60
while len(list(folder.glob("ready*"))) < 2 and time.monotonic() < end:  # both write at the same time
    time.sleep(0.001)
for i in range(200):
    assert kept.put(i.to_bytes(2, "big"), torch.full((8,), float(i)))
kept.close(delete=False)
"""


def test_two_processes_that_write_at_once(tmp_path: Path) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), f"ready{i}"]) for i in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    store = Store(memory=0, folder=tmp_path, disk=2**20, key="k")
    assert len(store) == 200 and not list(tmp_path.rglob("*.partial"))
    for i in range(200):
        assert torch.equal(held(store, i.to_bytes(2, "big")), torch.full((8,), float(i)))


def test_a_disk_that_is_full_after_all_is_told_once_and_the_rest_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("graft.fast.store.SHARD", 256)
    one = torch.arange(64.0)
    store = Store(memory=0, folder=tmp_path / "trunk", disk=2**20, key="k")
    assert store.put(b"a", one)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert [store.put(key, one) for key in (b"b", b"c", b"a")] == [False, False, True]
        store.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(held(store, b"a"), one) and store.get(b"b") is None and len(store) == 1
    assert len(list(tmp_path.rglob("*.*"))) == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no more states are kept in" in line and "\n" not in line
