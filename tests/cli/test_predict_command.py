"""`petra-zoo predict` as a user meets it."""

import json
from pathlib import Path

from tests.cli.test_main import petra_zoo
from tests.evaluation.test_prediction import LABELS, image
from tests.hub.saved_models import save


def test_each_image_is_followed_by_its_classes_in_percent(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    files = [image(tmp_path / f"{i}.png", seed=i) for i in range(2)]
    done = petra_zoo("predict", *files, "-m", tmp_path / "model", "--topk", 3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [lines[0], lines[4]] == [str(file) for file in files]
    shares = [float(line.split("%")[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert {line.split("%")[1].strip() for line in lines[1:4]} <= set(LABELS)


def test_json_says_the_same(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    file = image(tmp_path / "a.png")
    ((row),) = json.loads(petra_zoo("predict", file, "--model", tmp_path / "model", "--json").stdout)
    assert row["image"] == str(file)
    assert [LABELS[guess["index"]] for guess in row["guesses"]] == [guess["label"] for guess in row["guesses"]]
    assert len(row["guesses"]) == 4


def test_an_unreadable_image_is_one_line_and_nothing_is_printed(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    done = petra_zoo("predict", image(tmp_path / "a.png"), broken, "-m", tmp_path / "model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"{broken} cannot be read as an image" in done.stderr
