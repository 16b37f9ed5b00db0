"""Numbers in sentences."""

import pytest

from petra_zoo.wording import counted


@pytest.mark.parametrize("said", ["1 epoch", "0 epochs", "2 epochs", "1 micro-batch", "3 micro-batches", "2 classes"])
def test_one_is_not_many(said: str) -> None:
    number, noun = said.split()
    one = {"epochs": "epoch", "micro-batches": "micro-batch", "classes": "class"}
    assert counted(int(number), one.get(noun, noun)) == said
