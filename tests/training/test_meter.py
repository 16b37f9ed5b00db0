"""What has come out of a pipeline is counted without looking at it."""

import pytest
import torch

from petra_zoo.training.meter import Meter


def test_numbers_are_fetched_when_somebody_asks() -> None:
    meter = Meter()
    assert meter.recent() == (None, 0.0)
    for loss, correct, images in ((1.0, 3, 4), (2.0, 1, 2), (0.5, 6, 6)):
        meter.add(torch.tensor(loss), torch.tensor(correct), images)
    assert meter.recent() == (pytest.approx(11 / 12), pytest.approx(100 * 10 / 12))
    meter.add(torch.tensor(3.0), torch.tensor(0), 12)
    assert meter.mean_loss() == pytest.approx(47 / 24)


def test_nothing_is_read_until_then() -> None:
    meter = Meter()
    meter.add(torch.empty((), device="meta"), torch.empty((), device="meta"), 4)
    with pytest.raises(NotImplementedError):
        meter.mean_loss()
