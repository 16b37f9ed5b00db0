"""Recipes for a folder of one's own: each trains on a folder of drawn images, by the command that its comment names."""

import re
from pathlib import Path

import pytest

from petra_zoo.settings.recipe_files import list_recipes, load_recipe, recipe_text
from petra_zoo.training.recipe_validation import validate_recipes
from tests.cli.test_main import petra_zoo
from tests.drawn_folder import CLASSES, write_drawn_folder

NAMES = [name for name in list_recipes() if name.startswith("folder/")]
TRAINED = [name for name in NAMES if load_recipe(name).pretrained]
ONE_EPOCH = ["epochs=1", "warmup_epochs=0", "workers=0", "amp=false", "batch_size=8"]
SMALL = ["model=petra_revnet_tiny", "img_size=16"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn_folder(tmp_path_factory.mktemp("drawn") / "photos", per_class=8)


def train(name: str, photos: Path, output: Path, *settings: str) -> None:
    done = petra_zoo("train", name, f"data_dir={photos}", f"output={output}", *ONE_EPOCH, *settings)
    assert done.returncode == 0, done.stderr
    assert all(f'"{kind}"' in (output / "config.json").read_text() for kind in CLASSES)


def test_there_is_one_from_scratch_for_every_size_one_to_fine_tune_and_a_probe() -> None:
    assert NAMES == [f"folder/{name}" for name in (
        "finetune_224", "linear_probe", "scratch_224", "scratch_32", "scratch_64"
    )]  # fmt: skip
    assert {name: load_recipe(name).img_size for name in NAMES if "scratch" in name} == {
        f"folder/scratch_{size}": size for size in (32, 64, 224)
    }


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_an_epoch_on_a_folder_without_splits(name: str, photos: Path, tmp_path: Path) -> None:
    weights = ["pretrained=true"] if name in TRAINED else []
    train(name, photos, tmp_path / "run", *SMALL, *weights)


@pytest.mark.parametrize("name", NAMES)
def test_each_builds_all_that_it_asks_for(name: str) -> None:
    (verdict,) = validate_recipes(name, [*SMALL, "num_classes=4"])
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("name", NAMES)
def test_without_a_folder_each_says_what_is_missing(name: str) -> None:
    for words in (["train", name], ["train", name, "--dry-run"]):
        done = petra_zoo(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "petra-zoo: data set 'folder' needs data_dir=DIR, the folder that holds it\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_in_the_comment_set_what_there_is(name: str) -> None:
    commands = re.findall(r"petra-zoo train (folder/\S+) (.*?)(?:  |$)", recipe_text(name), flags=re.MULTILINE)
    assert name in [recipe for recipe, _ in commands]
    for recipe, settings in commands:
        load_recipe(recipe, [word for word in settings.split(" --")[0].split() if "=" in word])


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_to_change_first_and_where_it_is_from(name: str) -> None:
    comment = recipe_text(name).split("\nmodel:")[0]
    assert "\n# Change first: " in comment
    assert re.search(r"\n# Source: .*", comment)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_its_own_network_at_its_own_size(name: str, photos: Path, tmp_path: Path) -> None:
    weights = ["pretrained=false"] if name in TRAINED else []
    train(name, photos, tmp_path / "run", *weights)
