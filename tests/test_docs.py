"""What the pages in docs/ show runs as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run_python(page: str, code: str) -> None:
    exec(compile(code, page, "exec"), {"__name__": "docs"})


def test_the_examples_of_the_page_on_models_run() -> None:
    for code in blocks("models.md", "python"):
        run_python("models.md", code)


def test_the_examples_of_the_page_on_converting_run() -> None:
    for code in blocks("converting.md", "python"):
        run_python("converting.md", code)


def test_the_first_example_trains_in_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("start.md", "python")
    run_python("start.md", code)
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("None") for line in lines] == [True, True, True, False, False, False, False, False]


def test_the_number_of_pretrained_tags_is_right() -> None:
    tags = [
        name for name in timm.list_models("petra_revnet*", pretrained=True) if not name.startswith("petra_revnet_tiny")
    ]
    twins = timm.list_models("petra_*", pretrained=True, exclude_filters=["petra_revnet*", "petra_revvit*"])
    text = f"{len(tags)} tags of timm's ResNet weights, {len(twins)} of its transformers'"
    assert text in (DOCS / "converting.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_network_a_method_a_data_set_and_a_loss_of_ones_own_train_and_are_evaluated(tmp_path: Path) -> None:
    for code in blocks("extending.md", "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code, encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"my_{what}.py" for what in ("data", "loss", "method", "network")
    ]
    (commands,) = blocks("extending.md", "sh")
    # As typed, with this Python's petra-zoo.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "my_network on stripes, signs: 4 stages" in done.stdout
    assert "run on stripes: 64 images" in done.stdout


def test_the_network_in_30_lines_has_that_many() -> None:
    code = next(code for code in blocks("extending.md", "python") if code.startswith("# my_network.py"))
    network = code[code.index("class ") : code.index("default_cfgs")].strip().splitlines()
    assert sum(bool(line.strip()) for line in network) <= 30


@pytest.mark.slow
def test_training_from_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in blocks("extending.md", "python") if "petra_zoo.train(" in code)
    run_python("extending.md", code)
    assert (tmp_path / "run-python" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_callback_of_the_page_on_recipes_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks("recipes.md", "python"):
        run_python("recipes.md", code)


def test_pages_link_to_pages_that_exist() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
