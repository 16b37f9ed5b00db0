"""What `petra-zoo convert` says: what became reversible, what did not and why, and what to do next."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from petra_zoo.cli.main import run as command_line

Convert = Callable[..., str]


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs the command on a small ResNet with the blocks of a ResNet-18; gives what it prints."""

    def run(*arguments: str, layers: tuple[int, ...] = (2, 2, 2, 2), output: str = "out") -> str:
        small = {"layers": layers, "channels": (64, 8, 8, 8), "num_classes": 5}
        source = tmp_path / "source"
        data = {"input_size": (3, 32, 32)}
        save_for_hf(timm.create_model("resnet18", **small), str(source), safe_serialization=True, data_config=data)
        with pytest.raises(SystemExit) as left:
            command_line(["convert", str(source), "--output", str(tmp_path / output), *arguments])
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        return said.out

    return run


def test_a_resnet18_on_one_device_is_said_to_stay_as_it_is_and_why(convert: Convert) -> None:
    said = convert()
    assert "nothing was made reversible: on one device a run of up to 2 blocks saves no memory" in said
    assert "--for petra makes every run reversible" in said
    assert "layer1  not reversible (coupling 0): a run of 2 blocks is too short to pay on one device" in said
    assert "layer2  not reversible (coupling 0): a run of 1 block is" in said


def test_what_the_hint_names_does_make_it_reversible(convert: Convert) -> None:
    said = convert("--for", "petra")
    assert "nothing was made reversible" not in said
    assert "layer1  2 blocks reversible, coupling 0.0625" in said
    assert "layer2  1 block reversible, coupling 0.0625" in said


def test_coupling_0_is_said_to_be_what_was_asked(convert: Convert) -> None:
    said = convert("--coupling", "0")
    assert "layer1  not reversible (coupling 0): as asked" in said
    assert "nothing was made reversible: coupling 0 is an ordinary ResNet" in said


def test_layers_of_one_block_have_nothing_to_reverse(convert: Convert) -> None:
    said = convert("--for", "petra", layers=(1, 1, 1, 1), output="flat")
    assert "layer2  not reversible (coupling 0): its first block changes the shape, and there is no other" in said


def test_a_run_too_short_is_told_from_one_that_pays(convert: Convert) -> None:
    said = convert(layers=(2, 4, 2, 2))
    assert "layer1  not reversible (coupling 0): a run of 2 blocks" in said
    assert "layer2  3 blocks reversible, coupling " in said
    assert "nothing was made reversible" not in said


def test_json_counts_the_reversible_blocks(convert: Convert) -> None:
    assert json.loads(convert("--json"))["reversible_blocks"] == 0
    assert json.loads(convert("--json", "--for", "petra", output="petra"))["reversible_blocks"] == 5


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="typed into a POSIX shell")
def test_what_to_do_next_works_as_typed(convert: Convert, tmp_path: Path) -> None:
    (hint,) = [line for line in convert(output="it's out").splitlines() if line.startswith("next: ")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shell = subprocess.run(
        hint.removeprefix("next: "),
        shell=True,
        input="print(type(model).__name__)\n",
        env={**os.environ, "PATH": path, "PYTHONPATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert "PetraRevNet" in shell.stdout, shell.stderr
    assert "Error" not in shell.stderr
