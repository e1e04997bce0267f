from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dora import DoRAConfig
from mlx_dora.data.config import DataConfig
from mlx_dora.data.loading import load_datasets
from mlx_dora.errors import DoRAError
from mlx_dora.evaluate.loss import evaluate_loss
from mlx_dora.train import TrainConfig, job
from mlx_dora.train.job import run_job
from tests.cli.training_data import write_data

DORA = DoRAConfig(rank=2, num_layers=1)


@pytest.fixture
def settings(tiny_model_folder: Path, tmp_path: Path) -> dict[str, object]:
    data = write_data(tmp_path / "data", train=8, valid=4, test=6)
    return {
        "model": str(tiny_model_folder),
        "data": str(data),
        "adapter_path": str(tmp_path / "out"),
        "iters": 2,
        "learning_rate": 1e-2,
    }


def test_the_test_evaluates_the_trained_model(
    settings: dict[str, object], tiny_model_folder: Path
) -> None:
    from mlx_dora import load

    train = TrainConfig(**settings, train=True, test=True)  # pyright: ignore[reportArgumentType]
    result = run_job(train, DORA)
    assert result.train is not None and result.test is not None
    model, tokenizer = load(tiny_model_folder, result.train.adapter_path)
    data = load_datasets(DataConfig(data=train.data), tokenizer, ["test"])["test"]
    assert data is not None
    assert result.test.loss == pytest.approx(evaluate_loss(model, data).loss)
    again = run_job(TrainConfig(**settings, test=True), DORA)  # pyright: ignore[reportArgumentType]
    assert again.train is None
    assert again.test == result.test


def test_an_empty_adapter_path_tests_the_plain_model(
    settings: dict[str, object], tiny_model_folder: Path
) -> None:
    from mlx_dora import load

    train = TrainConfig(**{**settings, "adapter_path": "", "test": True})  # pyright: ignore[reportArgumentType]
    result = run_job(train, DORA)
    model, tokenizer = load(tiny_model_folder)
    data = load_datasets(DataConfig(data=train.data), tokenizer, ["test"])["test"]
    assert data is not None and result.test is not None
    assert result.test.loss == pytest.approx(evaluate_loss(model, data).loss)


def test_the_base_is_recorded(settings: dict[str, object]) -> None:
    from mlx_dora import load_adapter

    result = run_job(TrainConfig(**settings), DORA)  # pyright: ignore[reportArgumentType]
    assert result.train is not None
    base = load_adapter(result.train.adapter_path).base
    assert base.model == settings["model"]
    assert (base.fingerprint or "").startswith("sha256:")


def test_bad_settings_are_refused_before_the_model_is_loaded(
    settings: dict[str, object],
) -> None:
    bad = {**settings, "model": "no/such/model", "data": "no/such/data"}
    with pytest.raises(DoRAError, match="unknown beta"):
        run_job(TrainConfig(**bad, optimizer_config={"adam": {"beta": 1}}), DORA)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DoRAError, match="no/such/data does not exist"):
        run_job(TrainConfig(**bad), DORA)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DoRAError, match="model is not given"):
        run_job(TrainConfig(**{**bad, "model": None}), DORA)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("ended", "named"), [([], "another process"), ([1], "process 1")]
)
def test_a_lost_process_is_an_error(
    ended: list[int],
    named: str,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 2

    def lose(*_: object, **__: object) -> None:
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(mx.distributed, "init", Two)
    monkeypatch.setattr(job, "together", lambda _group: nullcontext())
    monkeypatch.setattr(job, "watched_peers", lambda _group: nullcontext(lambda: ended))
    monkeypatch.setattr(job, "finetune", lose)
    with pytest.raises(DoRAError, match=f"^{named} of this training has ended"):
        run_job(TrainConfig(**settings), DORA)  # pyright: ignore[reportArgumentType]
