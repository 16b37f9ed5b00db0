"""Checkpoints on a disk that fails: one is complete or not there, and what was there before stays."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petra_zoo.bench.faulty_disk import FaultyDisk, Killed
from petra_zoo.checkpoints.manifest import MANIFEST, SEAL, FileEntry, Manifest, read_manifest, seal_of
from petra_zoo.checkpoints.packing import CheckpointError, to_safetensors
from petra_zoo.checkpoints.store import RunCheckpoint, Store, verified

PARTS = ("stage-000.safetensors", "stage-001.safetensors", "run.safetensors")


def manifest(tick: int, **values: Any) -> Manifest:
    return Manifest(tick, 0, tick, (1, 2), 1, 1, {"lr": 0.1}, {"torch": "2"}, **values)


def save(store: Store, tick: int, **values: Any) -> RunCheckpoint:
    store.begin(tick)
    content = to_safetensors({"x": torch.full((8,), tick)})
    return store.publish(manifest(tick, **values), {name: store.write(tick, name, content) for name in PARTS})


def steps_of_a_save(folder: Path) -> int:
    disk = FaultyDisk(10**6)
    save(Store(folder, disk), 1)
    return 10**6 - disk.left


def test_a_saved_checkpoint_is_read_back_and_every_byte_is_right(tmp_path: Path) -> None:
    saved = save(Store(tmp_path), 7, finished=True, metrics={"top1": 50.0})
    found = Store(tmp_path).newest_good()
    assert found == saved
    assert found.manifest.facts() == saved.manifest.facts()
    assert {path.name for path in saved.path.iterdir()} == {MANIFEST, SEAL, *PARTS}


def test_a_flip_of_any_bit_of_any_byte_is_detected(tmp_path: Path) -> None:
    path, tried = save(Store(tmp_path), 1).path, 0
    for file in sorted(path.iterdir()):
        content = bytearray(file.read_bytes())
        with file.open("r+b", buffering=0) as opened:
            for i in range(len(content)):
                os.pwrite(opened.fileno(), bytes([content[i] ^ (1 << i % 8)]), i)
                with pytest.raises(CheckpointError, match=r"damaged|is no manifest"):
                    verified(path)
                os.pwrite(opened.fileno(), content[i : i + 1], i)
                tried += 1
    assert tried == sum(file.stat().st_size for file in path.iterdir())
    verified(path)


@pytest.mark.parametrize("name", [MANIFEST, SEAL, *PARTS])
@pytest.mark.parametrize("damage", ["truncated", "longer", "missing", "a link", "a folder"])
def test_a_damaged_file_is_named_and_the_older_checkpoint_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    save(store, 1)
    file = save(store, 2).path / name
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "longer":
        file.write_bytes(content + b"\0")
    elif damage == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "a folder":
        file.mkdir()
    found = store.newest_good()
    assert found is not None
    assert found.manifest.tick == 1
    assert name in caplog.text
    assert "passed over" in caplog.text


@pytest.mark.parametrize("older", [True, False], ids=["with an older one", "the first"])
def test_a_kill_behind_any_step_of_a_save_leaves_whole_checkpoints_only(tmp_path: Path, older: bool) -> None:
    steps = steps_of_a_save(tmp_path / "count")
    assert steps >= len(PARTS) + 5
    for step in range(steps + 1):
        folder = tmp_path / str(step)
        if older:
            save(Store(folder), 1)
        try:
            save(Store(folder, FaultyDisk(step)), 2)
        except Killed:
            pass
        found = Store(folder).newest_good()
        assert (found.manifest.tick if found else None) in ({1, 2} if older else {None, 2})
        assert all(verified(folder / name) for name in Store(folder).names())
        assert save(Store(folder), 3).manifest.tick == 3, "the next save is not in the way"
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_full_at_any_write_leaves_the_older_checkpoint_and_no_rest(tmp_path: Path) -> None:
    failed = 0
    for step in range(steps_of_a_save(tmp_path / "count")):
        folder = tmp_path / str(step)
        save(Store(folder), 1)
        store = Store(folder, FaultyDisk(step, full=True))
        try:
            save(store, 2)
        except OSError:
            failed += 1
            store.give_up(2)
            assert Store(folder).names() == ["tick-0000000001"]
            assert len(list(folder.iterdir())) == 1
        found = Store(folder).newest_good()
        assert found is not None
    assert failed >= len(PARTS) + 2


def test_a_kill_while_old_checkpoints_are_removed_leaves_whole_ones_only(tmp_path: Path) -> None:
    for step in range(6):
        folder = tmp_path / str(step)
        for tick in (1, 2, 3):
            save(Store(folder), tick)
        try:
            Store(folder, FaultyDisk(step)).prune(1)
        except Killed:
            pass
        names = Store(folder).names()
        assert "tick-0000000003" in names
        assert all(verified(folder / name) for name in names)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for tick, top1 in enumerate((10.0, 90.0, 50.0, 70.0, None), start=1):
        save(store, tick, metrics=None if top1 is None else {"top1": top1, "loss": top1})
    assert store.prune(2, best=1) == ["tick-0000000001", "tick-0000000003"]
    assert store.names() == [f"tick-000000000{n}" for n in (2, 4, 5)]
    assert store.prune(1, best=1, metric="loss") == ["tick-0000000002"]


def test_the_only_good_one_is_never_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for tick in (1, 2, 3):
        save(store, tick)
    for name in ("tick-0000000002", "tick-0000000003"):
        (tmp_path / name / PARTS[0]).write_bytes(b"")
    assert store.prune(1) == ["tick-0000000002"]
    assert store.names() == ["tick-0000000001", "tick-0000000003"]


def test_a_save_at_the_tick_of_another_one_comes_behind_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (save(store, 1).path / PARTS[0]).write_bytes(b"")
    again, later = save(store, 1), save(store, 2)
    assert store.names() == ["tick-0000000001", again.path.name, later.path.name]
    assert store.prune(2) == ["tick-0000000001"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.c", "a\\b.c", "..", ".hidden.x", "x.y\n", "x", "x..y", "é.x", ""]
)
def test_no_name_of_a_file_leaves_the_folder(tmp_path: Path, name: str) -> None:
    path = save(Store(tmp_path), 1).path
    values = json.loads((path / MANIFEST).read_text())
    values["files"] = {name: {"bytes": 1, "sha256": "0" * 64}}
    seal(path, json.dumps(values).encode())
    with pytest.raises(CheckpointError, match="is no name of a file in here"):
        read_manifest(path)


def test_a_manifest_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = save(Store(tmp_path), 1).path
    with (path / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)  # a file with a hole
    with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes, more than"):
        read_manifest(path)


def seal(path: Path, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    (path / SEAL).write_bytes(seal_of(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def refused_or_read(path: Path, content: bytes) -> None:
    seal(path, content)
    with suppress(CheckpointError):
        read_manifest(path)
    assert {file.name for file in path.iterdir()} == {MANIFEST, SEAL}


def fuzzed_manifests(count: int, path: Path) -> None:
    values = json.loads(manifest(1, files={PARTS[0]: FileEntry(1, "0" * 64)}).text())

    @settings(max_examples=count, deadline=None, database=None)
    @given(st.dictionaries(st.sampled_from(sorted(values)), JSON, min_size=1, max_size=3), JSON)
    def with_anything_in_it(changed: dict[str, Any], other: Any) -> None:
        refused_or_read(path, json.dumps(values | changed).encode())
        refused_or_read(path, json.dumps(other).encode())

    @settings(max_examples=count, deadline=None, database=None)
    @given(st.binary(max_size=200))
    def of_any_bytes(content: bytes) -> None:
        refused_or_read(path, content)

    with_anything_in_it()
    of_any_bytes()


def test_a_manifest_with_anything_in_it_is_read_or_refused(tmp_path: Path) -> None:
    fuzzed_manifests(50, tmp_path)


@pytest.mark.slow
def test_thousands_of_manifests_are_read_or_refused(tmp_path: Path) -> None:
    fuzzed_manifests(2000, tmp_path)
