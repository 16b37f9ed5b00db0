"""States as safetensors files: everything comes back, and nothing but a state does."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from petra_zoo.checkpoints.packing import TREE, CheckpointError, from_safetensors, to_safetensors


def back(state: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "x.safetensors").write_bytes(to_safetensors(state))
    return from_safetensors(tmp_path / "x.safetensors")


def test_plain_values_come_back_as_what_they_were(tmp_path: Path) -> None:
    state = {"a": [1, 2.5, "x", None, True], "b": {0: (1, 2), 7: {}}, "c.d": -0.0, "e": 1e22, "f": math.inf, "g": 0.1}
    found = back(state, tmp_path)
    assert found == state
    assert isinstance(found["b"][0], tuple)
    assert math.copysign(1, found["c.d"]) == -1
    assert math.isnan(back({"x": math.nan}, tmp_path)["x"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back_in_type_shape_and_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 4) * 9).to(dtype)
    state = {"x": x, "scalar": x[0, 0].clone(), "none": x[:0]}
    found = back(state, tmp_path)
    for name, tensor in state.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3, 2).permute(2, 0, 1),
        torch.randn(3, 5).t(),
        torch.randn(1, 5).as_strided((1, 5), (77, 1)),
        torch.randn(2, 3, 0, 5),
    ],
    ids=["channels_last", "one channel", "permuted", "transposed", "a stride that means nothing", "empty"],
)
def test_the_order_in_memory_comes_back(tmp_path: Path, x: torch.Tensor) -> None:
    found = back({"x": x}, tmp_path)["x"]
    assert torch.equal(found, x)
    assert found.stride() == torch.empty_like(x).stride()


def test_a_part_of_a_larger_tensor_is_saved_without_the_rest(tmp_path: Path) -> None:
    x = torch.randn(1000, 4)
    assert len(to_safetensors({"x": x[10:20, ::2], "again": x[10:20, ::2]})) < 1000
    assert torch.equal(back({"x": x[10:20, ::2]}, tmp_path)["x"], x[10:20, ::2])


def test_what_is_saved_is_a_copy(tmp_path: Path) -> None:
    x = torch.ones(4)
    content = to_safetensors({"x": x})
    x.zero_()
    (tmp_path / "x").write_bytes(content)
    assert torch.equal(from_safetensors(tmp_path / "x")["x"], torch.ones(4))


def test_equal_states_give_equal_bytes() -> None:
    x = torch.arange(6.0).view(2, 3)
    assert to_safetensors({"x": x, "y": [x]}) == to_safetensors({"x": x.clone(), "y": [x.clone()]})


def test_names_with_dots_do_not_meet(tmp_path: Path) -> None:
    found = back({"a.b": {"c": torch.zeros(1)}, "a": {"b.c": torch.ones(1)}}, tmp_path)
    assert (float(found["a.b"]["c"]), float(found["a"]["b.c"])) == (0.0, 1.0)


def test_what_is_no_plain_value_is_refused_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"a\.b\.0 is a set: a state holds tensors and plain values"):
        to_safetensors({"a": {"b": [{1, 2}]}})


@pytest.mark.parametrize(
    "tree",
    [
        {"dict": [["x", {"tensor": "x"}], ["y", {"tensor": "x"}]]},  # one tensor many times: any amount of memory
        {"dict": [["x", {"tensor": "x", "stride": [2**60, 1]}]]},
        {"dict": [["x", {"tensor": "x", "stride": [-4, 1]}]]},
        {"dict": [["x", {"tensor": "x", "stride": [1]}]]},
        {"dict": [["x", {"tensor": "elsewhere"}]]},
        {"dict": [[["x"], 1]]},
        {"dict": [["x"]]},
        {"float": "x"},
        {"import": "os"},
        {},
        [],
        7,
    ],
    ids=str,
)
def test_a_strangers_tree_is_refused_in_one_line(tmp_path: Path, tree: Any) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"x": torch.ones(3, 4)}, {TREE: json.dumps(tree)}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds no state: .+") as caught:
        from_safetensors(path)
    assert "\n" not in str(caught.value)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"x": torch.ones(1)}, {TREE: "[" * 100_000 + "]" * 100_000}))
    with pytest.raises(CheckpointError, match="holds no state"):
        from_safetensors(path)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"its header claims 1,099,511,627,776 bytes"):
        from_safetensors(tmp_path / "x")
