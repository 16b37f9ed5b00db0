"""timm's own train.py fine-tunes our checkpoints: `--device-modules petra_zoo` is all it needs.

The script is in timm's repository only, neither in its wheel nor in its source distribution: it is fetched from there
once, for the installed version, into pytest's cache.
"""

import importlib.metadata
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.hub.saved_models import save
from tests.hub_fixtures import hub_server  # noqa: F401 - a fixture
from tests.loopback_hub import LoopbackHub

SCRIPT = "https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{}/train.py"


@pytest.fixture(scope="module")
def train_script(request: pytest.FixtureRequest) -> Path:
    version = importlib.metadata.version("timm")
    path: Path = request.config.cache.mkdir("timm-train") / f"train-{version}.py"
    if not path.exists():
        try:
            with urllib.request.urlopen(SCRIPT.format(version), timeout=20) as answer:
                text = answer.read()
        except OSError as error:
            pytest.skip(f"cannot fetch timm {version}'s train.py: {error}")
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(text)
        new.rename(path)
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_train_py_fine_tunes_a_checkpoint_from_the_hub(
    train_script: Path,
    image_folder: Path,
    tmp_path: Path,
    hub_server: LoopbackHub,  # noqa: F811
) -> None:
    saved = save(tmp_path / "model", coupling=0.5)
    files = {path.name: path for path in (tmp_path / "model").iterdir()}
    hub_server.add("zoo/tiny", files)  # type: ignore[arg-type]
    command = [sys.executable, str(train_script), "--device", "cpu", "--device-modules", "petra_zoo"]
    command += ["--model", "hf-hub:zoo/tiny", "--pretrained", "--num-classes", "2", "--data-dir", str(image_folder)]
    command += ["--img-size", "8", "--batch-size", "4", "--workers", "0", "--no-aug", "--opt", "sgd", "--lr", "1e-7"]
    command += ["--epochs", "1", "--warmup-epochs", "0", "--output", str(tmp_path), "--experiment", "run"]
    environment = os.environ | hub_server.environment(tmp_path / "client")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)["state_dict"]
    assert state["fc.weight"].shape == (2, 48)
    for name, p in saved.named_parameters():
        if not name.startswith("fc."):
            torch.testing.assert_close(state[name], p, rtol=1e-3, atol=1e-3)  # it started from the checkpoint
    assert float(state["layer1.coupling"]) == 0.5
