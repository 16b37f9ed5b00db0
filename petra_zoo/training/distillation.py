"""Distillation from a teacher, such as the network that a reversible one was converted from.

Weights, temperature and loss are timm's `LogitDistillationTask`. timm runs the student inside that task; here the
student is a pipeline, whose head sits in another stage than the images. So the teacher runs where the images are fed,
its logits travel to the last stage in one tensor with the labels, and the task gets both as if it had computed them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher, LogitDistillationTask
from torch import Tensor, nn

from petra_zoo.checkpoints.load import load_model
from petra_zoo.data.image_dataset import ImageDataset
from petra_zoo.data.labels import all_named, classes_of
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.models.classifier import Classifier
from petra_zoo.petra.part import Loss
from petra_zoo.settings.recipe import Recipe
from petra_zoo.training.losses import find_loss


class Distillation:
    """Makes labels that carry the teacher's logits, and the loss that reads them.

    Args:
        teacher: gives logits [B, classes]; put into eval mode and frozen. None where no images are fed: a rank without
            the stem needs the loss alone.
        num_classes: the student's.
        preprocessing: the student's: what its images are normalised with; the teacher gets them with its own (its
            `pretrained_cfg`).
        temperature: of both softmaxes.
        task_loss_weight: of the loss with the labels.
        distill_loss_weight: of the divergence from the teacher; None, with a task weight: 1 - `task_loss_weight`. Both
            None: 1 and 1, as in timm.
        classes: the teacher's class for each of the student's, where they are numbered in another way.
        loss: with the labels, which are probabilities [B, classes] here.

    Raises:
        UserError: the teacher tells other classes apart, or takes other channels.

    Example:
        >>> distillation = Distillation(teacher, num_classes=10, preprocessing=preprocessing, temperature=4.0)
        >>> pipeline = Pipeline(model, 4, loss=distillation.loss)
        >>> pipeline.step(images, distillation.labels(images, labels))
    """

    def __init__(
        self,
        teacher: Classifier | None,
        *,
        num_classes: int,
        preprocessing: Preprocessing,
        temperature: float = 4.0,
        task_loss_weight: float | None = None,
        distill_loss_weight: float | None = None,
        classes: Sequence[int] | None = None,
        loss: Loss = F.cross_entropy,
    ) -> None:
        self.num_classes = num_classes
        self.classes: Tensor | None = None
        self.teacher: DistillationTeacher | None = None
        if teacher is not None:
            self._take(teacher, preprocessing, classes)
        self.task = LogitDistillationTask(
            _Columns(0, num_classes),
            _Columns(num_classes, 2 * num_classes),
            criterion=_Criterion(loss),
            temperature=temperature,
            task_loss_weight=task_loss_weight,
            distill_loss_weight=distill_loss_weight,
            device=torch.device("cpu"),  # where its buffers are, which take no part
            verbose=False,
        )

    def _take(self, teacher: Classifier, preprocessing: Preprocessing, classes: Sequence[int] | None) -> None:
        if classes is None and teacher.num_classes != self.num_classes:
            raise UserError(
                f"the teacher tells {teacher.num_classes} classes apart, the network {self.num_classes}: distil from "
                "the network it was converted from, or fine-tune that one on this data first"
            )
        channels = len(preprocessing.mean)
        if teacher.in_chans != channels:
            raise UserError(f"the teacher takes images of {teacher.in_chans} channels, the network of {channels}")
        device = next(teacher.parameters()).device
        self.teacher = DistillationTeacher(teacher.requires_grad_(False), device=device).eval()
        self.classes = None if classes is None else torch.tensor(classes, device=device)
        statistics = (preprocessing.mean, preprocessing.std)
        self.mean, self.std = (torch.tensor(x, device=device).view(1, -1, 1, 1) for x in statistics)

    @torch.no_grad()
    def labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """[B, 2 classes]: labels as probabilities, then the teacher's logits.

        Args:
            images: [B, C, H, W], normalised for the student.
            labels: [B] class indices, or [B, classes] probabilities.
        """
        soft = labels if labels.ndim == 2 else F.one_hot(labels, self.num_classes)
        assert self.teacher is not None
        logits = self.teacher(self.teacher.normalize_input(images, self.mean, self.std))
        if self.classes is not None:
            logits = logits[:, self.classes]
        return torch.cat((soft.to(logits.dtype), logits), dim=1)

    def own(self, labels: Tensor) -> Tensor:
        """The labels as probabilities [B, classes], from what `labels` gave."""
        return labels[:, : self.num_classes]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss (0-d) of the student's logits [B, classes]; `labels` as the method of that name gives them."""
        probabilities, of_teacher = labels.split(self.num_classes, dim=1)
        return self.task(torch.cat((logits, of_teacher.to(logits.dtype)), dim=1), probabilities.to(logits.dtype))[
            "loss"
        ]


def load_teacher(recipe: Recipe, device: torch.device) -> Classifier | None:
    """The recipe's teacher with its trained weights; None where it names none.

    Raises:
        UserError: it cannot be loaded.
    """
    return None if recipe.kd_model_name is None else load_model(recipe.kd_model_name, device)


def build_distillation(
    recipe: Recipe,
    teacher: Classifier | None,
    num_classes: int,
    preprocessing: Preprocessing,
    data: ImageDataset,
    loss: Loss | None = None,
) -> Distillation | None:
    """The recipe's distillation; None where it names no teacher.

    Args:
        recipe: the settings.
        teacher: where the images are fed; None on the other ranks.
        num_classes: the student's.
        preprocessing: likewise.
        data: what the student is trained on; its classes are looked up among the teacher's by name.
        loss: with the labels; None: the recipe's, without weights.

    Raises:
        UserError: the teacher does not fit the student.
    """
    if recipe.kd_model_name is None:
        return None
    classes = None
    if teacher is not None:
        names = all_named(data.class_names, num_classes)
        classes = classes_of(
            teacher, f"the teacher {recipe.kd_model_name}", names, data.named, f"data set {recipe.dataset}"
        )
    return Distillation(
        teacher,
        num_classes=num_classes,
        preprocessing=preprocessing,
        temperature=recipe.kd_temperature,
        task_loss_weight=recipe.task_loss_weight,
        distill_loss_weight=recipe.distill_loss_weight,
        classes=classes,
        loss=loss or find_loss(recipe.loss),
    )


class _Criterion(nn.Module):
    """A loss as timm's task wants it."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(logits, labels)


class _Columns(nn.Module):
    """Stands in for a network in timm's task: its logits are columns of what it is given."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__()
        self.start, self.end = start, end
        self.pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}  # the same for both: nothing is normalised
        self.num_classes, self.in_chans = end - start, 1

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.end]
