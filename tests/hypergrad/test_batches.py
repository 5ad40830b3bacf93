from collections import namedtuple
from itertools import count, islice

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from optuna_greedyhg.hypergrad import batches
from optuna_greedyhg.hypergrad.batches import Stream, as_source, evaluation_set, generators_of, n_examples, to_device
from tests.problems import CPU

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)


@pytest.mark.parametrize(
    "full", [X, (X, Y), {"x": X, "y": Y}, ({"x": X}, Y)], ids=["tensor", "tuple", "dictionary", "mixed"]
)
def test_a_full_batch_is_the_batch_of_every_step(full):
    first, second = islice(Stream(as_source(full, "train_batches"), "train_batches"), 2)
    torch.testing.assert_close(first, full)
    torch.testing.assert_close(second, full)


def test_a_list_of_batches_is_cycled_in_its_order():
    source = as_source([X, X + 1, X + 2], "train_batches")
    drawn = [float(batch[0, 0]) for batch in islice(Stream(source, "train_batches"), 7)]
    assert drawn == [0, 1, 2, 0, 1, 2, 0]


def test_a_data_loader_is_shuffled_anew_in_every_pass():
    loader = DataLoader(TensorDataset(torch.arange(32)), batch_size=32, shuffle=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (first,), (second,) = islice(Stream(as_source(loader, "train_batches"), "train_batches"), 2)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_two_streams_over_one_source_do_not_share_their_place():
    source = as_source([X, X + 1], "train_batches")
    one, other = Stream(source, "train_batches"), Stream(source, "train_batches")
    next(one)
    torch.testing.assert_close(next(other), X)


def test_an_endless_generator_is_a_source():
    source = as_source((torch.full((2,), float(i)) for i in count()), "train_batches")
    assert [float(batch[0]) for batch in islice(Stream(source, "train_batches"), 4)] == [0, 1, 2, 3]


def test_a_one_shot_iterator_that_ends_is_named_with_the_remedy():
    stream = Stream(as_source(iter([X]), "train_batches"), "train_batches")
    next(stream)
    with pytest.raises(RuntimeError, match=r"train_batches ended .* one-shot iterator.*a list, a DataLoader"):
        next(stream)


@pytest.mark.parametrize("empty", [[], (), DataLoader(TensorDataset(X[:0]))], ids=["list", "tuple", "DataLoader"])
def test_an_empty_source_is_refused(empty):
    with pytest.raises(ValueError, match="val_batches must hold at least one batch"):
        as_source(empty, "val_batches")


@pytest.mark.parametrize("empty", [X[:0], (X[:0], X[:0]), {"x": X[:0]}], ids=["tensor", "tuple", "dictionary"])
def test_an_empty_full_batch_is_refused(empty):
    with pytest.raises(ValueError, match="val_batches must hold at least one example, but it is empty"):
        as_source(empty, "val_batches")


@pytest.mark.parametrize(
    "load",
    [
        lambda data, g: DataLoader(data, shuffle=True, generator=g),
        lambda data, g: DataLoader(data, sampler=RandomSampler(data, generator=g)),
        lambda data, g: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=g), 2, False)),
        lambda data, g: DataLoader(
            data, sampler=BatchSampler(RandomSampler(data, generator=g), 2, False), batch_size=None
        ),
    ],
    ids=["loader", "sampler", "batch sampler", "batches as samples"],
)
def test_a_generator_is_found_wherever_a_loader_has_it(load):
    generator = torch.Generator()
    assert generators_of(load(TensorDataset(X), generator)) == (generator,)


def test_what_cannot_be_iterated_over_is_refused():
    with pytest.raises(TypeError, match=r"val_batches must be an iterable of batches .* but got int"):
        as_source(3, "val_batches")


@pytest.mark.parametrize(("n_batches", "expected"), [(None, [0, 1, 2]), (2, [0, 1]), (9, [0, 1, 2])])
def test_an_evaluation_set_is_the_same_batches_every_time(n_batches, expected):
    batches = evaluation_set(as_source([X, X + 1, X + 2], "val_batches"), "val_batches", n_batches)
    for _ in range(2):
        assert [float(batch[0, 0]) for batch in batches] == expected


def test_an_evaluation_set_of_an_endless_generator_is_drawn_once():
    batches = evaluation_set((X + i for i in count()), "val_batches", 2)
    for _ in range(2):
        assert [float(batch[0, 0]) for batch in batches] == [0, 1]


def test_an_endless_evaluation_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"val_batches is a one-shot iterator.*n_eval_batches"):
        evaluation_set((X for _ in count()), "val_batches", None)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 3),
        ((X, Y), 3),
        ({"meta": "text", "y": Y[:2]}, 2),
        (["text", [X[:1]]], 1),
        (torch.tensor(4.0), 1),
        ("text", 1),
    ],
    ids=["tensor", "tuple", "dictionary", "nested", "0-dimensional", "no tensor"],
)
def test_examples_are_counted_by_the_first_tensor(batch, expected):
    assert n_examples(batch) == expected


def test_a_batch_keeps_its_structure_and_numbers_on_its_way_to_the_device():
    moved = to_device({"pair": Pair(X, Y), "list": [X, "text"], "tuple": (Y, None)}, CPU)
    assert isinstance(moved["pair"], Pair)
    torch.testing.assert_close(moved["pair"].y, Y)
    torch.testing.assert_close(moved["list"][0], X)
    assert moved["list"][1] == "text"
    assert isinstance(moved["tuple"], tuple)
    assert moved["tuple"][1] is None


class TestStack:
    def test_what_all_share_is_not_copied_and_the_rest_is_put_side_by_side(self):
        shared, own = torch.arange(6.0), [torch.zeros(2), torch.ones(2)]
        stacked = batches.stack([{"x": shared[:3], "rest": (y, "text")} for y in own])
        assert stacked.dims == [None, 0]
        assert stacked.tensors[0].data_ptr() == shared.data_ptr()
        assert torch.equal(stacked.tensors[1], torch.stack(own))
        rebuilt = batches.with_tensors(stacked.example, iter([own[1], own[0]]))
        assert rebuilt == {"x": own[1], "rest": (own[0], "text")}

    def test_a_view_with_other_strides_is_another_tensor(self):
        x = torch.arange(4.0).reshape(2, 2)
        assert batches.stack([x, x.T]).dims == [0]

    @pytest.mark.parametrize(
        "other",
        [(torch.zeros(3),), (torch.zeros(2).double(),), [torch.zeros(2)], (torch.zeros(2), "text")],
        ids=["shape", "dtype", "container", "length"],
    )
    def test_batches_are_of_one_kind_if_they_differ_in_their_entries_alone(self, other):
        assert batches.kind_of((torch.zeros(2),)) == batches.kind_of((torch.ones(2),))
        assert batches.kind_of((torch.zeros(2),)) != batches.kind_of(other)
