"""Batches of augmented images, every one of them a function of (seed, epoch, index) alone."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from petra_zoo.data.balance import Labels, balanced_order, occurrences
from petra_zoo.data.batch_transform import BatchTransform
from petra_zoo.data.feed import Batch
from petra_zoo.data.image_dataset import BadImage, DataError, ImageDataset, fingerprint
from petra_zoo.data.mixing import Mixer
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.data.transforms import Transform, evaluation_transform, seeded_generators, training_transform
from petra_zoo.errors import UserError
from petra_zoo.settings.augmentation import Augmentation
from petra_zoo.settings.types import BadImagePolicy

# The label of an image that could not be read in an evaluation: torch's losses pass over it, and so does `score`.
LEFT_OUT = -100

# One number per purpose, so that no two draws share a seed.
_SHUFFLE, _SAMPLE, _MIX = range(3)


@dataclass(frozen=True)
class Sharding:
    """Which part of an epoch this process takes: every `count`-th batch; what does not divide is left out.

    Attributes:
        index: which of the replicas this is.
        count: how many replicas share the batches.
    """

    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        workers: Processes that read and augment; they stay alive between epochs. 0 for this process.
        on_bad_image: `skip` puts the next readable sample in the place of an undecodable one; `fail` raises.
        leave_out: Let `skip` put a blank with the label `LEFT_OUT` there instead, so that no sample counts twice.
        fingerprints: Whether to keep a fingerprint of every decoded image.
        pin_memory: Give batches in page-locked memory, for faster copies to a GPU.
    """

    workers: int = 0
    on_bad_image: BadImagePolicy = "fail"
    leave_out: bool = False
    fingerprints: bool = False
    pin_memory: bool = False


@dataclass(frozen=True)
class _Place:
    """What the sampler hands to the data set: carrying the epoch here takes it into persistent workers too.

    Attributes:
        before: how often this epoch has had the image before; it is augmented anew each time.
    """

    epoch: int
    index: int
    before: int = 0


class _Sample(NamedTuple):
    image: Tensor
    label: int
    bad: list[BadImage]
    fingerprint: bytes = b""


class _Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    bad: list[BadImage]
    fingerprints: list[bytes]


@dataclass
class _Batches:
    """The batch sampler: lists of places. The order is drawn from (seed, epoch), balanced where there are labels."""

    length: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    sharding: Sharding
    labels: Labels | None = None
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        full, rest = divmod(self.length, self.batch_size)
        single = self.shuffle and rest == 1 and full > 0  # a batch to train on of which no norm can tell the variance
        keeps_rest = rest > 0 and not self.drop_last and not single
        return (full + keeps_rest) // self.sharding.count  # every shard has as many, so that replicas stay in step

    @property
    def left_out(self) -> int:
        """How many images are in no batch of an epoch."""
        return max(0, self.length - len(self) * self.sharding.count * self.batch_size)

    def __iter__(self) -> Iterator[list[_Place]]:
        order = self._order()
        before = np.zeros_like(order) if self.labels is None else occurrences(order)
        places = [at * self.sharding.count + self.sharding.index for at in range(self.start, len(self))]
        chunks = [slice(at * self.batch_size, (at + 1) * self.batch_size) for at in places]
        return iter([list(map(_Place, repeat(self.epoch), order[c].tolist(), before[c].tolist())) for c in chunks])

    def _order(self) -> Labels:
        if not self.shuffle:
            return np.arange(self.length)
        generator = np.random.default_rng((_SHUFFLE, self.seed, self.epoch))
        return generator.permutation(self.length) if self.labels is None else balanced_order(self.labels, generator)


