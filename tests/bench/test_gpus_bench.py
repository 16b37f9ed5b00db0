"""The script for several GPUs, as far as it goes on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpus.py"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(400)
def test_every_section_gives_its_result(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    subprocess.run([sys.executable, SCRIPT, "--quick", "--processes", "2", "--json", path], check=True, timeout=380)
    found = json.loads(path.read_text())
    assert found["equal: petra"]["largest_relative_difference"] == 0
    assert found["facts"]["device"] == "cpu"
    speeds = [value for key, value in found.items() if key.startswith("speed")]
    assert len(speeds) == 5
    assert all(one["images_per_second"] > 0 for one in speeds), found
    assert found["busy"] > 0
    frozen = found["frozen: petra"]
    assert frozen["exit_code"] == 1
    assert f"nothing within {frozen['link_timeout']} s" in frozen["said"][0]
