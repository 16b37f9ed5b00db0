"""Networks whose processes build their own stages alone: the bits of one process, and more than one could hold."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from /proc"),
]

# 340.8 M parameters: weights, the sums of their gradients and a micro-batch's take 1.36 GB each.
NETWORK = ["model=petra_vit_base_patch16_224", "model_kwargs={depth: 48}", "img_size=32", "split=[13,12,12,13]"]
TASK = ["dataset=synthetic:10x32x16", "batch_size=4", "accumulation_steps=1", "epochs=1", "warmup_epochs=0"]
RUN = ["workers=0", "opt=momentum", "momentum=0", "stages=4", "checkpoint_every=null"]
COMMAND = [sys.executable, "-m", "petra_zoo", "train", "shapes/petra_revvit_micro", *NETWORK, *TASK, *RUN]
WEIGHTS = 1_363_000_000  # bytes
THREADS = 200 * 2**20  # stacks and heaps of gloo's and torch's threads, which a rank has beside what it imports
# Large tensors go back to the system when they are freed, and leave no holes.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}


def imported() -> int:
    """Bytes of data that a process has once everything is imported."""
    show = "import petra_zoo.training, torch.distributed.run; print(open('/proc/self/status').read())"
    said = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    (line,) = [line for line in said.stdout.splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


def test_a_network_larger_than_one_process_trains_on_four(tmp_path: Path) -> None:
    limit = imported() + THREADS + WEIGHTS

    def train(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=500,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )

    alone = train(f"output={tmp_path / 'alone'}")
    assert alone.returncode != 0
    assert "out of memory" in alone.stderr
    four = train(f"output={tmp_path / 'four'}", "--nproc", "4")
    assert four.returncode == 0, four.stderr
    assert (tmp_path / "four" / "model.safetensors").stat().st_size > WEIGHTS
    assert not list((tmp_path / "four").glob(".*ing-*"))


CIFAR = [
    "model=petra_revnet18_cifar",
    "img_size=16",
    "dataset=synthetic:10x32x64",
    "batch_size=16",
    "opt=sgd",
    "lr=0.01",
]
AVERAGED = ["update_size=null", "max_delay=null", "balance=operations", "model_ema=true", "model_ema_decay=0.9"]


def test_what_processes_build_in_parts_trains_to_the_bits_of_one(tmp_path: Path) -> None:
    """From drawn weights, and on from saved ones, with tensors that are large enough to be put off."""
    command = [*COMMAND[:4], "shapes/petra_revnet_tiny", *CIFAR, *AVERAGED, *TASK[2:], *RUN[:1], "stages=4"]
    for start in (["pretrained=false"], [f"pretrained={tmp_path / '1'}"]):
        for processes in ("1", "2"):
            name = f"{processes}{'' if start[0] == 'pretrained=false' else ' again'}"
            done = subprocess.run([*command, *start, f"output={tmp_path / name}", "--nproc", processes],
                                  capture_output=True, text=True, env=ENVIRONMENT, timeout=200)  # fmt: skip
            assert done.returncode == 0, done.stderr
    saved = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/model.safetensors")}
    assert saved["1"] == saved["2"] != saved["1 again"] == saved["2 again"]