class _Samples(Dataset[_Sample | DataError]):
    """The data set as workers see it: images transformed, trouble handed over as a value.

    An error raised in a worker would reach the main process as a traceback in text; returned, it stays one line.
    """

    def __init__(
        self,
        source: ImageDataset,
        transform: Transform,
        size: tuple[int, int, int],
        reading: Reading,
        *,
        seed: int | None,
        policy: str | None,
    ) -> None:
        self._source, self._transform, self._size, self._reading = source, transform, size, reading
        self._seed, self._policy = seed, policy

    def __getitem__(self, place: _Place) -> _Sample | DataError:
        try:
            if self._reading.leave_out and self._reading.on_bad_image == "skip":
                found = self._source.try_load(place.index)
                if isinstance(found, BadImage):  # batches keep their size, in every process
                    return _Sample(torch.zeros(self._size, dtype=torch.uint8), LEFT_OUT, [found])
                bad: list[BadImage] = []
                image, label = found
            else:
                image, label, bad = self._source.load(place.index, self._reading.on_bad_image)
        except DataError as error:
            return error
        kept = fingerprint(image) if self._reading.fingerprints else b""
        if self._size[0] == 1:
            image = image.convert("L")
        try:
            return _Sample(self._transformed(image, place), label, bad, kept)
        except Exception as error:  # third parties' code, on whatever images there are
            with_policy = f" with aa={self._policy}" if self._policy else ""
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return DataError(f"{self._source.source(place.index)}: its transformation{with_policy} fails ({reason})")

    def _transformed(self, image: Image.Image, place: _Place) -> Tensor:
        if self._seed is None:
            return self._transform(image)
        again = (place.before,) if place.before else ()
        with seeded_generators(_SAMPLE, self._seed, place.epoch, place.index, *again):
            return self._transform(image)


def _collate(samples: list[_Sample | DataError]) -> _Batch | DataError:
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
        good.append(sample)
    labels = torch.tensor([sample.label for sample in good])
    return _Batch(
        torch.stack([sample.image for sample in good]),
        labels,
        [bad for one in good for bad in one.bad],
        [sample.fingerprint for sample in good],
    )


@contextmanager
def many_readers() -> Iterator[None]:
    """Without torch's warning of a loader and of its workers: readers that wait for a disk may outnumber the cores."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


class ImageLoader:
    """Iterates over batches of one epoch; see `create_loader`.

    Attributes:
        transform: of its batches, on the CPU.
        fingerprints: of the decoded images that the latest iteration has given, in its order, where they are asked for.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        samples: Dataset[_Sample | DataError],
        batches: _Batches,
        reading: Reading,
        mixer: Mixer | None,
        transform: BatchTransform,
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.fingerprints: list[bytes] = []
        self._batches = batches
        self._mixer = mixer
        with many_readers():
            self._loader: DataLoader[_Sample | DataError] = DataLoader(
                samples,
                batch_sampler=batches,
                num_workers=reading.workers,
                collate_fn=_collate,
                pin_memory=reading.pin_memory,
                persistent_workers=reading.workers > 0,
                generator=torch.Generator(),  # else the loader takes a seed for its workers from the global generator
            )

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def left_out(self) -> int:
        """How many images an epoch leaves out: other ones each time where it shuffles."""
        return self._batches.left_out

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order and the augmentation of the next iterations; the first epoch is 0."""
        self._batches.epoch = epoch

    def images_of(self, epoch: int, batch_index: int) -> list[int]:
        """The images of a batch, by their index in the data set."""
        places = next(iter(replace(self._batches, epoch=epoch, start=batch_index)))
        return [place.index for place in places]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iter_from(0)

    def iter_from(self, batch_index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterates from batch `batch_index` of the epoch on, without loading the earlier ones.

        Yields:
            Images, float32 [B, C, H, W], and labels: int64 [B], or float32 [B, classes] where training mixes images or
            smooths labels. `LEFT_OUT` labels a blank.

        Raises:
            DataError: see `read`.
        """
        for images, labels in self.read(batch_index):
            yield self.transform(*images), labels

    def read(self, batch_index: int = 0) -> Iterator[Batch]:
        """Iterates like `iter_from`, and leaves to the caller what the batch transform does.

        Yields:
            What a `BatchTransform` takes: images, uint8 [B, C, H, W] (float32 and normalised where random erasing is
            on, whose fill no byte can hold), and the numbers by which they are to be mixed, where they are. Labels, as
            in `iter_from`.

        Raises:
            DataError: An image is bad and the policy is 'fail', none can be read, a label is out of range, or a
                transformation fails.
        """
        self._batches.start = batch_index
        self.fingerprints = []
        epoch = self._batches.epoch
        with many_readers():
            read = iter(self._loader)
        for at, batch in enumerate(read, start=batch_index):
            if isinstance(batch, DataError):
                # A new one: raising a local variable ties error and frame into a cycle, and workers that only the
                # garbage collector reaches take 5 seconds each to stop.
                raise DataError(str(batch))
            self.dataset.note_bad(batch.bad)
            if len(self.dataset.bad_images) == len(self.dataset):
                first = next(iter(self.dataset.bad_images.values()))
                raise DataError(f"none of the {len(self.dataset)} images can be read; the first: {first}")
            self.fingerprints += batch.fingerprints
            yield self._mix(batch.images, batch.labels, epoch, at)

    def _mix(self, images: Tensor, labels: Tensor, epoch: int, batch_index: int) -> Batch:
        if self._mixer is None:
            return (images,), labels
        if not self._mixer.mixes:
            return (images,), self._mixer.smooth(labels)
        place = batch_index * self._batches.sharding.count + self._batches.sharding.index
        with seeded_generators(_MIX, self._batches.seed, epoch, place):
            numbers, soft = self._mixer.draw(labels, *images.shape[2:])
        return (images, numbers), soft


