"""Classifying image files."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.labels import shown_names
from petra_zoo.errors import Failure, UserError
from petra_zoo.evaluation.prediction import BATCH, predict_images
from tests.data.image_files import damage
from tests.hub.saved_models import save

LABELS = ["ant", "bee", "cat", "dog"]


def image(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_probabilities_are_the_models_on_the_image_prepared_as_its_config_says(tmp_path: Path) -> None:
    model = save(tmp_path / "model", LABELS)
    file = image(tmp_path / "a.png", (20, 13))
    (prediction,) = predict_images(str(tmp_path / "model"), [file], device="cpu")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(loaded), is_training=False)
    with torch.no_grad():
        expected = model(transform(Image.open(file).convert("RGB"))[None]).softmax(1)[0]
    assert prediction.image == str(file)
    assert [guess.label for guess in prediction.guesses] == [LABELS[i] for i in expected.argsort(descending=True)]
    found = [guess.probability for guess in prediction.guesses]
    assert found == pytest.approx(expected.sort(descending=True).values.tolist(), rel=1e-4)
    assert sum(found) == pytest.approx(1.0, rel=1e-5)


def test_topk_is_how_many_classes_come_back_and_at_most_all(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    file = image(tmp_path / "a.png")
    for topk, count in ((2, 2), (9, 4)):
        (prediction,) = predict_images(str(tmp_path / "model"), [file], topk=topk, device="cpu")
        assert len(prediction.guesses) == count


def test_many_images_keep_their_order_over_several_batches(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    files = [image(tmp_path / f"{i}.png", seed=i) for i in range(BATCH + 3)]
    together = predict_images(str(tmp_path / "model"), files, device="cpu")
    assert [prediction.image for prediction in together] == [str(file) for file in files]
    (alone,) = predict_images(str(tmp_path / "model"), [files[-1]], device="cpu")
    assert [guess.index for guess in alone.guesses] == [guess.index for guess in together[-1].guesses]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    save(tmp_path / "model", LABELS)
    file = image(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"), mode=mode)
    assert len(predict_images(str(tmp_path / "model"), [file], device="cpu")) == 1


def test_a_model_for_grey_images_gets_grey_images(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS, in_chans=1)
    (prediction,) = predict_images(str(tmp_path / "model"), [image(tmp_path / "a.png")], device="cpu")
    assert len(prediction.guesses) == 4


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    good, broken = image(tmp_path / "good.png"), tmp_path / "broken.png"
    broken.write_bytes(good.read_bytes()[:60])
    for path, reason in (
        (broken, "broken.png cannot be read as an image"),
        (tmp_path / "none.png", "none.png cannot be read as an image: No such file"),
        (tmp_path, "cannot be read as an image: Is a directory"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            predict_images(str(tmp_path / "model"), [good, path], device="cpu")
        assert "\n" not in str(caught.value)


def test_a_model_without_classifier_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    with pytest.raises(UserError, match="has no classifier"):
        predict_images(str(tmp_path / "model"), [image(tmp_path / "a.png")], device="cpu")


def test_classes_without_names_are_numbered(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    assert shown_names(model) == ["class 0", "class 1", "class 2", "class 3"]


def test_the_bundled_network_reads_digits(tmp_path: Path) -> None:
    data = open_dataset("digits", "val")
    files, labels = [], []
    for i in range(20):
        picture, label = data[i]
        files.append(tmp_path / f"{i}.png")
        picture.save(files[-1])
        labels.append(str(label))
    found = [prediction.guesses[0].label for prediction in predict_images("petra_revnet_tiny.digits", files)]
    assert sum(guess == label for guess, label in zip(found, labels, strict=True)) >= 18


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_for_other_channels_is_refused_in_one_line(tmp_path: Path, channels: int) -> None:
    model = timm.create_model("petra_revnet_tiny", num_classes=4, in_chans=channels)
    config = {"input_size": (channels, 8, 8), "mean": (0.5,) * channels, "std": (0.5,) * channels}
    timm.models.save_for_hf(model, str(tmp_path / "model"), safe_serialization=True, data_config=config)
    with pytest.raises(UserError, match=rf"input_size=\({channels}, 8, 8\) .* expected 1 or 3 channels") as caught:
        predict_images(str(tmp_path / "model"), [image(tmp_path / "a.png")], device="cpu")
    assert "\n" not in str(caught.value)


def test_an_image_is_turned_upright_and_scaled_as_in_training(tmp_path: Path) -> None:
    """The four files show the same picture: upright, turned, in 16 bits and as floats."""
    save(tmp_path / "model", LABELS)
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(grey))
    exif = turned.getexif()
    exif[0x112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(grey).save(tmp_path / "upright.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "float.tiff")
    files = [tmp_path / name for name in ("upright.png", "turned.png", "deep.png", "float.tiff")]
    first, *others = predict_images(str(tmp_path / "model"), files, device="cpu")
    for other in others:
        assert [guess.probability for guess in other.guesses] == pytest.approx(
            [guess.probability for guess in first.guesses], rel=1e-5
        )


@pytest.mark.parametrize("damaged", ["a.avif", "a.dds"])
def test_a_damaged_image_is_one_line_whatever_pillow_raises(tmp_path: Path, damaged: str) -> None:
    save(tmp_path / "model", LABELS)
    with pytest.raises(UserError, match=rf"{damaged} cannot be read as an image") as caught:
        predict_images(str(tmp_path / "model"), [damage(image(tmp_path / damaged))], device="cpu")
    assert "\n" not in str(caught.value)


def test_a_model_that_has_diverged_predicts_nothing(tmp_path: Path) -> None:
    save(tmp_path / "model", LABELS)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["bn1.running_mean"].fill_(float("nan"))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure, match=r"gives no finite logits for .*a\.png"):
        predict_images(str(tmp_path / "model"), [image(tmp_path / "a.png")], device="cpu")
