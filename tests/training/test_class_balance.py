"""Recipes that balance classes: what the loss becomes, what is refused, and that a stopped run goes on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from petra_zoo.data.datasets import DATASETS, open_dataset, register_dataset
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.stored_datasets import ArrayDataset
from petra_zoo.errors import UserError
from petra_zoo.settings.recipe_files import load_recipe
from petra_zoo.training.losses import LOSSES, build_loss, find_loss, register_loss
from petra_zoo.training.preparation import prepare
from petra_zoo.training.progress import Reporter
from petra_zoo.training.run import train

CPU = torch.device("cpu")
TINY = ["dataset=uneven", "epochs=1", "workers=0", "stages=3", "warmup_epochs=0", "batch_size=8", "device=cpu"]


@pytest.fixture(autouse=True)
def uneven():  # type: ignore[no-untyped-def]
    with DATASETS.restored():

        @register_dataset("uneven")
        def open_uneven(split: str, data_dir: Path | None) -> ImageDataset:
            labels = np.repeat([0, 1], [40, 8])
            images = np.random.default_rng(0).integers(0, 256, (48, 8, 8, 3), dtype=np.uint8)
            return ArrayDataset(images, labels, ["many", "few"], mean=(0.5,) * 3, std=(0.5,) * 3)

        yield


def recipe(*settings: str):  # type: ignore[no-untyped-def]
    return load_recipe("digits/petra_revnet_tiny", ["update_size=null", "max_delay=null", *TINY, *settings])


def test_the_mean_of_weighted_micro_batches_is_that_of_all_their_images() -> None:
    loss = build_loss(recipe("class_weights=balanced"), open_dataset("uneven", "train"), 2, CPU)
    logits, labels = torch.randn(48, 2), torch.arange(48) % 5 // 4
    parts = [loss(logits[i : i + 8], labels[i : i + 8]) for i in range(0, 48, 8)]
    assert torch.allclose(torch.stack(parts).mean(), loss(logits, labels))
    per_image = F.cross_entropy(logits, labels, reduction="none") * torch.tensor([48 / 80, 48 / 16])[labels]
    assert torch.allclose(loss(logits, labels), per_image.mean())
    assert torch.allclose(loss(logits, F.one_hot(labels, 2).float()), per_image.mean())


def test_without_weights_the_loss_is_torchs_to_the_bit() -> None:
    logits, labels = torch.randn(9, 3), torch.arange(9) % 3
    assert torch.equal(find_loss("cross_entropy")(logits, labels), F.cross_entropy(logits, labels))


def test_a_loss_that_takes_no_weights_names_those_that_do() -> None:
    with pytest.raises(
        UserError, match=r"loss=bce takes no class_weights: use loss=cross_entropy, or sampler=balanced"
    ):
        build_loss(recipe("class_weights=balanced", "loss=bce"), open_dataset("uneven", "train"), 2, CPU)


def test_a_registered_loss_with_a_weight_is_given_one() -> None:
    with LOSSES.restored():

        @register_loss("own")
        def own(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
            assert weight is not None
            return weight.sum()

        data = open_dataset("uneven", "train")
        loss = build_loss(recipe("class_weights=balanced", "loss=own"), data, 2, CPU)
        assert float(loss(torch.zeros(1, 2), torch.zeros(1))) == pytest.approx(48 / 80 + 48 / 16)


def test_both_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="sampler and class_weights are both balanced"):
        recipe("sampler=balanced", "class_weights=balanced")


def test_a_balanced_sampler_feeds_both_classes_alike() -> None:
    prepared = prepare(recipe("sampler=balanced"))
    labels = torch.cat([labels for _, labels in prepared.train_loader])
    assert labels.bincount().tolist() == [24, 24]


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["sampler=balanced", "class_weights=balanced"])
def test_a_run_goes_on_with_the_same_bits(setting: str, tmp_path: Path) -> None:
    settings = ["epochs=2", "checkpoint_every=4 ticks", "keep_last=9", setting]
    whole = train(recipe(*settings, f"output={tmp_path / 'whole'}"), reporter=Reporter(quiet=True))
    middle = sorted((whole.path / "checkpoints").iterdir())[0]
    again = recipe(*settings, f"output={tmp_path / 'again'}")
    rest = train(again, reporter=Reporter(quiet=True), resume=str(middle))
    assert (rest.path / "model.safetensors").read_bytes() == (whole.path / "model.safetensors").read_bytes()
