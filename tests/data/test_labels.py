"""Labels go by name: evaluation, comparison, distillation, fine-tuning, and the splits of one data set."""

import json
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

from petra_zoo.checkpoints.load import load_model
from petra_zoo.data.labels import names_of, numbers_in, positions, shown_names
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.evaluation.checkpoint_evaluation import EvaluationOptions, evaluate_checkpoint
from petra_zoo.evaluation.comparison import compare
from petra_zoo.settings.recipe import Recipe
from petra_zoo.settings.recipe_files import make_recipe
from petra_zoo.training.build import build_model, open_data
from petra_zoo.training.distillation import build_distillation, load_teacher
from petra_zoo.training.finetuning import start_lines
from petra_zoo.training.run_directory import RunDirectory
from tests.hub.saved_models import DIGITS, save

NAMES = ["ant", "bee", "cat", "dog"]
REORDERED = ["dog", "ant", "cat", "bee"]
CPU, PIXELS = EvaluationOptions(device="cpu"), EvaluationOptions(device="cpu", fingerprints=True)
Folders = Callable[[Sequence[str]], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labels") / "checkpoint"
    save(path, NAMES)
    return path


@pytest.fixture(scope="module")
def images(checkpoint: Path) -> dict[str, list[Image.Image]]:
    """Ten images or fewer of what the checkpoint takes for each class, so that it is right about all of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - DIGITS["mean"][0]) / DIGITS["std"][0]
    with torch.no_grad():
        seen = load_model(str(checkpoint), torch.device("cpu"))(normalised).argmax(1).tolist()
    found = {name: [Image.fromarray(pixels[i]) for i, c in enumerate(seen) if NAMES[c] == name][:10] for name in NAMES}
    assert all(found.values())
    return found


@pytest.fixture
def folders(images: dict[str, list[Image.Image]], tmp_path: Path) -> Folders:
    """Writes an image folder of some classes; `cat=kitten` puts the cats into a folder of another name."""

    def write(names: Sequence[str]) -> Path:
        for split in ("train", "val"):
            for name in names:
                shown, _, called = name.partition("=")
                folder = tmp_path / "data" / split / (called or shown)
                folder.mkdir(parents=True)
                for i, picture in enumerate(images[shown]):
                    picture.save(folder / f"{i}.png")
        return tmp_path / "data"

    return write


def reordered(checkpoint: Path, path: Path, names: list[str] | None = REORDERED) -> Path:
    """The same network with its classes in another order, or without names."""
    shutil.copytree(checkpoint, path)
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    if names is None:
        del config["label_names"]
    else:
        config["label_names"] = names
        for key in ("fc.weight", "fc.bias"):
            weights[key] = weights[key][[NAMES.index(name) for name in names]].contiguous()
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def top1(checkpoint: Path, data: Path) -> float:
    return evaluate_checkpoint(str(checkpoint), "folder", data_dir=data, options=CPU).evaluation.top1


def recipe(data: Path, **settings: Any) -> Recipe:
    base = {"model": "petra_revnet_tiny", "dataset": "folder", "data_dir": str(data), "img_size": 8, "device": "cpu"}
    return make_recipe(base | settings)


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [NAMES, ["bee", "dog"], ["dog"]], ids=len)
def test_a_part_of_the_checkpoints_classes_is_evaluated_rightly(
    checkpoint: Path, folders: Folders, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert top1(checkpoint, folders(names)) == 100.0
    assert not caplog.records


def test_a_checkpoint_may_number_its_classes_in_another_way(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    assert top1(reordered(checkpoint, tmp_path / "reordered"), folders(NAMES)) == 100.0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [*NAMES, "ant=zebra"],
            "does not know class 'zebra' of data set folder; it knows ant, bee, cat, dog: rename or remove",
        ),
        (["ant", "bee", "cat=cats", "dog"], "does not know class 'cats' .*; nearest 'cat': rename or remove"),
    ],
)
def test_a_class_that_the_checkpoint_does_not_know_is_refused_by_name(
    checkpoint: Path, folders: Folders, names: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        top1(checkpoint, folders(names))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("training_folder", ["empty", "missing"])
def test_evaluation_needs_no_training_images(checkpoint: Path, folders: Folders, training_folder: str) -> None:
    data = folders(["bee", "dog"])
    shutil.rmtree(data / "train")
    if training_folder == "empty":
        (data / "train").mkdir()
    assert top1(checkpoint, data) == 100.0


def test_without_names_on_one_side_numbers_count_and_a_line_says_so(
    checkpoint: Path, folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nameless = reordered(checkpoint, tmp_path / "nameless", None)
    assert top1(nameless, folders(NAMES)) == 100.0
    assert [record.message for record in caplog.records] == [
        f"{nameless} does not name its classes: {nameless} and data set folder are matched by number"
    ]
    caplog.clear()
    evaluate_checkpoint(str(checkpoint), "synthetic:4x8x128", options=CPU)
    assert [record.message.split(":")[0] for record in caplog.records] == ["data set synthetic"]


def test_without_names_on_both_sides_there_is_nothing_to_say(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate_checkpoint(str(reordered(checkpoint, tmp_path / "nameless", None)), "synthetic:4x8x128", options=CPU)
    assert not caplog.records


# -- comparison -------------------------------------------------------------------------------------------------------


def test_models_that_number_the_classes_in_different_ways_are_compared_by_name(
    checkpoint: Path, folders: Folders, tmp_path: Path
) -> None:
    data = folders(NAMES)
    sources = (checkpoint, reordered(checkpoint, tmp_path / "reordered"))
    reports = [evaluate_checkpoint(str(source), "folder", data_dir=data, options=PIXELS) for source in sources]
    found = compare(*reports)
    assert (found.agreement, found.only_first_right, found.only_second_right) == (100.0, 0, 0)


def test_other_images_with_the_same_labels_are_not_compared(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    data = folders(NAMES)
    shutil.copytree(data, tmp_path / "copy")
    changed = tmp_path / "copy" / "val" / "bee" / "0.png"
    first, same = (
        evaluate_checkpoint(str(checkpoint), "folder", data_dir=place, options=PIXELS)
        for place in (data, changed.parents[2])
    )
    assert compare(first, same).agreement == 100.0, "the same images at another place"
    with Image.open(changed) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(changed)
    other = evaluate_checkpoint(str(checkpoint), "folder", data_dir=changed.parents[2], options=PIXELS)
    with pytest.raises(UserError, match=r"not evaluated on the same images \(\d+ and \d+ images, of which 1 differ\)"):
        compare(first, other)


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_teachers_classes_are_put_into_the_students_order(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    setting = recipe(folders(["bee", "dog"]), kd_model_name=str(reordered(checkpoint, tmp_path / "teacher")))
    data = open_data(setting)[0]
    teacher = load_teacher(setting, torch.device("cpu"))
    distillation = build_distillation(setting, teacher, 2, Preprocessing.from_timm(DIGITS), data)
    assert distillation is not None
    batch = torch.randn(3, 3, 8, 8)
    expected = load_model(str(checkpoint), torch.device("cpu"))(batch)[:, [1, 3]]
    torch.testing.assert_close(distillation.labels(batch, torch.tensor([0, 1, 0]))[:, 2:], expected)


def test_a_teacher_that_lacks_a_class_is_refused(checkpoint: Path, folders: Folders) -> None:
    setting = recipe(folders(["bee", "dog=eel"]), kd_model_name=str(checkpoint))
    teacher = load_teacher(setting, torch.device("cpu"))
    with pytest.raises(UserError, match=r"the teacher .* does not know class 'eel' of data set folder"):
        build_distillation(setting, teacher, 2, Preprocessing.from_timm(DIGITS), open_data(setting)[0])


def test_a_kept_head_follows_the_order_of_the_new_data(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    setting = recipe(folders(NAMES), pretrained=str(reordered(checkpoint, tmp_path / "reordered")))
    data = open_data(setting)[0]
    model = build_model(setting, data)
    expected = load_model(str(checkpoint), torch.device("cpu"))
    assert torch.equal(model.fc.weight, expected.fc.weight)
    assert torch.equal(model.fc.bias, expected.fc.bias)
    assert next(start_lines(setting, model, data.class_names)).endswith("head kept: 4 classes")


def test_a_class_of_another_name_gets_the_row_that_is_left(checkpoint: Path, folders: Folders) -> None:
    setting = recipe(folders(["ant=zebra", "bee", "cat", "dog"]), pretrained=str(checkpoint))
    data = open_data(setting)[0]
    model = build_model(setting, data)
    rows = load_model(str(checkpoint), torch.device("cpu")).fc.weight
    assert data.class_names == ["bee", "cat", "dog", "zebra"]
    assert torch.equal(model.fc.weight, rows[[1, 2, 3, 0]])
    assert "under other names" in next(start_lines(setting, model, data.class_names))


def test_a_validation_split_is_numbered_as_the_training_split(folders: Folders) -> None:
    """timm and torchvision number each split by the classes that it has."""
    data = folders(NAMES)
    shutil.rmtree(data / "val" / "ant")
    train, val = open_data(recipe(data, dataset="torch/image_folder"))
    assert val.class_names == train.class_names == NAMES
    assert {Path(val.source(i)).parent.name for i in range(len(val)) if val[i][1] == 1} == {"bee"}
    assert min(val[i][1] for i in range(len(val))) == 1


# -- names ------------------------------------------------------------------------------------------------------------


def test_imagenets_synsets_are_timms_descriptions() -> None:
    info = ImageNetInfo("imagenet-1k")
    synsets, described = info.label_names(), info.label_descriptions()
    assert positions(synsets, described) == positions(described, synsets) == list(range(1000))
    cranes = ["n03126707", "n02012849"]  # both described as "crane"
    assert positions(cranes, described) == positions(cranes, synsets) == [517, 134]
    assert positions(["n01440764", "n00000000"], ["goldfish", "tench, Tinca tinca"]) == [1, None]
    assert positions(["tench, Tinca tinca"], ["n01443537", "n01440764"]) == [1]


def test_imagenet_weights_have_its_synsets_and_show_its_descriptions() -> None:
    model = timm.create_model("petra_revnet18", device="meta")
    assert names_of(model) == ImageNetInfo("imagenet-1k").label_names()
    assert shown_names(model)[0] == "tench, Tinca tinca"


def test_a_thousand_classes_are_not_imagenets_for_their_number() -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=1000, device="meta")
    assert names_of(model) is None
    assert shown_names(model)[999] == "class 999"


def test_classes_beyond_the_datas_are_saved_as_numbers(folders: Folders, tmp_path: Path) -> None:
    setting = recipe(folders(["bee", "dog"]), num_classes=1000, output=str(tmp_path / "run"))
    model = build_model(setting, open_data(setting)[0])
    RunDirectory(setting, "run").save_model(model, Preprocessing.from_timm(DIGITS), open_data(setting)[0].class_names)
    names = shown_names(load_model(str(tmp_path / "run"), torch.device("cpu")))
    assert (names[:3], len(names)) == (["bee", "dog", "class 2"], 1000)


def test_a_kept_head_without_names_is_matched_by_number(checkpoint: Path, folders: Folders, tmp_path: Path) -> None:
    nameless = reordered(checkpoint, tmp_path / "nameless", None)
    setting = recipe(folders(NAMES), pretrained=str(nameless))
    model = build_model(setting, open_data(setting)[0])
    assert torch.equal(model.fc.weight, load_model(str(nameless), torch.device("cpu")).fc.weight)
    assert "matched by number" in next(start_lines(setting, model, NAMES))


def test_accents_may_be_written_in_two_ways() -> None:
    name = "crème brûlée"
    assert positions([unicodedata.normalize("NFD", name)], [unicodedata.normalize("NFC", name)]) == [0]


def test_a_name_that_two_classes_have_is_refused() -> None:
    with pytest.raises(UserError, match="the checkpoint has 2 classes of the name 'bee'"):
        numbers_in(["ant", "bee"], ["bee", "ant", "bee"], "the checkpoint", "the data")


def test_descriptions_are_preferred_to_names() -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=2, device="meta")
    model.pretrained_cfg |= {"label_names": {"0": "n01", "1": "n02"}, "label_descriptions": {"n01": "ant"}}
    assert shown_names(model) == ["ant", "n02"]
