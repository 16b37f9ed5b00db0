"""A sample of what was found of timm's families (benchmarks/families), found again."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import timm

FOLDER = Path(__file__).parents[2] / "benchmarks" / "families"
FOUND = {run["contender"]: run for run in json.loads((FOLDER / "results.json").read_text())["runs"]}
NAMES = ("convnext_atto", "densenet121", "efficientnetv2_rw_t", "eva02_tiny_patch14_224", "hgnetv2_b0", "levit_128s")
NAMES += ("maxvit_rmlp_pico_rw_256", "mixer_s32_224", "resnet50", "shvit_s1", "swin_tiny_patch4_window7_224", "vgg11")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def version(run: Any) -> str:
    return str(run["versions"]["timm"])


@pytest.mark.parametrize("name", NAMES)
def test_a_network_has_the_chains_that_were_found(name: str) -> None:
    if version(FOUND[name]) != timm.__version__:
        pytest.skip("they were found with another version of timm")
    again = runpy.run_path(str(FOLDER / "sweep.py"))["examined"](name)
    assert json.loads(json.dumps(again)) == {"name": name, **FOUND[name]["result"]}


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s", "mixer_s32_224", "shvit_s1"])
def test_gradients_through_its_first_chain_are_autograds(name: str) -> None:
    chain = FOUND[name]["result"]["chains"][0]
    found = runpy.run_path(str(FOLDER / "gradients.py"))["checked"](name, chain["path"], chain["first"])
    assert found["difference"] < 1e-9
