import pytest
import torch

from optuna_greedyhg.hypergrad import evaluation
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.hypergrad.work import at_once
from tests import reference
from tests.problems import SPECIMENS, UPDATE_RULES, Case, bowl, float64, toy


@pytest.mark.parametrize("specimen", ["dropout", "batchnorm"])
@pytest.mark.parametrize("rule", ["momentum", "AdamW"])
def test_retraining_agrees_with_torch_optim_in_weights_and_scores(rule, specimen):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES[rule])
    products, alpha = case.products(), case.alpha()
    state = at_once(evaluation.train)(products, alpha, n_steps=7, seed=3)
    *_, module = reference.by_torch_optim(case, alpha, n_steps=7, seed=3)
    module.eval()
    torch.testing.assert_close(state.parameters, dict(module.named_parameters()), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(state.buffers, dict(module.named_buffers()), rtol=1e-11, atol=1e-13)

    result = evaluation.evaluate(products, alpha, state, outer_step=2, seed=3)
    sizes = [len(batch[0]) for batch in case.specimen.val_batches]
    with torch.no_grad():
        losses = [case.specimen.val_loss(module, case.values(alpha), batch) for batch in case.specimen.val_batches]
    mean = sum(n * float(loss) for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    assert result.scores["loss"] == pytest.approx(mean, rel=1e-11)
    assert result.outer_step == 2
    torch.testing.assert_close(result.values, case.values(alpha))


def test_a_training_depends_on_alpha_and_the_seed_and_nothing_else():
    case = Case(SPECIMENS["dropout"](), UPDATE_RULES["Adam"])
    alpha = case.alpha()

    def weights(seed):
        return at_once(evaluation.train)(case.products(), alpha, n_steps=5, seed=seed).parameters["0.weight"]

    first = weights(0)
    torch.rand(13)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_costs_are_counted_in_examples_and_the_test_split_is_free():
    case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1))
    products, alpha = case.products(), case.alpha()
    products.problem = case.specimen.problem(test_batches=case.specimen.val_batches[:1])
    state = at_once(evaluation.train)(products, alpha, n_steps=4, seed=0)
    result = evaluation.evaluate(products, alpha, state, 0, seed=0)
    assert products.cost.n_train_gradients == 4 + 3 + 5 + 4
    assert products.cost.n_evaluations == 3 + 5
    assert products.cost.n_products == products.cost.n_val_gradients == 0
    only, _ = products.problem.evaluate("test", state.parameters, state.buffers, products.values(alpha))
    assert result.test_scores == only
    assert result.test_scores["loss"] != result.scores["loss"]


def test_a_training_that_diverges_ends_early():
    case = Case(bowl(), SGD(lr=1e30))
    products = case.products()
    state = at_once(evaluation.train)(products, case.alpha(), n_steps=10_000, seed=0)
    assert not state.is_finite()
    assert products.cost.n_train_gradients < 100


def test_values_do_not_change_with_the_coordinates_afterwards():
    case = Case(toy(), SGD(lr=0.1))
    products, alpha = case.products(), case.alpha()
    result = evaluation.evaluate(products, alpha, products.initial_state(), 0, seed=0)
    alpha["target"].zero_()
    torch.testing.assert_close(result.values["target"], float64(1.0, 1.0))


@pytest.mark.parametrize("n_steps", [0, -3])
def test_a_training_of_no_steps_is_refused(n_steps):
    with pytest.raises(ValueError, match=f"n_steps must be at least 1, but got {n_steps}"):
        Retrain(n_steps)
