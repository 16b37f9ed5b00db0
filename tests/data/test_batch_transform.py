"""The last step in front of the network: the bits of torchvision's normalisation and of timm's mixing, done later."""

import pytest
import torch
from timm.data.mixup import Mixup
from torchvision.transforms import Compose, Normalize, ToTensor

from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.datasets import open_dataset
from petra_zoo.data.feed import on_device
from petra_zoo.data.loader import ImageLoader, create_loader
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.data.transforms import seeded_generators
from petra_zoo.settings.augmentation import Augmentation
from tests.data.test_loader import FewSamples

PREPROCESSING = Preprocessing((3, 32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=1.0)


def make_loader(augmentation: Augmentation | None, batch_size: int = 7) -> ImageLoader:
    return create_loader(
        FewSamples(open_dataset("shapes", "val"), 47),
        PREPROCESSING,
        batch_size=batch_size,
        augmentation=augmentation,
        seed=3,
    )


def test_bytes_become_what_torchvision_makes_of_the_image() -> None:
    (images,), _ = next(iter(make_loader(None).read()))
    assert images.dtype == torch.uint8
    shapes = open_dataset("shapes", "val")
    theirs = Compose([ToTensor(), Normalize(PREPROCESSING.mean, PREPROCESSING.std)])
    expected = torch.stack([theirs(shapes.read(i)[0]) for i in range(len(images))])
    assert torch.equal(BatchTransform(PREPROCESSING)(images), expected)


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_batches_are_mixed_as_timm_mixes_them(settings: dict[str, float]) -> None:
    loader = make_loader(Augmentation(**settings, mixup_prob=0.7, smoothing=0.1), batch_size=8)
    theirs = Mixup(
        settings.get("mixup", 0.0), settings.get("cutmix", 0.0), prob=0.7, label_smoothing=0.1, num_classes=10
    )
    plain = make_loader(Augmentation(), batch_size=8)
    mixed = 0
    for at, ((images, labels), (found, soft)) in enumerate(zip(plain, loader, strict=True)):
        even = len(images) // 2 * 2
        before = images.clone()
        with seeded_generators(2, 3, 0, at):
            expected, theirs_soft = theirs(images[:even], labels[:even])
        assert torch.equal(found[:even], expected)
        assert torch.equal(found[even:], images[even:])
        assert torch.equal(soft[:even], theirs_soft)
        mixed += not torch.equal(before, images)
    assert 0 < mixed < len(loader)


def test_what_is_given_stays_as_it_is() -> None:
    for images in (torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.randn(4, 3, 8, 8)):
        before = images.clone()
        BatchTransform(PREPROCESSING)(images, torch.tensor([0.0, 8.0, 0.0, 8.0, 0.5, 0.5]))
        assert torch.equal(images, before)


def test_nothing_is_read_back_and_nothing_comes_from_the_host() -> None:
    """On the meta device there is nothing to read, and a tensor of another device is refused."""
    images = torch.empty(4, 3, 8, 8, dtype=torch.uint8, device="meta")
    assert BatchTransform(PREPROCESSING, "meta")(images, torch.empty(6, device="meta")).shape == images.shape


def test_erased_images_come_normalised() -> None:
    (images,), _ = next(iter(make_loader(Augmentation(reprob=1.0)).read()))
    assert images.dtype == torch.float32
    assert torch.equal(BatchTransform(PREPROCESSING)(images), images)


def test_a_batch_keeps_its_numbers_on_its_way_to_the_device() -> None:
    loader = make_loader(Augmentation(mixup=1.0))
    for (images, numbers), (mixed, soft) in zip(
        on_device(loader.read(), torch.device("cpu"), torch.channels_last), loader, strict=True
    ):
        assert images[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(BatchTransform(PREPROCESSING)(*images), mixed)
        assert torch.equal(numbers, soft)


@pytest.mark.gpu
def test_a_copied_batch_is_not_overwritten_while_it_is_in_use() -> None:
    device = torch.device("cuda")
    batches = [((torch.full((64, 3, 64, 64), i, dtype=torch.uint8).pin_memory(),), torch.tensor(i)) for i in range(32)]
    slow, sums = torch.randn(2048, 2048, device=device), []
    for (images,), label in on_device(batches, device):
        for _ in range(20):
            slow = (slow @ slow).clamp(-1, 1)
        sums.append(torch.stack([images.min(), images.max(), label]))
    assert [x.tolist() for x in sums] == [[i, i, i] for i in range(32)]
