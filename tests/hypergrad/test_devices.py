import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from optuna_greedyhg.hypergrad import batches
from optuna_greedyhg.hypergrad.batches import Stream
from optuna_greedyhg.hypergrad.devices import as_device
from tests.problems import CPU, classification

META = torch.device("meta")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_cuda_auto_is_the_cpu_and_cuda_is_refused():
    assert as_device("auto") == CPU
    with pytest.raises(ValueError, match=r"got cuda:0 without CUDA; use 'auto' or 'cpu'"):
        as_device("cuda:0")


def test_with_cuda_auto_is_the_present_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert as_device("auto") == torch.device("cuda")
    assert as_device("cuda:1") == torch.device("cuda", 1)
    assert as_device(CPU) == CPU


def test_a_problem_moves_a_copy_of_the_model_and_full_batches_to_its_device():
    specimen = classification()
    problem = specimen.problem(device=META, train_batches=specimen.train_batches[0])
    assert problem.device == META
    assert {x.device for x in next(problem.train_stream())} == {META}
    assert {x.device for x in next(problem.val_stream())} == {CPU}  # a list of batches: each is moved when it is used
    assert next(specimen.module.parameters()).device == CPU


def test_batches_for_cuda_are_pinned_and_those_on_a_device_are_left_alone(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    elsewhere = torch.zeros(2, device=META)
    batch = next(Stream([{"x": torch.ones(2), "y": (elsewhere, "name")}], "train_batches", pin=True))
    assert len(pinned) == 1
    assert batch["y"] == (elsewhere, "name")
    next(Stream(DataLoader(TensorDataset(torch.ones(2, 1))), "train_batches"))
    assert len(pinned) == 1


def test_without_waiting_only_batches_on_the_cpu_are_compared():
    x, y = (torch.ones(2),), (torch.ones(2),)
    assert batches.is_same(x, y, wait=False)
    elsewhere = (torch.ones(2, device=META),)
    assert batches.is_same(elsewhere, elsewhere, wait=False)
    assert not batches.is_same(elsewhere, (torch.ones(2, device=META),), wait=False)
