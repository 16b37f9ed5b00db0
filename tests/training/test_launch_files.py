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


def slurm(folder: Path, code: int, stopped: bool = False) -> tuple[int, list[str]]:
    """Runs the batch script where `srun` ends with a code; its exit code, and what was called."""
    log = folder / "calls"
    note = 'echo stopped >> "$PETRA_ZOO_STOPPED";' if stopped else ""
    for name, does in {
        "srun": f'echo "srun $* at $MASTER_ADDR:$MASTER_PORT with $OMP_NUM_THREADS" >> {log}; {note} exit {code}',
        "scontrol": f'if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*" >> {log}; fi',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{does}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x[1-2]"}
    env |= {"TMPDIR": str(folder)}
    done = subprocess.run(["bash", FILES / "slurm.sbatch", *RUN], env=env | {"SLURM_CPUS_PER_TASK": "8"}, check=False)
    return done.returncode, log.read_text().splitlines()


def test_slurm_starts_the_run_at_the_first_machine(tmp_path: Path) -> None:
    code, calls = slurm(tmp_path, 0)
    assert code == 0
    assert calls == ["srun --kill-on-bad-exit=1 petra-zoo train synthetic/x epochs=1 at first:20007 with 8"]


def test_slurm_queues_a_run_again_that_was_told_to_stop(tmp_path: Path) -> None:
    code, calls = slurm(tmp_path, 0, stopped=True)
    assert (code, calls[1:]) == (0, ["scontrol requeue 7"])
    (tmp_path / "calls").unlink()
    code, calls = slurm(tmp_path, 0)  # queued again, it runs to its end
    assert (code, calls[1:]) == (0, [])


def test_slurm_does_not_queue_a_failed_run_again(tmp_path: Path) -> None:
    code, calls = slurm(tmp_path, 1)
    assert (code, calls[1:]) == (1, [])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_slurm_queues_again_what_it_has_told_to_stop(tmp_path: Path) -> None:
    """Real processes, under the rule of srun --kill-on-bad-exit=1: one that ends with another code than 0 ends all."""
    srun = tmp_path / "srun"
    srun.write_text(f"#!{sys.executable}\n" + _SRUN)
    (tmp_path / "scontrol").write_text(
        f'#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$*" >> {tmp_path}/calls\n'
    )
    (tmp_path / "petra-zoo").write_text(f'#!/bin/bash\nexec {sys.executable} -m petra_zoo "$@"\n')
    for name in ("srun", "scontrol", "petra-zoo"):
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "SLURM_CPUS_PER_TASK": "1",
    }
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x"}
    run = ["digits/petra_revnet_tiny", "epochs=300", "stages=4", "balance=operations", f"output={tmp_path / 'run'}"]
    done = subprocess.run(["bash", FILES / "slurm.sbatch", *run], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text() == f"requeue {os.getpid()}\n"
    assert list((tmp_path / "run" / "checkpoints").glob("tick-*"))


_SRUN = """
import os, signal, subprocess, sys, time
RANKS = 4
started = [
    subprocess.Popen(sys.argv[2:], env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(RANKS),
                                        "SLURM_LOCALID": str(rank), "RANK": str(rank), "WORLD_SIZE": str(RANKS)})
    for rank in range(RANKS)
]
run = next(word.split("=")[1] for word in sys.argv if word.startswith("output="))
while not os.path.exists(os.path.join(run, "metrics.jsonl")) and all(p.poll() is None for p in started):
    time.sleep(0.2)
for process in started:
    process.send_signal(signal.SIGUSR1)
told = False
while any(process.poll() is None for process in started):
    if not told and any(process.poll() for process in started):
        told = True
        [process.terminate() for process in started if process.poll() is None]
    time.sleep(0.01)
sys.exit(max(code if code >= 0 else 128 - code for code in (process.poll() for process in started)))
"""


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
