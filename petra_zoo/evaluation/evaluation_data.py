"""Which images a model is evaluated on, their classes numbered as the model numbers them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from petra_zoo.checkpoints.load import run_path
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.folder_split import VAL_FRACTION
from petra_zoo.data.image_dataset import ImageDataset, Split
from petra_zoo.data.labels import all_named, classes_of, names_of, shown_names
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import make_recipe, recipe_settings


@dataclass(frozen=True)
class DataPlace:
    """A data set and where it is.

    Attributes:
        name: see `open_dataset`.
        folder: where its files are.
        split_names: what a data set of timm's calls a part of it; None: as usual.
        val_fraction: the share of a folder without splits that is for validation.
        of_run: whether it is what the run was trained on, which has said how it is split.
    """

    name: str
    folder: Path | None
    split_names: dict[Split, str | None]
    val_fraction: float
    of_run: bool = False

    @classmethod
    def of(cls, source: str, dataset: str | None, data_dir: Path | None, setting: str = "--dataset") -> Self:
        """The data set that is said; else what a run was trained on.

        Args:
            source: a run, or any other model.
            dataset: None: the run's.
            data_dir: where its files are; None: where the run says.
            setting: how the user names a data set.

        Raises:
            UserError: nobody says which.
        """
        run = run_of(source) if dataset in (None, "folder") else None
        # A folder without splits is split as the run has split it: of any share, what it has not trained on.
        fraction = run.val_fraction if run else VAL_FRACTION
        if dataset is not None:
            return cls(dataset, data_dir, {}, fraction)
        if run is None:
            raise UserError(
                f"say which data set to evaluate {source} on: {setting} digits, shapes, cifar10, folder, ..."
            )
        splits: dict[Split, str | None] = {"train": run.train_split, "val": run.val_split}
        return cls(run.dataset, data_dir or run.data_dir, splits, fraction, of_run=data_dir is None)

    def open(self, split: Split) -> ImageDataset:
        """A part of the data.

        Raises:
            DataError: it cannot be had.
        """
        return open_dataset(
            self.name,
            split,
            data_dir=self.folder,
            split_name=self.split_names.get(split),
            val_fraction=self.val_fraction,
            say_split=not self.of_run,
        )


def run_of(source: str) -> Recipe | None:
    """What a run says of its data; None where the source is no run."""
    recipe_file = run_path(source) / "recipe.yaml"
    if not recipe_file.is_file():
        return None
    # Of the data alone: the run's method or loss may be of a module that is not at hand.
    settings = recipe_settings(str(recipe_file))
    of_data = ("model", "dataset", "data_dir", "train_split", "val_split", "val_fraction")
    return make_recipe({key: settings[key] for key in of_data if key in settings})


def number_as_the_model(data: ImageDataset, model: Classifier, source: str, name: str) -> list[str]:
    """Numbers the data's classes as the model does, by their names; gives the names of the model's classes.

    Args:
        data: is numbered.
        model: whose classes count.
        source: what the model is called.
        name: what the data is called.

    Raises:
        UserError: the data has classes that the model does not know.
    """
    shown = shown_names(model)
    classes = classes_of(model, source, data.class_names, data.named, name)
    if classes is not None:
        data.number_as(classes, shown)
    elif model.num_classes < data.num_classes:
        raise UserError(
            f"{source} tells {model.num_classes} classes apart, {name} has {data.num_classes}: "
            "fine-tune the model on it first"
        )
    elif names_of(model) is None:
        return all_named(data.class_names, model.num_classes)
    return shown
