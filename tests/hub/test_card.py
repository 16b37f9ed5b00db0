"""The model card that push writes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petra_zoo.hub.card import hub_id, make_card, wilson
from petra_zoo.hub.checkpoint import read_checkpoint
from petra_zoo.settings.recipe_files import load_recipe, save_recipe
from tests.hub.checkpoints import measure, untrained
from tests.loopback_hub import LoopbackHub


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_snippets(text: str, hub: LoopbackHub, home: Path) -> None:
    """Runs every snippet as a stranger would, in a process of its own each time petra_zoo is imported anew."""
    found = snippets(text)
    assert found
    assert all(snippet.startswith("import petra_zoo") for snippet in found)
    script = "\n".join(f"exec(compile({snippet!r}, 'snippet {i}', 'exec'), {{}})" for i, snippet in enumerate(found))
    environment = os.environ | hub.environment(home)
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_snippet_of_a_written_card_runs(hub: LoopbackHub, tmp_path: Path) -> None:
    path = untrained(tmp_path / "tiny")
    hub.add("owner/tiny", {name: path / name for name in ("config.json", "model.safetensors")})
    run_snippets(str(make_card(read_checkpoint(path), "hf-hub:owner/tiny")), hub, tmp_path / "home")


def test_the_hub_takes_a_written_card(hub: LoopbackHub, tmp_path: Path) -> None:
    path = untrained(tmp_path / "tiny")
    measure(path, 75.0)
    card = make_card(read_checkpoint(path), "hf-hub:owner/tiny")
    card.validate()
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert "| cifar10, validation split | top-1 accuracy | 75.00 % | 68.57 to 80.49 | 200 |" in card.text


def test_a_card_has_no_gap_in_its_tables(tmp_path: Path) -> None:
    path = untrained(tmp_path / "tiny")
    measure(path)
    lines = make_card(read_checkpoint(path), "hf-hub:owner/tiny").text.splitlines()
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        assert line or not (before.startswith("|") and after.startswith("|"))
    for i, line in enumerate(lines):
        if line.startswith("|---"):
            assert line.count("|") == lines[i - 1].count("|") == lines[i + 1].count("|")


@pytest.mark.parametrize(
    ("settings", "update", "late"),
    [
        (["update_size=64", "max_delay=3"], "32 images x 2 per update: D_0 = 3 updates", False),
        (["stages=14", "weight_prediction=head", "max_delay=null"],
         "64 images per update: D_0 = 26 updates, weights predicted to the head", True),
        (["method=backprop", "stages=14", "max_delay=null"], "64 images per update: no delay", False),
    ],
)  # fmt: skip
def test_a_card_says_how_late_gradients_were(tmp_path: Path, settings: list[str], update: str, late: bool) -> None:
    path = untrained(tmp_path / "tiny")
    save_recipe(load_recipe("shapes/petra_revnet_tiny", settings), path / "recipe.yaml")
    text = make_card(read_checkpoint(path), "hf-hub:owner/tiny").text
    assert f"| update | {update} |" in text.splitlines()
    sentence = "The gradients of the first stage were late: D_0 = 26 updates, and above 3 with opt=muon training is"
    assert (f"\n\n{sentence}" in text) == late


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("cifar10", "uoft-cs/cifar10"), ("hfds/org/name", "org/name"), ("digits", None), ("folder", None), ("", None)],
)
def test_which_data_sets_the_hub_has(dataset: str, name: str | None) -> None:
    assert hub_id(dataset) == name


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_the_interval_holds_the_value_and_narrows_with_n(n: int, share: float) -> None:
    low, high = wilson(100 * share, n)
    assert 0.0 <= low <= 100 * share + 1e-9
    assert 100 * share - 1e-9 <= high <= 100.0
    wider = wilson(100 * share, max(1, n // 4))
    assert high - low <= wider[1] - wider[0] + 1e-9
