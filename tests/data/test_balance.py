"""Classes of unequal size made even: weights, and the order of an epoch."""

from collections import Counter

import numpy as np
import torch
from sklearn.utils.class_weight import compute_class_weight

from petra_zoo.data.balance import balanced_order, balanced_weights, class_counts, occurrences
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.loader import ImageLoader, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.data.stored_datasets import ArrayDataset
from petra_zoo.settings.augmentation import Augmentation

LABELS = np.repeat([0, 1, 2], [50, 6, 4])
AS_IT_IS = Preprocessing((3, 4, 4), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)


def uneven() -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3), dtype=np.uint8)
    return ArrayDataset(images, LABELS, ["a", "b", "c"], mean=(0.5,) * 3, std=(0.5,) * 3)


def loader() -> ImageLoader:
    augmentation = Augmentation(hflip=0.5, scale=(0.2, 1.0))
    return create_loader(uneven(), AS_IT_IS, batch_size=8, augmentation=augmentation, seed=3, balanced=True)


def test_weights_are_scikit_learns() -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    assert torch.allclose(balanced_weights(LABELS, 3), torch.from_numpy(expected).float())


def test_a_class_without_images_weighs_one_and_unreadable_images_do_not_count() -> None:
    labels = np.array([0, 0, 2, -1])
    assert class_counts(labels, 4).tolist() == [2, 0, 1, 0]
    assert balanced_weights(labels, 4).tolist() == [0.75, 1.0, 1.5, 1.0]


def test_an_epoch_has_all_classes_alike_and_repeats_an_image_as_late_as_it_can() -> None:
    order = balanced_order(LABELS, np.random.default_rng(0))
    assert len(order) == 60
    assert Counter(LABELS[order]) == {0: 20, 1: 20, 2: 20}
    times = np.bincount(order, minlength=60)
    assert set(times[:50]) == {0, 1}
    assert set(times[50:56]) == {3, 4}
    assert set(times[56:]) == {5}


def test_what_does_not_divide_goes_to_some_classes() -> None:
    counts = Counter(LABELS[balanced_order(LABELS[:59], np.random.default_rng(0))].tolist())
    assert sorted(counts.values()) == [19, 20, 20]


def test_occurrences_count_what_was_before() -> None:
    assert occurrences(np.array([5, 2, 5, 5, 2, 7])).tolist() == [0, 0, 1, 2, 1, 0]


def test_a_repeated_image_is_augmented_anew() -> None:
    data = ArrayDataset(
        np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8),
        np.array([0] * 8 + [1]), ["many", "one"], mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    augmentation = Augmentation(scale=(0.2, 1.0))
    batches = create_loader(data, AS_IT_IS, batch_size=9, augmentation=augmentation, balanced=True)
    ((images, labels),) = batches
    assert len(images[labels == 1].flatten(1).unique(dim=0)) > 1


def test_an_epoch_goes_on_from_any_batch_with_the_same_bits() -> None:
    whole, again = loader(), loader()
    for one in (whole, again):
        one.set_epoch(2)
    rest = list(again.iter_from(4))
    for (images, labels), (same, as_before) in zip(list(whole)[4:], rest, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, as_before)


def test_every_epoch_has_another_order() -> None:
    batches = loader()
    first = [labels for _, labels in batches]
    batches.set_epoch(1)
    assert not all(torch.equal(a, b) for a, b in zip(first, [labels for _, labels in batches], strict=True))


def test_data_sets_know_their_labels_without_reading_images() -> None:
    for name in ("digits", "shapes:20x10", "synthetic:4x8x128"):
        data = open_dataset(name, "val")
        assert data.stored_labels() is not None
        assert data.labels()[:10].tolist() == [data[i][1] for i in range(10)]


def test_a_data_set_that_does_not_know_them_is_read_and_numbered_as_it_is_now() -> None:
    class Unknown(ArrayDataset):
        def stored_labels(self) -> None:  # type: ignore[override]
            return None

    data = Unknown(np.zeros((3, 2, 2, 3), np.uint8), np.array([0, 1, 0]), ["a", "b"], mean=(0.5,) * 3, std=(0.5,) * 3)
    data.number_as([2, 0], ["b", "x", "a"])
    assert data.labels().tolist() == [2, 0, 2]
