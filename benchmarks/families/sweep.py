"""Which of timm's networks have chains that can be made reversible: every name, on the meta device.

    python benchmarks/families/sweep.py runs/families/chains.jsonl [--part 0 --parts 2]

A line of JSON per name; names that the files beside the output have are left out, so it can be stopped and goes on.
How far blocks are from the identity is left out too: that says something of trained weights only, and
`petra-zoo convert` measures it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import timm
from torch import Tensor, nn

from petra_zoo.models.chains import Chain, find_chains
from petra_zoo.models.unfilled import build_unfilled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    done = {json.loads(line)["name"] for line in _lines(options.output.parent)}
    names = _names()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("a", encoding="utf-8") as file:
        for name in names[options.part :: options.parts]:
            if name not in done:
                file.write(json.dumps(examined(name)) + "\n")
                file.flush()


def _names() -> list[str]:
    """Every name of timm's, one of each family, then the second of each, and so on."""
    families = [sorted(timm.list_models(module=module)) for module in timm.list_modules()]
    names = [name for turn in zip_longest(*families) for name in turn if name and not name.startswith("petra_")]
    return list(dict.fromkeys(names))


def _lines(folder: Path) -> Iterator[str]:
    for path in folder.glob("chains*.jsonl"):
        yield from path.read_text(encoding="utf-8").splitlines()


def examined(name: str) -> dict[str, object]:
    """What is known of a network without its weights."""
    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    record: dict[str, object] = {"name": name, "family": family, "twin": timm.is_model(f"petra_{name}")}
    try:
        model = build_unfilled(lambda: timm.create_model(name))
        elements = _count_elements(model)
        chains = find_chains(model, shortest=2)
    except Exception as error:  # a name of 1,371 must not end the others
        return {**record, "error": f"{type(error).__name__}: {error}"[:200]}
    blocks = [f"{block}." for chain in chains if not chain.obstacle for block in chain.blocks]
    sizes = {path: p.numel() for path, p in model.named_parameters()}
    return {
        **record,
        "class": type(model).__name__,
        "parameters": sum(sizes.values()),
        "input_size": list(model.pretrained_cfg["input_size"]),
        "parameters_covered": _share(sizes, blocks),
        "activations_covered": _share(elements, blocks),
        "chains": [_described(model, chain) for chain in chains],
    }


def _count_elements(model: nn.Module) -> dict[str, int]:
    """Elements that each layer gives, once the model has run: hooks go along with copies of a model."""
    elements: dict[str, int] = {}

    def note(path: str, output: Tensor) -> None:
        if isinstance(output, Tensor):
            elements[path] = elements.get(path, 0) + output.numel()

    for path, module in model.named_modules():
        if next(module.children(), None) is None:
            module.register_forward_hook(lambda module, args, output, path=path: note(path, output))
    return elements


def _share(sizes: dict[str, int], blocks: list[str]) -> float:
    inside = sum(size for path, size in sizes.items() if path.startswith(tuple(blocks)))
    return round(inside / max(1, sum(sizes.values())), 4)


def _described(model: nn.Module, chain: Chain) -> dict[str, object]:
    longest = max(chain.runs, key=len)
    block = model.get_submodule(f"{chain.path}.{longest[1]}".lstrip("."))  # like those behind it
    structure = f"{type(block).__module__}.{type(block).__name__} {re.sub(r'[0-9.e-]+', '#', repr(block))}"
    return {
        "path": chain.path,
        "runs": [len(run) for run in chain.runs],
        "opening": len(chain.opening),
        "kinds": list(chain.kinds),
        "shape": list(chain.shape),
        "first": list(longest[:3]),
        "block_parameters": sum(p.numel() for p in block.parameters()),
        "block": f"{type(block).__name__}-{hashlib.sha256(structure.encode()).hexdigest()[:8]}",
        "one_by_one": chain.one_by_one,
        "far": bool(chain.obstacle) and not chain.one_by_one,
    }


if __name__ == "__main__":
    main()
