"""`petra-zoo checkpoint`: what it says of sound and damaged checkpoints."""

import json
from pathlib import Path

from typer.testing import CliRunner

from petra_zoo.checkpoints.store import Store
from petra_zoo.cli.main import app
from tests.checkpoints.test_store import PARTS, save


def said(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["checkpoint", *words])
    return done.exit_code, done.stdout


def test_checkpoints_are_shown_verified_and_removed(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints")
    for tick in (1, 2, 3):
        save(store, tick, metrics={"top1": 50.0})
    shown = json.loads(said("show", str(tmp_path), "--json")[1])
    assert [facts["tick"] for facts in shown.values()] == [1, 2, 3]
    assert "top1 50" in said("show", str(tmp_path))[1]
    assert said("verify", str(tmp_path))[0] == 0
    (store.folder / "tick-0000000003" / PARTS[1]).write_bytes(b"")
    code, lines = said("verify", str(tmp_path))
    assert code == 1
    assert f"{PARTS[1]} is damaged: 0 bytes, expected" in lines
    assert said("verify", str(store.folder / "tick-0000000001"))[0] == 0
    assert said("prune", str(tmp_path))[1] == "removed tick-0000000001\n", "2 is the newest good one"


def test_a_directory_without_checkpoints_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["checkpoint", "verify", str(tmp_path)])
    assert "has no checkpoints" in str(done.exception)
