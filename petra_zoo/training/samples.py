"""A recipe's data as its network sees it, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from petra_zoo.data.contact_sheet import sample_sheet
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import load_recipe, make_recipe, override_recipe
from petra_zoo.training.build import build_model, open_data, preprocessing_for

_SIZE = 224  # of images that have many


def open_for_a_look(
    dataset: str, data_dir: Path | None = None, recipe: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Recipe, ImageDataset, ImageDataset]:
    """A data set, and the settings through which a network sees it.

    Args:
        dataset: in the place of the recipe's.
        data_dir: where it is; None where the recipe says it, or it needs none.
        recipe: a name, or a `.yaml` file; None: images as they are, of a common size.
        overrides: `KEY=VALUE` each.

    Returns:
        The settings, the split to train on, the split to validate on.

    Raises:
        UserError: settings or data do not allow it.
    """
    place: dict[str, str | Path] = {"dataset": dataset, **({"data_dir": data_dir} if data_dir else {})}
    if recipe is not None:
        settings = load_recipe(recipe, overrides).model_copy(update=place)
        return settings, *open_data(settings)
    plain = make_recipe({"model": "petra_revnet_tiny", "no_aug": True, "dataset": dataset})  # which takes any images
    settings = override_recipe(plain, overrides).model_copy(update=place)
    train, val = open_data(settings)
    size = settings.img_size or train.image_size or _SIZE
    return settings.model_copy(update={"img_size": size}), train, val


def recipe_sheet(recipe: Recipe, train: ImageDataset, count: int = 32) -> Image.Image:
    """The first images of the first epoch; see `sample_sheet`. A run's own micro-batches mix other pairs.

    Args:
        recipe: whose size, normalisation and augmentation hold.
        train: its data.
        count: how many images.

    Raises:
        UserError: the network cannot be had, or an image cannot be read.
    """
    preprocessing = preprocessing_for(recipe, train, build_model(recipe, train))
    balanced = recipe.sampler == "balanced"
    return sample_sheet(train, preprocessing, recipe, count=count, seed=recipe.seed, balanced=balanced)
