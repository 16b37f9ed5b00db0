"""How a GPU computes: torch's settings, for as long as a run lasts."""

import pytest
import torch

from petra_zoo.device import computing, require_compiler
from petra_zoo.errors import UserError


def settings() -> tuple[bool, bool, bool, str]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, (True, False, True, "high")),
        ({"deterministic": True}, (False, True, True, "high")),
        ({"tf32": False}, (True, False, False, "highest")),
    ],
)
def test_a_gpu_computes_as_asked_and_then_as_before(
    asked: dict[str, bool], found: tuple[bool, bool, bool, str]
) -> None:
    before = settings()
    with computing(torch.device("cuda"), **asked):
        assert settings() == found
    assert settings() == before


def test_a_cpu_is_left_alone() -> None:
    before = settings()
    with computing(torch.device("cpu"), deterministic=True, tf32=False):
        assert settings() == before


def test_compiling_without_a_compiler_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nowhere/g++"))
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler on a CPU, and found none; install g\+\+"):
        require_compiler(torch.device("cpu"))
    require_compiler(torch.device("cuda"))
