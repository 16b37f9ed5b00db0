"""`petra-zoo export` as a user meets it."""

from pathlib import Path

import pytest

from tests.cli.test_main import petra_zoo
from tests.hub.saved_models import save


def test_export_says_what_goes_in_and_how_close_it_is(tmp_path: Path) -> None:
    save(tmp_path / "model")
    output = tmp_path / "model.pt2"
    options = ["--format", "torch-export", "--input-size", "16x12", "--output", output]
    done = petra_zoo("export", tmp_path / "model", *options)
    assert done.returncode == 0, done.stderr
    assert f"saved {output}: images 1x3x16x12 -> logits" in done.stdout
    assert "largest difference from the model" in done.stdout
    assert output.is_file()


@pytest.mark.parametrize("size", ["big", "0", "32x", "3x32x32"])
def test_a_size_that_is_none_is_one_line(tmp_path: Path, size: str) -> None:
    done = petra_zoo("export", tmp_path, "--output", tmp_path / "model.onnx", "--input-size", size)
    assert done.returncode == 2
    assert f"--input-size {size}: expected pixels" in done.stderr
