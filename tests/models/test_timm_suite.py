"""timm's own model tests, run on our models.

timm ships its tests in the source distribution only, so the one of the *installed* version is fetched with pip, once,
into pytest's cache. The tests run in a process of their own because they narrow timm's registry
(`timm_suite_plugin.py`) and go by timm's pytest settings, not ours. What they load as pretrained weights are ResNets
initialised here, on a loopback Hub, and what torch keeps of files that come by their address.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save

import petra_zoo  # noqa: F401  (importing it registers our models)
from tests.loopback_hub import LoopbackHub

FETCH_SECONDS = 120
RUN_SECONDS = 570
OUTER_SECONDS = FETCH_SECONDS + RUN_SECONDS + 30

SMALL = (
    "petra_revnet_tiny",
    "petra_revvit_micro",
)
# One of each kind, and of each kind of block.
LARGE = (
    "petra_revnet18",
    "petra_revnet18_cifar",
    "petra_revnet18_paper",
    "petra_revnet18_paper_cifar",
    "petra_revnet50",
    "petra_revnet50_cifar",
    "petra_revnet50_paper",
    "petra_revnet50_paper_cifar",
    "petra_revvit_tiny",
)
# They have more of the same blocks.
DEEPER = (
    "petra_revnet34",
    "petra_revnet34_cifar",
    "petra_revnet34_paper",
    "petra_revnet34_paper_cifar",
    "petra_revnet101",
    "petra_revnet101_paper",
    "petra_revnet101_paper_cifar",
    "petra_revnet152",
    "petra_revvit_small",
    "petra_revvit_base",
)
# Of each kind of transformer that the hundreds of names have; timm's own tests of the others are about their sizes.
TRANSFORMERS = (
    "petra_test_vit",
    "petra_test_vit2",
    "petra_test_vit3",
    "petra_test_vit4",
    "petra_vit_tiny_patch16_224",
    "petra_vit_base_patch16_rpn_224",
    "petra_vit_small_patch16_18x2_224",
    "petra_vit_base_patch16_xp_224",
    "petra_vit_tiny_r_s16_p8_224",
    "petra_flexivit_small",
    "petra_deit_tiny_patch16_224",
    "petra_deit_tiny_distilled_patch16_224",
    "petra_deit3_small_patch16_224",
    "petra_eva02_tiny_patch14_224",
    "petra_vit_small_patch16_dinov3",
    "petra_vit_small_patch16_rope_mixed_224",
    "petra_vit_medium_patch16_rope_reg1_gap_256",
    "petra_beit_base_patch16_224",
)

# What must have run for every model, by the names of timm 1.0.31. A test that timm no longer selects is a failure too:
# silence is how a contract gets lost.
EXPECTED = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_forward_torchscript",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}
# Of transformers, which give tokens, in the place of those that look at their features as maps.
OF_TOKENS = {"test_model_default_cfgs_non_std"}
OF_MAPS = {"test_model_default_cfgs", "test_model_forward_features", "test_model_features_pretrained"}
# For every model with weights, too: they adapt the weights of its default tag.
EXPECTED_OF_WEIGHTS = {"test_model_load_pretrained", "test_model_features_pretrained"}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def _fetch(folder: Path) -> Path:
    """Put timm's tests and their settings into `folder` and return their place; skip where that cannot be had."""
    version = importlib.metadata.version("timm")
    home = folder / f"timm-{version}"
    if home.exists():
        return home
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # --no-binary for timm alone: its build back end, which pip asks for metadata, comes as a wheel.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries=1"]
        command += ["--no-deps", "--no-binary=timm", f"--dest={scratch}", f"timm=={version}"]
        try:
            fetched = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"timm {version}'s source distribution did not come within {FETCH_SECONDS} s")
        archives = list(Path(scratch).glob("timm-*.tar.gz"))
        if fetched.returncode or not archives:
            pytest.skip(f"cannot fetch timm {version}'s source distribution: {_last_line(fetched.stderr)}")
        with tarfile.open(archives[0]) as archive:
            # Only the tests: timm's sources next to them would be imported in place of the installed timm.
            wanted = [m for m in archive.getmembers() if m.name.split("/")[1:2] in (["tests"], ["pyproject.toml"])]
            archive.extractall(scratch, members=wanted, filter="data")
        try:
            (Path(scratch) / archives[0].name.removesuffix(".tar.gz")).rename(home)
        except OSError:
            if not home.exists():  # otherwise another run was quicker
                raise
    return home


