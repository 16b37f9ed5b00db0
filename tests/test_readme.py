"""What the README promises."""

import re
from pathlib import Path

import pytest
import timm
from typer.main import get_command

from petra_zoo.cli.main import app

README = Path(__file__).parents[1] / "README.md"


def test_the_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    for example in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL):
        exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("None") for line in lines] == [True, True, True, False, False, False, False, False]


def test_the_number_of_pretrained_tags_is_right() -> None:
    tags = [
        name for name in timm.list_models("petra_revnet*", pretrained=True) if not name.startswith("petra_revnet_tiny")
    ]
    twins = timm.list_models("petra_*", pretrained=True, exclude_filters=["petra_revnet*", "petra_revvit*"])
    text = f"{len(tags)} tags of timm's ResNet weights, {len(twins)} of its transformers'"
    assert text in README.read_text()


def test_every_command_is_in_the_table() -> None:
    table = README.read_text().split("## Commands")[1].split("## Networks")[0]
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"petra-zoo {name}" in table


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README.read_text(), flags=re.MULTILINE):
        assert f"\n{target}:" in makefile
