"""A folder of images as people have them: one folder per class, no splits, PNGs of unequal sizes."""

from pathlib import Path

from petra_zoo.data.drawn_datasets import ShapesDataset

CLASSES = ("circle", "cross", "ring", "star")
_SIDES = (32, 40, 48)


def write_drawn_folder(folder: Path, *, per_class: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """Writes drawn shapes to `folder/CLASS/NUMBER.png`, the same ones whenever it is asked; gives the folder."""
    shapes = ShapesDataset("train", lengths=(10 * per_class, 1))
    for index in range(len(shapes)):
        image, label = shapes.read(index)
        name, number = shapes.class_names[label], index // len(shapes.class_names)
        if name not in classes:
            continue
        side = _SIDES[number % len(_SIDES)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.resize((side, 32)).save(folder / name / f"{number:04}.png")
    return folder
