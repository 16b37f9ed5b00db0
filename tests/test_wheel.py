"""The built wheel: everything is in it, and it works from where it was installed, away from the source tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Top-level folders, where pyproject.toml's package-dir installs them, and which of their files belong into the wheel.
PLACES = {
    "petra_zoo": ("petra_zoo", {".py", ".typed", ".safetensors", ".html", ".yaml", ".json"}),
    "converters": ("petra_zoo/converters", {".py"}),
    "recipes": ("petra_zoo/recipes", {".py", ".yaml"}),
    "model_cards": ("petra_zoo/model_cards", {".py", ".md"}),
}

# Prints where things come from, then reads one file of each kind through the installed package.
READ_INSTALLED = """
from importlib.metadata import version
from importlib.resources import files

import petra_zoo, petra_zoo.converters, petra_zoo.model_cards, petra_zoo.recipes
import timm

for package in (petra_zoo, petra_zoo.converters, petra_zoo.model_cards, petra_zoo.recipes):
    print(package.__file__)
assert petra_zoo.__version__ == version("petra-zoo")
assert timm.list_models("petra_*"), "importing the package registered no model"
assert files("petra_zoo").joinpath("py.typed").is_file()
import yaml
recipes = [recipe for folder in files("petra_zoo.recipes").iterdir() if folder.is_dir()
           for recipe in folder.iterdir() if recipe.name.endswith(".yaml")]
assert recipes, "no recipe was installed"
for recipe in recipes:
    assert isinstance(yaml.safe_load(recipe.read_text(encoding="utf-8")), dict), recipe
"""


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: setuptools leaves build/ behind, and would pack what an earlier build left there.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PLACES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    # Without isolation, so that no network is needed; the test extra brings a setuptools that is new enough.
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist"), cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.mark.timeout(300)
def test_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, (place, kinds) in PLACES.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    }
    expected |= {"petra_zoo/py.typed", "petra_zoo/model_cards/__init__.py"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("petra_zoo/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_installed_wheel_reads_its_recipes(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    _run(sys.executable, *install, f"--target={target}", str(wheel), cwd=tmp_path)
    # PYTHONPATH comes before the source tree's editable installation, and torch stays importable.
    printed = _run(sys.executable, "-c", READ_INSTALLED, cwd=tmp_path, PYTHONPATH=str(target))
    places = [Path(line) for line in printed.splitlines()]
    assert len(places) == 4
    assert all(place.is_relative_to(target) for place in places), printed
