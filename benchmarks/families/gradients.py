"""Gradients through reversible chains of timm's blocks against autograd's, in float64.

    python benchmarks/families/gradients.py runs/families

Once per distinct block (class and structure): of the smallest network that has it, a chain's first three blocks as timm
initialises them, with random offsets so that no gain or layer scale is zero; coupling 1/2, gain 3/2, train mode. Kept
is the largest difference of a gradient over the largest gradient, of the input and all parameters. It goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from petra_zoo.models.reversible_sequential import ReversibleSequential

BATCH = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    warnings.simplefilter("ignore")
    output = folder / "gradients.json"
    found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    lines = [line for path in folder.glob("chains*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    for block, (_, name, path) in sorted(smallest(list(map(json.loads, lines))).items(), key=lambda item: item[1]):
        if block not in found:
            found[block] = {"name": name, "path": path, **checked(name, path)}
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(block, found[block], file=sys.stderr)


def smallest(records: list[dict]) -> dict[str, tuple[int, str, str]]:
    """Per distinct block of a chain that is near the identity: parameters and name of the network, and where."""
    best: dict[str, tuple[int, str, str]] = {}
    for record in records:
        for chain in record.get("chains", ()):
            if not chain["far"]:
                candidate = (record["parameters"], record["name"], chain["path"])
                best[chain["block"]] = min(best.get(chain["block"], candidate), candidate)
    return best


def checked(name: str, path: str) -> dict[str, float | str]:
    """How far the gradients are from autograd's."""
    try:
        torch.manual_seed(0)
        model = timm.create_model(name)
        shape = tuple(model.pretrained_cfg["input_size"])
        blocks, x, args, kwargs = _reached(model, path, torch.randn(1, *shape))
        chain = nn.ModuleList(blocks).double().train()
        for p in chain.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.02)
        found = [_gradients(chain, memory, x, args, kwargs) for memory in ("reversible", "plain")]
    except Exception as error:  # one block must not end the others
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    largest = max(float(d.abs().max()) for d in found[1])
    return {"difference": max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / largest}


def _reached(model: nn.Module, path: str, image: Tensor) -> tuple[list[nn.Module], Tensor, tuple, dict]:
    """The first three blocks of a container that keep their shape, and what the first of them is given."""
    container = model.get_submodule(path)
    blocks = list(container.children())
    seen = []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module, args, kwargs)), with_kwargs=True
        )
    with torch.no_grad():
        model.eval()(image)
    for block in blocks:
        block._forward_pre_hooks.clear()
        block._forward_pre_hooks_with_kwargs.clear()
    shapes = [args[0].shape for _, args, _ in seen]
    keeps = [before == behind for before, behind in zip(shapes, [*shapes[1:], shapes[-1]], strict=True)]
    start, count = next((i, n) for n in (3, 2) for i in range(len(seen) - n + 1) if all(keeps[i : i + n]))
    _, (x, *args), kwargs = seen[start]
    x = torch.randn(x.shape[0] * BATCH, *x.shape[1:], dtype=torch.float64)
    return (
        [module for module, _, _ in seen[start : start + count]],
        x,
        tuple(map(_double, args)),
        {k: _double(v) for k, v in kwargs.items()},
    )


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _gradients(chain: nn.ModuleList, memory: str, x: Tensor, args: tuple, kwargs: dict) -> list[Tensor]:
    reversible = ReversibleSequential(chain, coupling=0.5, gain=1.5).train()
    reversible.memory = memory
    chain.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    reversible(x, *args, **kwargs).square().mean().backward()
    return [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in chain.parameters())]


if __name__ == "__main__":
    main()