def check_channels(input_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
    """Checks that images, which are grey or in colour, can be made into what a network takes.

    Raises:
        UserError: It takes neither 1 nor 3 channels, or there is not one `mean` and `std` value for each.
    """
    channels = input_size[0]
    if channels not in (1, 3) or len(mean) != channels or len(std) != channels:
        raise UserError(
            f"input_size={tuple(input_size)} with {len(mean)} mean and {len(std)} std values; expected 1 or 3 channels "
            "and one value for each"
        )


def create_loader(
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    balanced: bool = False,
    drop_last: bool = False,
    num_classes: int | None = None,
    sharding: Sharding | None = None,
    reading: Reading | None = None,
) -> ImageLoader:
    """Makes an iterable of batches over a data set.

    A sample's augmentation is drawn from (seed, epoch, index, how often it was there before), the order from (seed,
    epoch), mixing from (seed, epoch, batch): the number of workers changes nothing, and the process's own generators
    are never touched.

    Args:
        dataset: What to load. Its `bad_images` counts the skipped ones, whichever process met them.
        preprocessing: What the network wants of an image. One channel makes the images grey. In training only its size
            and normalisation count.
        batch_size: Images per batch.
        augmentation: What to do to the images to train on: to shuffle, augment and mix them, and to leave out a last
            batch of one, of which no batch norm can tell the variance (unless it is the only batch). A `Recipe` is one
            too. None for validation: the data set in order.
        seed: The run's seed, not negative.
        balanced: Give every class as many images of an epoch to train on, whose length stays; see `balanced_order`.
        drop_last: Leave out the last batch where it is smaller.
        num_classes: Of the labels that are mixed or smoothed: a network may have more than the data; default: theirs.
        sharding: This replica's share of the batches; default: all.
        reading: How images are read; default: in this process, and none may be bad.

    Raises:
        UserError: the normalisation does not fit the channels, or there is not even one batch.
    """
    train, sharding, reading = augmentation is not None, sharding or Sharding(), reading or Reading()
    check_channels(preprocessing.input_size, preprocessing.mean, preprocessing.std)
    labels = dataset.labels() if train and balanced else None
    batches = _Batches(len(dataset), batch_size, train, seed, drop_last, sharding, labels)
    if not len(batches):
        most = len(dataset) // sharding.count
        each = f" for each of {sharding.count} replicas" if sharding.count > 1 else ""
        raise UserError(
            f"batch_size={batch_size}{each} is more than the {len(dataset)} images give; expected at most {most}"
        )
    if augmentation is None:
        transform = evaluation_transform(preprocessing)
    else:
        transform = training_transform(augmentation, preprocessing)
    drawn = augmentation if augmentation and not augmentation.no_aug else None
    samples = _Samples(
        dataset,
        transform,
        preprocessing.input_size,
        reading,
        seed=seed if drawn else None,
        policy=drawn.aa if drawn else None,
    )
    mixes = drawn is not None and (drawn.mixup or drawn.cutmix or drawn.smoothing)
    mixer = Mixer(drawn, num_classes or dataset.num_classes) if drawn and mixes else None
    return ImageLoader(dataset, samples, batches, reading, mixer, BatchTransform(preprocessing))
