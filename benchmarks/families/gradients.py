"""Gradients through reversible chains of timm's blocks against autograd's, in float64.

    python benchmarks/families/gradients.py runs/families

Once per distinct block (class and structure), of the network where that is the least work: a chain's first three
blocks alone, with random weights, on a random input; coupling 1/2, gain 3/2, train mode. Kept is the largest difference
of a gradient over the largest gradient, of the input and all parameters. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from petra_zoo.models.chains import on_meta
from petra_zoo.models.reversible_sequential import ReversibleSequential
from petra_zoo.models.unfilled import build_unfilled

BATCH = 2
MOST_VALUES = 2**28  # of a block's input or its parameters: what is larger is named, not computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    warnings.simplefilter("ignore")
    output = folder / "gradients.json"
    found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    lines = [line for path in folder.glob("chains*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    for block, (_, name, chain) in sorted(
        least_work(list(map(json.loads, lines))).items(), key=lambda item: item[1][0]
    ):
        if block not in found:
            result = checked(name, chain["path"], chain["first"])
            found[block] = {"name": name, "path": chain["path"], **result}
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(block, found[block], file=sys.stderr)


def least_work(records: list[dict]) -> dict[str, tuple[int, str, dict]]:
    """Per distinct block of a chain that is near the identity: about how much it computes, in which network, where."""
    best: dict[str, tuple[int, str, dict]] = {}
    for record in records:
        for chain in record.get("chains", ()):
            if not chain["far"]:
                candidate = (chain["block_parameters"] * math.prod(chain["shape"]), record["name"], chain)
                best[chain["block"]] = min(best.get(chain["block"], candidate), candidate, key=lambda found: found[:2])
    return best


def checked(name: str, path: str, keys: list[str]) -> dict[str, float | str]:
    """How far the gradients are from autograd's."""
    try:
        torch.manual_seed(0)
        model = build_unfilled(lambda: timm.create_model(name), "cpu")
        args, kwargs = _given(model, f"{path}.{keys[0]}".lstrip("."))
        chain = nn.ModuleList(model.get_submodule(f"{path}.{key}".lstrip(".")) for key in keys)
        most = max(args[0].numel(), sum(p.numel() for p in chain.parameters()))
        if most > MOST_VALUES:
            return {"error": f"{most:,} values in an input or in three blocks: more than {MOST_VALUES:,}"}
        for p in chain.parameters():
            p.data = _drawn(p)
        chain.double().train()
        found = [_gradients(chain, memory, *args, **kwargs) for memory in ("reversible", "plain")]
    except Exception as error:  # one block must not end the others
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    largest = max(float(d.abs().max()) for d in found[1])
    return {"difference": max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / largest}


def _given(model: nn.Module, path: str) -> tuple[tuple, dict]:
    """Random values in the place of what a block is given, for two images of the network's size."""
    skeleton = on_meta(model).eval()
    seen: list[tuple[tuple, dict]] = []
    block = skeleton.get_submodule(path)
    block.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        skeleton(torch.empty(BATCH, *model.pretrained_cfg["input_size"], device="meta"))
    args, kwargs = seen[0]
    return tuple(map(_like, args)), {key: _like(value) for key, value in kwargs.items()}


def _like(x: object) -> object:
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point():
        return torch.zeros(x.shape, dtype=x.dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=torch.float64).normal_()


def _drawn(p: Tensor) -> Tensor:
    """Weights that keep a signal's size, and gains, layer scales and tables that are nowhere 0."""
    draws = torch.randn(p.shape)
    return draws / math.sqrt(max(1, p[0].numel())) if p.ndim > 1 else 0.5 + 0.1 * draws


def _gradients(chain: nn.ModuleList, memory: str, x: Tensor, *args: object, **kwargs: object) -> list[Tensor]:
    reversible = ReversibleSequential(chain, coupling=0.5, gain=1.5).train()
    reversible.memory = memory
    chain.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    reversible(x, *args, **kwargs).square().mean().backward()
    return [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in chain.parameters())]


if __name__ == "__main__":
    main()
