"""Losses that compute in bfloat16, and everything else that does not."""

from dataclasses import replace

import pytest
import torch

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.domains import to_coordinates
from optuna_greedyhg.hypergrad.episodes import Episode, MetaProblem
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, fold
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam
from tests.problems import CPU, Specimen, classification

HORIZON = 4


def single(x):
    return x.float() if x.is_floating_point() else x


def in_float32():
    """The classification problem, in single precision."""
    specimen = classification(batch_sizes=(4, 3, 5), val_sizes=(3, 5))
    return replace(
        specimen,
        module=specimen.module.float(),
        train_batches=[tuple(map(single, batch)) for batch in specimen.train_batches],
        val_batches=[tuple(map(single, batch)) for batch in specimen.val_batches],
    )


def folded(specimen: Specimen, name, rule, **settings):
    """One horizon of a named estimator."""
    problem = specimen.problem(**settings)
    alpha = to_coordinates(specimen.hyperparameters, CPU, problem.dtype)
    products = Products(problem, {key: h.domain for key, h in specimen.hyperparameters.items()}, rule)

    def make_step(before, t, keep_graph):
        batch = next(products.train_stream)
        return products.step(before, alpha, batch, keep_graph=keep_graph, remaining=HORIZON - t)

    with problem.seeded(0):
        return fold(ESTIMATORS[name], None, alpha, products.initial_state(), HORIZON, make_step)


@pytest.mark.parametrize("rule", [SGD(lr=0.1, momentum=0.9), Adam(lr=0.05)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"first-order", "distill", "ift-cg"}))
def test_the_direction_stays_and_all_that_is_kept_is_float32(name, rule):
    full, half = (folded(in_float32(), name, rule, autocast=dtype) for dtype in (None, torch.bfloat16))
    for group, x in half.estimate.items():
        assert torch.cosine_similarity(x.flatten(), full.estimate[group].flatten(), dim=0) > 0.99
    after, validation = half.end.after, half.end.validation()
    kept = [half.estimate, after.parameters, *after.slots.values(), validation.gradient, validation.direct]
    assert {x.dtype for tree in kept for x in tree.values()} == {torch.float32}
    assert validation.loss.dtype == torch.float32
    assert not torch.equal(trees.flatten(after.parameters), trees.flatten(full.end.after.parameters))


def test_it_is_the_losses_that_compute_in_bfloat16():
    specimen, seen = in_float32(), set()

    def noting(loss):
        def noted(model, alpha, batch):
            seen.add((loss.__name__, model(batch[0]).dtype, alpha["penalties"].dtype))
            return loss(model, alpha, batch)

        return noted

    noted = replace(specimen, train_loss=noting(specimen.train_loss), val_loss=noting(specimen.val_loss))
    folded(noted, "greedy", SGD(lr=0.1), autocast=torch.bfloat16)
    names = {specimen.train_loss.__name__, specimen.val_loss.__name__}
    assert seen == {(name, torch.bfloat16, torch.float32) for name in names}


def test_scores_are_summed_up_in_float32():
    """In bfloat16, 257 is 256."""
    x, y = torch.zeros(257 + 3, 3), torch.zeros(257 + 3, dtype=torch.long)
    problem = in_float32().problem(
        val_batches=list(zip(x.split([257, 3]), y.split([257, 3]), strict=True)),
        metrics={"one": lambda model, alpha, batch: (model(batch[0]) * 0).sum() + 1},
        autocast=torch.bfloat16,
    )
    alpha = {"penalties": torch.zeros(3)}
    scores, n_examples = problem.evaluate("val", problem.initial_parameters, problem.initial_buffers, alpha)
    assert (scores["one"], n_examples) == (1.0, 260)


def test_episodes_compute_so_too():
    specimen = in_float32()
    train, val = specimen.train_batches[0], specimen.val_batches[0]
    problem = MetaProblem(
        model=specimen.module,
        train_loss=specimen.train_loss,
        val_loss=lambda model, alpha, batch: model(batch[0]).dtype.itemsize + 0 * model(batch[0]).sum(),
        draw=lambda: Episode(train, val),
        val_episodes=[Episode(train, val)],
        autocast=torch.bfloat16,
    )
    (episode,) = problem.draw_episodes()
    assert float(episode.validate(episode.initial_parameters, {}, {}, val)) == 2.0
