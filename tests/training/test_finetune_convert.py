"""Fine-tuning a converted network by the recipe: from the converter's directory to a network at coupling 1."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from timm.models import save_for_hf

from petra_zoo.converters import convert, save_converted
from tests.cli.test_main import petra_zoo
from tests.training.test_coupling_schedule import small

SETTINGS = ["img_size=32", "batch_size=16", "workers=0", "epochs=3", "coupling_epochs=2", "warmup_epochs=0"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of 5 classes in ImageNet's layout."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, kind, i in product(("train", "val"), "abcde", range(10)):
        (folder / split / kind).mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / split / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and what it was converted into, as directories."""
    folder = tmp_path_factory.mktemp("networks")
    network = small()
    save_for_hf(network, str(folder / "source"), safe_serialization=True, data_config={"input_size": (3, 32, 32)})
    save_converted(convert(network, purpose="petra"), folder / "converted")
    return folder / "source", folder / "converted"


def finetune(networks: tuple[Path, Path], pictures: Path, output: Path, *settings: str) -> tuple[list[float], float]:
    """Couplings of the network that the recipe leaves, and its last training loss."""
    source, converted = networks
    names = ["model=petra_revnet18", f"pretrained={converted}", f"kd_model_name={source}", f"output={output}"]
    done = petra_zoo("train", "finetune/convert", *names, f"data_dir={pictures}", *SETTINGS, *settings)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f"local-dir:{output}", pretrained=True)
    losses = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["event"] for row in losses].count("validation") == 3
    return [layer.g() for layer in model.coupled_layers()], losses[-1]["loss"]


@pytest.mark.parametrize("settings", [["stages=3", "model_ema=true"], ["stages=1", "method=reversible"]])
def test_the_recipe_distils_and_moves_couplings_to_1(
    settings: list[str], networks: tuple[Path, Path], pictures: Path, tmp_path: Path
) -> None:
    couplings, _ = finetune(networks, pictures, tmp_path / "run", *settings)
    assert couplings == [1.0] * 4
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["coupling_epochs"] == 2


def test_couplings_stay_and_labels_alone_teach_where_the_recipe_says_so(
    networks: tuple[Path, Path], pictures: Path, tmp_path: Path
) -> None:
    before = [layer.g() for layer in timm.create_model(f"local-dir:{networks[1]}", pretrained=True).coupled_layers()]
    couplings, _ = finetune(networks, pictures, tmp_path / "run", "coupling_epochs=0", "kd_model_name=null", "stages=2")
    assert couplings == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["kd_model_name=resnet18z"], "model 'resnet18z' is unknown"),
        (["num_classes=7"], "the teacher tells 5 classes apart, the network 7"),
        (["model=petra_revnet18_paper_cifar", "pretrained=false"], "has no coupling to move"),
        (["coupling_epochs=-1"], "coupling_epochs=-1"),
    ],
)
def test_what_cannot_be_is_one_line(
    settings: list[str], message: str, networks: tuple[Path, Path], pictures: Path, tmp_path: Path
) -> None:
    source, converted = networks
    names = ["model=petra_revnet18", f"pretrained={converted}", f"kd_model_name={source}", f"output={tmp_path / 'run'}"]
    done = petra_zoo("train", "finetune/convert", *names, f"data_dir={pictures}", *SETTINGS, "stages=2", *settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
