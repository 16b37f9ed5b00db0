"""The command line starts at once: counted in imports, because time on a busy machine decides nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "timm", "torchvision", "numpy", "huggingface_hub", "safetensors", "PIL", "matplotlib", "sklearn"}
ROOT = Path(__file__).parents[2]
MOST = 650  # typer, rich and pydantic are about 400; torch alone is more than 1,000


def modules_of(*arguments: str, code: int, **environment: str) -> set[str]:
    """The modules that a command imports, as Python's own account of its imports has them."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "petra_zoo", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
        env=os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"} | environment,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["trian"], 2),
        (["--no-such-option"], 2),
        (["train", "--help"], 0),
        (["convert", "--no-such-option"], 2),
        (["recipes", "ls"], 0),
        (["recipes", "ls", "--json"], 0),
        (["recipes", "show", "digits/petra_revnet_tiny"], 0),
        (["recipes", "show", "nothing"], 2),
        (["report", "benchmarks/methods/results.json"], 0),
        (["--show-completion", "bash"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_network_imports_no_torch(arguments: list[str], code: int) -> None:
    modules = modules_of(*arguments, code=code)
    assert "petra_zoo.cli.main" in modules
    assert not HEAVY & {module.partition(".")[0] for module in modules}
    assert len(modules) < MOST


@pytest.mark.slow
def test_list_imports_little_more_than_timm() -> None:
    modules = modules_of("list", code=0)
    assert "timm" in modules
    rooms = {module.split(".")[1] for module in modules if module.startswith("petra_zoo.")}
    assert not rooms & {"converters", "hub", "training", "evaluation", "planning", "checkpoints", "data", "petra"}
    assert "rich.table" not in modules
