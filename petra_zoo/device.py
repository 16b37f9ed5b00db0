"""Where tensors are computed, and how a GPU does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from petra_zoo.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU where there is one.

    Raises:
        UserError: there is no such device, here or anywhere.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu", *([found.type] if found else [])]
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: there is no such device; expected {' or '.join(known)}") from error
    if device.type not in known:
        kind = "CUDA" if device.type == "cuda" else device.type
        raise UserError(f"device={name}: torch sees no {kind} device here; use device={known[-1]}")
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise UserError(f"device={name}: there are {count} such devices here, from {device.type}:0 on")
    return device


def require_compiler(device: torch.device) -> None:
    """Refuses torch.compile on a CPU where nothing can build its code: it would say so in the first step, at length.

    Raises:
        UserError: there is no C++ compiler.
    """
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # there is no public way to ask; takes seconds to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "torch.compile needs a C++ compiler on a CPU, and found none; install g++, set CXX to another one, or do "
            "without compiling"
        ) from error


@contextmanager
def computing(device: torch.device, *, deterministic: bool = False, tf32: bool = True) -> Iterator[None]:
    """Inside, a GPU computes as fast as it may; outside, torch's settings are as they were. A CPU is left alone.

    Args:
        device: where networks run.
        deterministic: cuDNN takes an algorithm that gives the same bits every time. Else it tries for each new shape
            which is the fastest, and may take another one in another run, or in another process.
        tf32: products of float32 numbers, in convolutions and matrices, round these to ten bits.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = not deterministic, deterministic, tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision(precision)
