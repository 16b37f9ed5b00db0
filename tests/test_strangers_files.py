"""Recipes, manifests, configurations, profiles and arrays from strangers: read or refused in a line, nothing written.

What hypothesis thinks of, beside the random ones of the study of faults (`petra_zoo.bench.fuzzing`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petra_zoo.bench.fuzzing import READERS, Reader
from petra_zoo.settings.recipe import Recipe

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SHARES = {"recipe": 0.15, "manifest": 0.4, "config": 0.05, "profile": 0.25, "npz": 0.15}


def contents(name: str, good: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, good ones that were damaged, and any value in the place of one."""
    damaged = st.tuples(st.integers(0, len(good)), st.integers(0, 8), st.binary(max_size=8)).map(
        lambda x: good[: x[0]] + x[2] + good[x[0] + x[1] :]
    )
    found = st.binary(max_size=200) | damaged
    if READERS[name].is_json:
        values: dict[str, Any] = json.loads(good)
        changed = st.dictionaries(st.sampled_from(sorted(values)), JSON, min_size=1, max_size=3)
        found |= changed.map(lambda x: json.dumps(values | x).encode()) | JSON.map(lambda x: json.dumps(x).encode())
    if READERS[name].is_yaml:
        keys = st.sampled_from(sorted(Recipe.model_fields))
        found |= st.dictionaries(keys, JSON, max_size=3).map(
            lambda x: (good.decode() + "".join(f"{key}: {json.dumps(y)}\n" for key, y in x.items())).encode()
        )
    return found


def fuzzed(name: str, folder: Path, count: int) -> None:
    reader: Reader = READERS[name]
    reader.good(folder)
    good = (folder / reader.file).read_bytes()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(contents(name, good))
    def is_read_or_refused(content: bytes) -> None:
        assert reader.fault(folder, content) is None

    is_read_or_refused()


@pytest.mark.parametrize("name", READERS)
def test_a_strangers_file_is_read_or_refused_in_a_line(name: str, tmp_path: Path) -> None:
    fuzzed(name, tmp_path, {"config": 10, "recipe": 20}.get(name, 100))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_strangers_files_are(name: str, tmp_path: Path) -> None:
    fuzzed(name, tmp_path, int(10_000 * SHARES[name]))
