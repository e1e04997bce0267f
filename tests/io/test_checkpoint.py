import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora.errors import DoRAError
from mlx_dora.io import checkpoint
from mlx_dora.io.checkpoint import Checkpoint, ShardWriter


def write_shards(folder: Path, count: int = 4) -> dict[str, mx.array]:
    tensors = {f"t{i}": mx.full((10,), float(i)) for i in range(count)}
    with ShardWriter(folder, max_shard_bytes=80) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tensors


def test_shards_and_index_come_back(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 160
    found = Checkpoint(tmp_path)
    assert found.names == sorted(tensors)
    for name, tensor in tensors.items():
        assert mx.array_equal(found.tensor(name), tensor)
        assert mx.array_equal(found.tensor(name), tensor)  # and once more
        assert found.info(name).shape == (10,)


def test_one_shard_has_no_number(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("a", mx.ones(3))
    assert (tmp_path / "model.safetensors").exists()
    assert Checkpoint(tmp_path).names == ["a"]


def test_tensor_over_the_limit_has_its_own_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_shard_bytes=40) as writer:
        for name, size in (("a", 3), ("big", 100), ("b", 3)):
            writer.add(name, mx.ones(size))
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_nothing_is_finalised_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(OSError), ShardWriter(tmp_path, max_shard_bytes=40) as writer:
        writer.add("a", mx.ones(10))
        writer.add("b", mx.ones(10))
        raise OSError
    assert list(tmp_path.iterdir()) == []


def test_swallowed_failure_is_not_finalised_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    with (
        pytest.raises(RuntimeError, match="swallowed"),
        ShardWriter(tmp_path, max_shard_bytes=40) as writer,
    ):
        writer.add("a", mx.ones(10))
        monkeypatch.setattr(checkpoint, "TensorStream", full)
        with pytest.raises(OSError):
            writer.add("b", mx.ones(10))
    assert list(tmp_path.iterdir()) == []


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("a", mx.ones(3))
        with pytest.raises(DoRAError, match="'a'"):
            writer.add("a", mx.ones(3))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x", "a/b", "..", "", "a\\b"])
def test_climbing_shard_names_are_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.ones(2)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(DoRAError, match="not a plain name"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"weight_map": {"a": 3}}', "no weight_map"),
        ('{"weight_map": {}}', "lists no tensors"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not in the folder"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DoRAError, match=reason):
        Checkpoint(tmp_path)


def test_tensor_missing_from_its_shard_is_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.ones(2)})
    index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DoRAError, match="lacks b"):
        Checkpoint(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        mx.save_safetensors(str(tmp_path / name), {"a": mx.ones(2)})
    with pytest.raises(DoRAError, match="'a' is in"):
        Checkpoint(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoRAError, match="no model"):
        Checkpoint(tmp_path)
    with pytest.raises(DoRAError, match="is not a model folder"):
        Checkpoint(tmp_path / "none")


def test_unknown_tensor_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(DoRAError, match="has no tensor 'x'"):
        Checkpoint(tmp_path).tensor("x")


def test_bfloat16_is_read(tmp_path: Path) -> None:
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {"a": mx.ones(2, dtype=mx.bfloat16)}
    )
    assert Checkpoint(tmp_path).tensor("a").dtype == mx.bfloat16
