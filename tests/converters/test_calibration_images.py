"""What may be given as images to calibrate and to compare on."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from petra_zoo.converters import convert, measure_fidelity, re_estimate
from petra_zoo.converters.calibration import image_batches
from petra_zoo.errors import UserError
from petra_zoo.models import PetraRevNet
from tests.converters.networks import images, source


@pytest.fixture(scope="module")
def network() -> Any:
    return source("test_resnet")


def statistics(model: PetraRevNet) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if "running" in name}


def assert_same_statistics(a: PetraRevNet, b: PetraRevNet) -> None:
    assert [name for name, x in statistics(a).items() if not torch.equal(x, statistics(b)[name])] == []


def test_a_tensor_of_images_calibrates_like_a_batch_of_them(network: Any) -> None:
    x = images(12, 32)
    assert_same_statistics(
        convert(network, coupling=0.5, calibration=x), convert(network, coupling=0.5, calibration=[x])
    )


def test_a_loader_calibrates_by_its_images(network: Any) -> None:
    x, labels = images(12, 32), torch.arange(12)
    loader = DataLoader(TensorDataset(x, labels), batch_size=6)
    assert_same_statistics(
        convert(network, coupling=0.5, calibration=loader), convert(network, coupling=0.5, calibration=x.split(6))
    )


def test_statistics_are_estimated_on_a_tensor_and_on_a_loader() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = images(10, 8)
    assert re_estimate(model, x) == 10
    assert torch.allclose(model[0].running_mean, x.mean((0, 2, 3)), atol=1e-6)
    assert re_estimate(model, DataLoader(TensorDataset(x, torch.arange(10)), batch_size=5)) == 10


def test_networks_are_compared_on_a_tensor(network: Any) -> None:
    model = PetraRevNet.from_resnet(network).eval()
    assert measure_fidelity(network, model, images(6, 32)).images == 6


def test_many_images_are_cut_into_batches_of_about_one_size() -> None:
    assert [len(batch) for batch in image_batches(torch.zeros(129, 3, 4, 4))] == [43, 43, 43]


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (torch.zeros(3, 8, 8), r"a tensor of shape \[3, 8, 8\]"),
        ([torch.zeros(3, 8, 8)], r"a tensor of shape \[3, 8, 8\]"),
        ([{"image": torch.zeros(2, 3, 8, 8)}], "dict"),
        (["cat.jpg"], "str"),
        ([[]], "list"),
    ],
)
def test_what_are_no_images_is_said_in_one_line(wrong: Tensor | Iterable[Any], found: str, network: Any) -> None:
    with pytest.raises(UserError, match=rf"expected images \[B, C, H, W\], or batches of them, but got {found}"):
        convert(network, coupling=0.5, calibration=wrong)


def test_an_empty_tensor_is_no_calibration(network: Any) -> None:
    with pytest.raises(UserError, match="there is not one batch of images to calibrate on"):
        convert(network, calibration=torch.zeros(0, 3, 8, 8))
