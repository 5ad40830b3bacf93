from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import torch

import optuna_greedyhg as ghg
from optuna_greedyhg.tasks import DataError, FashionCleaning, make_objective, make_task
from optuna_greedyhg.tasks.base import Settings
from optuna_greedyhg.tasks.fashion import make_conv_net
from optuna_greedyhg.tasks.idx import read_idx, read_images_and_labels
from tests.tasks.idx import write_folder, write_idx


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_what_was_written(tmp_path: Path, suffix: str) -> None:
    array = torch.arange(2 * 3 * 5).reshape(2, 3, 5) + 200
    write_idx(tmp_path / f"x{suffix}", array)
    assert torch.equal(read_idx(tmp_path / f"x{suffix}"), array.to(torch.uint8))


@pytest.mark.parametrize("prefix", ["", "mnist-"])
def test_finds_the_files_of_a_folder(tmp_path: Path, prefix: str) -> None:
    write_folder(tmp_path, 20, 10, prefix=prefix)
    images, labels = read_images_and_labels(tmp_path, "train")
    assert images.shape == (20, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.tolist() == [*range(10), *range(10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an idx file of unsigned bytes: it begins with nothing"),
        (b"PK\3\4xxxx", "is not an idx file of unsigned bytes: it begins with 504b0304"),
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "is not an idx file of unsigned bytes"),
        (b"\0\0\x08\1\0\0\0\5abc", "declares 5 bytes of data, but holds 3"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "x")


def test_a_torn_download_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "x.gz", torch.zeros(1000))
    (tmp_path / "x.gz").write_bytes((tmp_path / "x.gz").read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "x.gz")


def test_a_corrupted_download_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "x.gz", torch.arange(1000))
    content = bytearray((tmp_path / "x.gz").read_bytes())
    content[20:60] = b"\xff" * 40
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "x.gz")


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs a data folder"):
        make_task("fashion-cleaning")
    with pytest.raises(DataError, match="nowhere does not exist"):
        make_task("fashion-cleaning", folder=tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no train-images-idx3-ubyte"):
        make_task("fashion-cleaning", folder=tmp_path)


def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, 20, 10)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.zeros(19))
    with pytest.raises(DataError, match="20 train images, but 19 labels"):
        read_images_and_labels(tmp_path, "train")


def test_the_network_is_the_papers() -> None:
    net = make_conv_net()
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    convolutions = (1 + 8 + 8) * 8 * 25 + 3 * 8
    assert sum(p.numel() for p in net.parameters()) == convolutions + 72 * 10 + 10


@pytest.mark.parametrize("name", ["fashion-cleaning", "fashion-weights"])
def test_every_batch_gives_convolutions_their_fast_layout(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path, 11_010, 30)
    trial = optuna.trial.FixedTrial({"lr": 0.1})
    problem, _ = make_task(name, folder=tmp_path).define(trial, ghg.Alpha(trial))
    for stream in (problem.train_stream(), problem.val_stream()):
        convolved = make_conv_net()[0](next(stream)[0])
        assert convolved.is_contiguous(memory_format=torch.channels_last)


def test_is_refined_online_end_to_end(tmp_path: Path) -> None:
    write_folder(tmp_path, 1100, 30)
    settings = Settings(horizon=2, n_outer_steps=2, outer_lr=0.1, evaluate=ghg.Online(), evaluate_every=1)
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial({"lr": 0.1})
    task = FashionCleaning(tmp_path)
    study.optimize(make_objective(task, estimator=ghg.Greedy(), settings=settings), n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["protocol"] == "Online(), 2 × 2 steps"
    assert {"val_accuracy", "test_accuracy", "weight_clean", "weight_corrupted"} <= trial.user_attrs.keys()
    # 4 steps on 1000 images; each validation gradient and each of the 3 evaluations on all 30
    assert trial.user_attrs["cost_n_train_gradients"] == 4000
    assert trial.user_attrs["cost_n_val_gradients"] == 4 * 30
    assert trial.user_attrs["cost_n_evaluations"] == 3 * 30
