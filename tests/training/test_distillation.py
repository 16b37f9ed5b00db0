"""Distillation: timm's loss, with a teacher that runs where the images are."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from torch import nn

from petra_zoo.converters import convert
from petra_zoo.data.preprocessing import Preprocessing
from petra_zoo.errors import UserError
from petra_zoo.petra import Layout, Optimization, Pipeline
from petra_zoo.training.distillation import Distillation
from tests.converters.networks import images
from tests.training.test_coupling_schedule import small

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def distillation(teacher: nn.Module, **kwargs: float) -> Distillation:
    return Distillation(teacher, num_classes=5, preprocessing=Preprocessing((3, 32, 32), MEAN, STD), **kwargs)


@pytest.mark.parametrize("weights", [{}, {"task_loss_weight": 0.3}, {"distill_loss_weight": 2.0}])
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_is_timms(soft: bool, weights: dict[str, float]) -> None:
    teacher, student = small(), small("seresnet18")
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": MEAN, "std": STD}
    labels = torch.randn(4, 5).softmax(1) if soft else torch.tensor([0, 3, 1, 4])
    task = LogitDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), temperature=3.0, verbose=False, **weights
    )
    student.eval()
    expected = task(images(), labels)["loss"]
    ours = distillation(teacher, temperature=3.0, **weights)
    found = ours.loss(student(images()), ours.labels(images(), labels))
    assert torch.allclose(found, expected, rtol=1e-5)
    assert float(found.detach()) > 0.0


def test_without_a_divergence_the_loss_is_the_cross_entropy() -> None:
    teacher = small()
    ours = distillation(teacher, distill_loss_weight=0.0)
    labels = torch.tensor([0, 3, 1, 4])
    logits = torch.randn(4, 5)
    assert torch.allclose(ours.loss(logits, ours.labels(images(), labels)), F.cross_entropy(logits, labels))


def test_only_the_student_gets_gradients() -> None:
    teacher = small().train()
    ours = distillation(teacher)
    logits = torch.randn(4, 5, requires_grad=True)
    ours.loss(logits, ours.labels(images(), torch.tensor([0, 3, 1, 4]))).backward()
    assert logits.grad is not None
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_a_pipeline_distils_a_converted_network_from_its_source() -> None:
    network = small()
    with torch.no_grad():
        network.fc.weight.mul_(20.0)  # clear predictions
    model = convert(network, coupling=1.0).train()
    ours = distillation(network, temperature=1.0, task_loss_weight=0.0)
    ours.mean, ours.std = ours.teacher.mean_kd, ours.teacher.std_kd
    pipeline = Pipeline(
        model,
        Layout.of(model, 3, input_size=(3, 32, 32)),
        loss=ours.loss,
        optimization=Optimization(lambda named: torch.optim.SGD([p for _, p in named], 0.01, momentum=0.9)),
    )
    losses = []
    for step in range(30):
        batch = images(16, 32, seed=step % 5)
        output = pipeline.step(batch, ours.labels(batch, torch.zeros(16, dtype=torch.int64)))
        losses += [float(output.loss)] if output.loss is not None else []
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_teacher_of_other_classes_is_refused() -> None:
    with pytest.raises(UserError, match="the teacher tells 7 classes apart, the network 5"):
        distillation(timm.create_model("resnet10t", num_classes=7))
