"""timm's auto-augmentation policies: all that it documents work, others are refused with the recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.loader import Reading, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.data.transforms import seeded_generators, training_transform
from petra_zoo.errors import UserError
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.recipe_files import make_recipe

POLICIES = [
    "rand-m9-mstd0.5-inc1", "rand-m9-n3-mstd0.5", "rand-mstd1-tweights", "rand-m15-mmax20-inc1", "rand-t3a",
    "rand-t3aw-inc1", "rand-m9-p0.7-mstd101", "original", "original-mstd0.5", "originalr", "v0", "v0r-mstd0.5", "3a",
    "augmix-m5-w4-d2", "augmix-m3-b1-mstd1", "augmix-a0.5",
]  # fmt: skip


def build(policy: str, channels: int = 3) -> Any:
    half = (0.5,) * channels
    return training_transform(Augmentation(aa=policy), Preprocessing((channels, 16, 16), half, half))


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 18, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def operations(transform: Any) -> list[Any]:
    (policy,) = transform.transforms[1].transforms
    return policy.ops if hasattr(policy, "ops") else [op for steps in policy.policy for op in steps]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_operation_works_at_every_magnitude(policy: str, mode: str) -> None:
    image = picture(mode)
    with seeded_generators(0):
        for op in operations(build(policy, len(image.getbands()))):
            op.prob, op.magnitude_std = 1.0, 0
            for magnitude in (0, 1, 5, 9, 10, op.magnitude_max or 10):
                op.magnitude = magnitude
                assert op(image).size == image.size


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_policy_works_on_2000_images(policy: str, mode: str) -> None:
    image = picture(mode)
    transform = build(policy, len(image.getbands()))
    for seed in range(2000):
        with seeded_generators(seed):
            assert transform(image).isfinite().all()


def test_no_bits_make_an_image_black() -> None:
    """As with the versions of Pillow with which timm's recipes were found."""
    op = next(op for op in operations(build("rand-m10-inc1")) if op.name == "PosterizeIncreasing")
    op.prob = 1.0
    assert np.asarray(op(picture())).max() == 0
    op.magnitude = 5  # two bits
    assert np.unique(np.asarray(op(picture()))).tolist() == [0, 64, 128, 192]


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_are_accepted_with_the_recipe(policy: str) -> None:
    assert make_recipe({"model": "petra_revnet_tiny", "dataset": "digits", "aa": policy}).aa == policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("foo", r"aa='foo': timm knows no such auto-augmentation policy \(Unknown AA policy foo\); expected one of"),
        ("rand-x3", "Unknown RandAugment config section"),
        ("rand-m9.5", "invalid literal"),
        ("randm9", "no such auto-augmentation policy"),
        ("rand-tfoo", "timm knows no section 'tfoo'"),  # timm takes it for its default set
        ("rand-inc", "timm knows no section 'inc'"),  # and passes over this
        ("original-tweights", "timm knows no section 'tweights'"),
        ("rand-n20-tweights", "n20 operations per image out of 15"),
    ],
)
def test_a_policy_that_timm_does_not_know_is_refused_with_the_recipe(policy: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_recipe({"model": "petra_revnet_tiny", "dataset": "digits", "aa": policy})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transformation_that_fails_names_image_and_policy(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "train" / "bee"
    folder.mkdir(parents=True)
    picture().save(folder / "a.png")
    loader = create_loader(
        open_dataset("folder", "train", data_dir=tmp_path), Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3),
        batch_size=1, augmentation=Augmentation(aa="v0"), reading=Reading(workers=workers),
    )  # fmt: skip
    samples: Any = loader._loader.dataset
    samples._transform = fails
    with pytest.raises(
        UserError, match=r"bee/a\.png: its transformation with aa=v0 fails \(ZeroDivisionError"
    ) as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)
    del caught  # it holds this frame, which holds it: the workers would wait for the garbage collector


def fails(image: Image.Image) -> None:
    _ = image.width / 0
