"""Writes docs/hub.md: every command runs as it stands there, against a Hub on loopback, and says what stands there.

python -m tests.hub.write_transcript
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.loopback_hub import LoopbackHub
from tests.transcript import write_page

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"
REPO = "you/petra_revnet_tiny.digits"

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
        replaced = {hub.url: "$HF_ENDPOINT", str(folder / "home"): "$HF_HOME"}
        return write_page(SOURCE, work, hub.environment(folder / "home"), replaced=replaced)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(write(Path(scratch)), encoding="utf-8")
