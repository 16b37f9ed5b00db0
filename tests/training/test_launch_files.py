"""recipes/launch: what starts a run on several machines, as far as it goes without them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from petra_zoo.settings.recipe_files import list_recipes
from tests.cli.test_main import petra_zoo

FILES = Path(__file__).parents[2] / "recipes" / "launch"
RUN = ["synthetic/x", "epochs=1"]
SCRIPTS = sorted([*FILES.glob("*.sh"), *FILES.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run(["shellcheck", "--shell=bash", script], check=True)


def test_they_are_no_recipes() -> None:
    assert not [name for name in list_recipes() if name.startswith("launch/")]


def slurm(folder: Path, code: int) -> tuple[int, list[str]]:
    """Runs the batch script where `srun` ends with a code; its exit code, and what was called."""
    log = folder / "calls"
    for name, does in {
        "srun": f'echo "srun $* at $MASTER_ADDR:$MASTER_PORT with $OMP_NUM_THREADS" >> {log}; exit {code}',
        "scontrol": f'if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*" >> {log}; fi',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x[1-2]"}
    done = subprocess.run(["bash", FILES / "slurm.sbatch", *RUN], env=env | {"SLURM_CPUS_PER_TASK": "8"}, check=False)
    return done.returncode, log.read_text().splitlines()


def test_slurm_starts_the_run_at_the_first_machine(tmp_path: Path) -> None:
    code, calls = slurm(tmp_path, 0)
    assert code == 0
    assert calls == ["srun --kill-on-bad-exit=1 petra-zoo train synthetic/x epochs=1 at first:20007 with 8"]


def test_slurm_queues_a_run_again_that_was_told_to_stop(tmp_path: Path) -> None:
    code, calls = slurm(tmp_path, 75)
    assert (code, calls[1:]) == (0, ["scontrol requeue 7"])


def test_slurm_does_not_queue_a_failed_run_again(tmp_path: Path) -> None:
    code, calls = slurm(tmp_path, 1)
    assert (code, calls[1:]) == (1, [])


def test_kubernetes_starts_the_same_pod_everywhere() -> None:
    job = yaml.safe_load((FILES / "kubernetes.yml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    assert container["name"] == "pytorch", "the operator looks for that name"
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    volumes = {volume["name"] for volume in replicas["Master"]["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


@pytest.mark.parametrize("name", ["kubernetes.yml", "skypilot.yml"])
def test_what_they_run_is_a_recipe(name: str) -> None:
    words = (FILES / name).read_text().split()
    assert [word for word in words if word in list_recipes()] == ["imagenet/petra_revnet50"]


# -- two agents ---------------------------------------------------------------------------------------------------

SETTINGS = ["digits/petra_revnet_tiny", "epochs=1", "stages=4", "balance=operations", "threads=1"]
ENDS = ("petra-x", "petra-y")


@pytest.fixture(params=["loopback", "two namespaces"])
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[tuple[list[str], dict[str, str]]]]:
    """For each of two machines what leads there, and its environment."""
    if request.param == "loopback":
        yield [([], {"HEAD": "127.0.0.1"})] * 2
        return
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    for end in ENDS:
        subprocess.run(["ip", "netns", "add", end], check=True)
    try:
        first, second = ENDS
        subprocess.run(
            ["ip", "-n", first, "link", "add", "px", "type", "veth", "peer", "py", "netns", second], check=True
        )
        for number, (end, device) in enumerate(zip(ENDS, ("px", "py"), strict=True), start=1):
            for command in (
                ["addr", "add", f"10.78.0.{number}/24", "dev", device],
                ["link", "set", device, "up"],
                ["link", "set", "lo", "up"],
            ):
                subprocess.run(["ip", "-n", end, *command], check=True)
        hosts = tmp_path / "hosts"
        hosts.write_text(f"127.0.0.1 localhost\n10.78.0.1 {ENDS[0]}\n10.78.0.2 {ENDS[1]}\n")
        own = f'hostname "$0"; mount --bind {hosts} /etc/hosts; exec "$@"'  # its name, and those of both
        yield [
            (
                ["ip", "netns", "exec", end, "unshare", "--uts", "--mount", "sh", "-c", own, end],
                {"HEAD": "10.78.0.1", "ADDRESS": f"10.78.0.{number}", "GLOO_SOCKET_IFNAME": device},
            )
            for number, (end, device) in enumerate(zip(ENDS, ("px", "py"), strict=True), start=1)
        ]
    finally:
        for end in ENDS:
            subprocess.run(["ip", "netns", "del", end], check=False)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_two_machines_compute_the_bits_of_one_process(
    machines: list[tuple[list[str], dict[str, str]]], tmp_path: Path
) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    common = os.environ | {"PATH": path, "NODES": "2", "PORT": "29541", "RESTARTS": "0", "OMP_NUM_THREADS": "1"}
    script = ["bash", str(FILES / "torchrun.sh"), *SETTINGS, f"output={tmp_path / 'two'}"]
    agents = [
        subprocess.Popen([*way, *script], env=common | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for way, env in machines
    ]
    said = "".join(agent.communicate(timeout=380)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], said
    where = "2 machines" if machines[0][0] else "1 machine"
    assert f"2 processes on {where}, messages by gloo" in said
    one = petra_zoo("train", *SETTINGS, f"output={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
