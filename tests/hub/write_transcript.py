"""Writes docs/hub.md: every command runs as it stands there, against a Hub on loopback, and says what stands there.

python -m tests.hub.write_transcript
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.loopback_hub import LoopbackHub

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
REPO = "you/petra_revnet_tiny.digits"

# Prose, and commands to run: those indented by four spaces, a line that goes on indented by eight.
SOURCE = f"""\
# The Hub

From a run to a repository that others load with one line. Everything below was run as it stands, by
`python -m tests.hub.write_transcript`, against a server on this machine that speaks the Hub's protocol; `$HF_ENDPOINT`
stands for its address, and times are left out. Against huggingface.co log in first: `hf auth login`, or `HF_TOKEN`.

## Publish
Train something (a few epochs here; the recipe's own 20 give more):

    petra-zoo train digits/petra_revnet_tiny epochs=6 output=runs/digits

One command makes the repository, sends everything in one commit, downloads it again and compares hashes and logits.
`--dry-run` shows files and card and sends nothing, `--private`, `--create-pr` and `--revision BRANCH` do what they say.

    petra-zoo push runs/digits {REPO}

The card holds what the run directory knows: method, stages, seed, data, versions, machine, time and memory, and the
accuracy that was measured of these very weights. A README.md of your own in the directory is taken instead. A
checkpoint without results gets them by `petra-zoo evaluate DIR --dataset NAME --json > DIR/evaluation.json`. Where
nothing has changed there is no commit:

    petra-zoo push runs/digits {REPO}

## Load
By `hf-hub:`, with a revision behind `@` if it is to stay the same, or by a network's name; an overlay puts a repository
in the place of the weights that the name stands for (`file` are those that come with the package):

    python - <<'EOF'
        import petra_zoo
        import timm
        import torch
        model = timm.create_model("hf-hub:{REPO}@main", pretrained=True).eval()
        overlay = {{"hf_hub_id": "{REPO}", "file": None}}
        by_name = timm.create_model("petra_revnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        images = torch.randn(2, *model.pretrained_cfg["input_size"])
        print(model.pretrained_cfg["label_names"], torch.equal(model(images), by_name(images)))
        EOF

`petra-zoo list --pretrained` names the weights that a name alone loads, `petra-zoo info NAME.TAG` says where they come
from:

    petra-zoo info petra_revnet_tiny.digits
    petra-zoo evaluate petra_revnet_tiny.digits --dataset digits

## Fine-tune
A published checkpoint is where a recipe starts:

    petra-zoo train finetune/digits pretrained=hf-hub:{REPO} epochs=2 output=runs/finetuned

## Evaluate
Several models at once; `--compare` tells whether two differ by more than chance, `--results-file` writes timm's CSV and
the peak memory, `--retry` halves the batch where memory runs out.

    petra-zoo evaluate hf-hub:{REPO} runs/finetuned --dataset digits --compare

## Without a network
What was loaded once is in the cache (`HF_HUB_CACHE`, or `--cache-dir`):

    HF_HUB_OFFLINE=1 petra-zoo evaluate hf-hub:{REPO} --dataset digits

## What can go wrong
One line says which of network, name, permission or file is at fault, and what to do:

    petra-zoo evaluate hf-hub:you/petra_revnet_tiny --dataset digits
    HF_HUB_OFFLINE=1 petra-zoo evaluate hf-hub:you/petra_revnet_tiny --dataset digits
    HF_TOKEN=hf_expired petra-zoo push runs/digits {REPO}
"""


def write(folder: Path) -> str:
    """The page, all commands run in a folder of their own."""
    with LoopbackHub(folder / "server") as hub:
        work = folder / "work"
        work.mkdir()
        bin_folder = str(Path(sys.executable).parent)
        environment = os.environ | hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
        lines: list[str] = []
        for block in re.split(r"(?m)((?:^    .*\n)+)", SOURCE):
            if not block.startswith("    "):
                lines += block.splitlines()
                continue
            lines.append("```console")
            for command in _commands(block):
                done = subprocess.run(
                    ["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True, timeout=600
                )
                errors = [line for line in done.stderr.splitlines() if line.startswith("petra-zoo: ")]
                if done.returncode not in (0, 2) or (done.returncode == 2 and not errors):
                    raise RuntimeError(f"{command}\n{done.stdout}\n{done.stderr}")
                said = "\n".join([f"$ {command}", *done.stdout.splitlines(), *errors])
                lines += _told(said.replace(hub.url, "$HF_ENDPOINT").replace(str(folder / "home"), "$HF_HOME"))
            lines.append("```")
    return "\n".join(lines) + "\n"


def masked(page: str) -> list[str]:
    """A page without what differs from run to run: numbers, hashes, and which classes are hardest."""
    kept = [line for line in page.splitlines() if not line.startswith("  worst")]
    return [re.sub(r"\s*\d+(?:[.,]\d+)*", " #", re.sub(r"\b[0-9a-f]{40}\b", "HASH", line)) for line in kept]


def _told(output: str) -> list[str]:
    """Lines without times: this is no place for speed."""
    return [re.sub(r"\s+[\d.]+ s$", "", line) for line in output.splitlines() if " img/s " not in line]


def _commands(block: str) -> list[str]:
    lines = [line[4:] for line in block.splitlines()]
    commands: list[str] = []
    for line in lines:
        if line.startswith("    "):
            commands[-1] += "\n" + line[4:]
        else:
            commands.append(line)
    return commands


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(write(Path(scratch)), encoding="utf-8")