@cache
def _run(home: Path, models: tuple[str, ...]) -> tuple[list[dict[str, str]], str]:
    """Run timm's tests on `models`; return one record per test and the end of the output."""
    # GITHUB_ACTIONS makes timm drop tests, TORCH_* would choose a device, and PYTEST_ADDOPTS is meant for our own run.
    unwanted = {"GITHUB_ACTIONS", "TORCH_BACKEND", "TORCH_DEVICE", "PYTEST_ADDOPTS"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    with tempfile.TemporaryDirectory() as scratch, LoopbackHub(Path(scratch) / "server") as hub:
        kept = Path(scratch) / "torch" / "hub" / "checkpoints"
        kept.mkdir(parents=True)
        for model in models:
            _serve_weights(hub, kept, model)
        report = Path(scratch) / "report.json"
        environment |= hub.environment(Path(scratch) / "client")
        environment |= {
            "TORCH_HOME": str(Path(scratch) / "torch"),
            "PETRA_ZOO_TIMM_SUITE_MODELS": ",".join(models),
            "PETRA_ZOO_TIMM_SUITE_REPORT": str(report),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            str(home / "pyproject.toml"),
            f"--rootdir={home}",
            "-q",
            "--tb=short",
        ]
        command += ["-p", "timm_suite_plugin", "-p", "no:cacheprovider", "tests/test_models.py"]
        try:
            done = subprocess.run(
                command, cwd=home, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
            )
        except subprocess.TimeoutExpired:
            return [], f"timm's tests of {', '.join(models)} did not end within {RUN_SECONDS} s"
        records = json.loads(report.read_text()) if report.exists() else []
    return records, (done.stdout + done.stderr)[-4000:]


def _serve_weights(hub: LoopbackHub, kept: Path, model: str) -> None:
    """Puts initial weights where the trained ones of the model's default tag are published, or kept: a ResNet's."""
    cfg = timm.get_pretrained_cfg(model)
    if cfg.hf_hub_id:
        network = timm.create_model(cfg.hf_hub_id.removeprefix("timm/").partition(".")[0], num_classes=cfg.num_classes)
        hub.add(cfg.hf_hub_id, {"model.safetensors": save(network.state_dict())})
    elif cfg.url:
        torch.save({"model_state": timm.create_model(model).state_dict()}, kept / Path(cfg.url).name)


def _check(model: str, home: Path, models: tuple[str, ...]) -> None:
    records, output = _run(home, models)
    mine = [record for record in records if record["model"] == model]
    if not mine:
        pytest.fail(f"timm's tests never got to {model}:\n{output}", pytrace=False)
    # A skip counts as a failure, except that timm leaves out a network that takes large images only.
    too_large = [record for record in mine if "Fixed input size model > limit" in record["details"]]
    failed = [record for record in mine if record["outcome"] != "passed" and record not in too_large]
    if failed:
        details = "\n\n".join(f"{record['test']}: {record['outcome']}\n{record['details']}" for record in failed)
        pytest.fail(f"{model}: {len(failed)} of timm's {len(mine)} tests did not pass\n\n{details}", pytrace=False)
    expected = EXPECTED | (EXPECTED_OF_WEIGHTS if timm.get_pretrained_cfg(model).has_weights else set())
    if not model.startswith("petra_revnet"):  # features that are no map: timm tests other things of such a network
        expected = expected - OF_MAPS | OF_TOKENS
    if "distilled" in model:
        expected = expected - {"test_model_forward_fx_torchscript"}
    missing = sorted(expected - {record["test"] for record in mine})
    assert not missing, f"{model}: timm's suite did not select {missing}"


@pytest.fixture(scope="module")
def timm_tests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # pytest's cache survives the run; with `-p no:cacheprovider` there is none, and the tests are fetched every time.
    if request.config.pluginmanager.has_plugin("cacheprovider"):
        return _fetch(request.config.cache.mkdir("timm-suite"))
    return _fetch(tmp_path_factory.mktemp("timm-suite"))


def test_every_registered_model_is_listed() -> None:
    families = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva", "beit")
    twins = {f"petra_{name}" for family in families for name in timm.list_models(module=family)}
    assert twins > set(TRANSFORMERS)
    assert set(timm.list_models("petra_*")) == twins | {*SMALL, *LARGE, *DEEPER, "petra_any"}


@pytest.mark.timeout(OUTER_SECONDS)
@pytest.mark.parametrize("model", SMALL)
def test_small_model(model: str, timm_tests: Path, request: pytest.FixtureRequest) -> None:
    # One process for all small models selected in this session: importing timm costs more than some models do.
    selected = {item.name for item in request.session.items}
    _check(model, timm_tests, tuple(name for name in SMALL if f"test_small_model[{name}]" in selected))


@pytest.mark.slow
@pytest.mark.timeout(OUTER_SECONDS)
@pytest.mark.parametrize("model", LARGE + TRANSFORMERS)
def test_large_model(model: str, timm_tests: Path) -> None:
    _check(model, timm_tests, (model,))


@pytest.mark.deep
@pytest.mark.timeout(OUTER_SECONDS)
@pytest.mark.parametrize("model", DEEPER)
def test_deeper_model(model: str, timm_tests: Path) -> None:
    _check(model, timm_tests, (model,))
