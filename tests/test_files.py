"""Places on disk, and strict JSON."""

import json
import os
from pathlib import Path

import pytest

from petra_zoo.errors import UserError
from petra_zoo.files import apply_umask, check_free, expand_home
from petra_zoo.strict_json import to_json


def test_a_home_is_expanded_wherever_a_place_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for before, after in (
        ("~/run", "/home/me/run"),
        ("output=~/run", "output=/home/me/run"),
        ("--data-dir=~/data", "--data-dir=/home/me/data"),
        ("pretrained=local-dir:~/run", "pretrained=local-dir:/home/me/run"),
    ):
        assert expand_home(before) == after
    for other in ("data_dir=~", "notes~/x", "a/~/b", "~nobody-of-this-name/x", "hf-hub:org/name"):
        assert expand_home(other) == other


def test_only_an_absent_or_an_empty_directory_is_free(tmp_path: Path) -> None:
    check_free(tmp_path / "absent", "output=DIR")
    check_free(tmp_path, "output=DIR")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds something else \(notes\.txt\): choose another output=DIR"):
        check_free(tmp_path, "output=DIR")
    for inside in ("", "run", "run/deep"):
        with pytest.raises(UserError, match=r"notes\.txt is a file"):
            check_free(tmp_path / "notes.txt" / inside, "output=DIR")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_umask_decides_who_may_read(tmp_path: Path, umask: int, mode: int) -> None:
    file = tmp_path / "weights"
    file.touch(mode=0o600)
    before = os.umask(umask)
    try:
        apply_umask(file)
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_json_has_null_where_a_number_is_not_finite() -> None:
    value = {"loss": float("nan"), "rows": [(1.5, float("inf")), {"x": -float("inf")}], "name": "NaN", "n": 3}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(to_json(value, indent=2), parse_constant=refuse) == {
        "loss": None,
        "rows": [[1.5, None], {"x": None}],
        "name": "NaN",
        "n": 3,
    }
