"""Lanes against the same work done one by one, in float64."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, FirstOrder, Greedy, Reverse
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.replicas import Replicas, require_stackable
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam
from optuna_greedyhg.hypergrad.work import Horizon, Training
from tests.problems import SPECIMENS, UPDATE_RULES, Case, Specimen, Weights, classification, float64

N_LANES = 3
HORIZON = 4
EXACT = {"rtol": 1e-10, "atol": 1e-13}

NORMALISED_AND_RAGGED = classification(nn.BatchNorm1d(4), batch_sizes=(4, 3, 5), val_sizes=(3, 5))
"""Buffers, and batches of several sizes, so that lanes that are not at the same place have batches of other shapes."""


def work_of(case: Case, i: int, estimator=None, **replaced) -> Horizon:
    """A horizon of the i-th lane: with its own α, after a training of its own length, in its own place in the data."""
    products = Products(case.specimen.problem(**replaced), case.products().domains, case.rule)
    with products.problem.seeded(99):
        for _ in range(i):
            next(products.train_stream), next(products.val_stream)
    alpha = {name: z + 0.1 * i for name, z in case.alpha().items()}
    state = case.state_after(3 * i)
    return Horizon(products.problem, products, estimator or Greedy(0.9), None, alpha, state, HORIZON, seed=i)


def together_and_apart(make_works):
    """The outcomes of equal works, and what each has cost, done as lanes and one by one."""
    lanes, alone = make_works(), make_works()
    replicas = Replicas(HORIZON)
    for work in lanes:
        replicas.require_alike(work)
    together = replicas.perform(lanes), [work.products.cost for work in lanes]
    return together, ([work.perform() for work in alone], [work.products.cost for work in alone])


def assert_same(make_works):
    (lanes, lanes_cost), (alone, alone_cost) = together_and_apart(make_works)
    assert lanes_cost == alone_cost
    assert lanes_cost[0] != Cost()
    for lane, one in zip(lanes, alone, strict=True):
        for name in ("parameters", "buffers", "slots"):
            torch.testing.assert_close(getattr(lane.state, name), getattr(one.state, name), **EXACT)
        assert lane.state.n_steps == one.state.n_steps
        if hasattr(one, "hypergradient"):
            torch.testing.assert_close(lane.hypergradient, one.hypergradient, **EXACT)
            torch.testing.assert_close(lane.val_loss, one.val_loss, **EXACT)
            assert lane.is_finite == one.is_finite
        else:
            assert all(map(torch.equal, lane.random_state, one.random_state))


class TestEqualToOneByOne:
    @pytest.mark.parametrize("rule", UPDATE_RULES)
    def test_a_horizon_under_every_update_rule_with_its_own_hyperparameters(self, rule):
        case = Case(NORMALISED_AND_RAGGED, UPDATE_RULES[rule])
        assert_same(lambda: [work_of(case, i) for i in range(N_LANES)])

    @pytest.mark.parametrize(
        "estimator",
        [Greedy(0.0), Greedy(0.7, terminal=True), FirstOrder(), Reverse()],
        ids=str,
    )
    @pytest.mark.parametrize("rule", ["momentum-decay", "AdamW"])
    def test_every_estimator_that_can_be_stacked(self, estimator, rule):
        case = Case(SPECIMENS["minibatches"](), UPDATE_RULES[rule])
        assert_same(lambda: [work_of(case, i, estimator) for i in range(N_LANES)])

    @pytest.mark.parametrize("rule", ["nesterov-decay", "Adam"])
    def test_a_plain_training(self, rule):
        case = Case(NORMALISED_AND_RAGGED, UPDATE_RULES[rule])

        def training(i):
            horizon = work_of(case, i)
            problem = horizon.products.problem
            batches = problem.first_batches(HORIZON)
            with problem.seeded(i):
                return Training(
                    horizon.products, horizon.alpha, horizon.state, batches, HORIZON, problem.random_state()
                )

        assert_same(lambda: [training(i) for i in range(N_LANES)])

    def test_batches_in_random_order(self):
        case = Case(SPECIMENS["full-batch"](), UPDATE_RULES["momentum"])
        train, val = (
            TensorDataset(*(torch.cat(parts) for parts in zip(*of_split, strict=True)))
            for of_split in (case.specimen.train_batches, case.specimen.val_batches)
        )

        def works():
            own = torch.Generator()
            loaders = {
                "train_batches": DataLoader(train, batch_size=5, shuffle=True),
                "val_batches": DataLoader(val, batch_size=2, shuffle=True, generator=own),
            }
            return [work_of(case, i, **loaders) for i in range(N_LANES)]

        assert_same(works)

    def test_dictionaries_with_what_is_not_a_tensor(self):
        batch = {"x": (float64(1.0, 2.0), ["text"]), "scale": 3.0}
        specimen = Specimen(
            module=Weights(1.0, -1.0),
            train_loss=lambda model, alpha, b: b["scale"] * ((model() - alpha["c"] * b["x"][0]) ** 2).sum(),
            val_loss=lambda model, alpha, b: (model() ** 4).sum(),
            hyperparameters={"c": Hyperparameter(float64(0.5, 0.2))},
            train_batches=[batch],
        )
        assert_same(lambda: [work_of(Case(specimen, SGD(lr=0.1)), i) for i in range(N_LANES)])

    def test_a_model_with_convolutions_and_a_part_that_is_not_trained(self):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Conv1d(2, 1, 2, bias=False)).double()
        module[0].weight.requires_grad_(False)
        x = torch.randn(3, 1, 5, dtype=torch.float64)
        specimen = Specimen(
            module=module,
            train_loss=lambda model, alpha, b: ((model(b) - alpha["target"]) ** 2).mean(),
            val_loss=lambda model, alpha, b: (model(b) ** 4).mean(),
            hyperparameters={"target": Hyperparameter(float64(0.3))},
            train_batches=[x],
            val_batches=[x[:1]],
        )
        assert_same(lambda: [work_of(Case(specimen, Adam(lr=0.1)), i) for i in range(N_LANES)])


def test_training_is_done_in_rounds_while_horizons_are_done_in_one():
    case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1, momentum=0.9))

    def works():
        horizon, other = work_of(case, 1), work_of(case, 2)
        batches, state = other.products.problem.first_batches(6), other.products.problem.random_state()
        return [Training(other.products, other.alpha, other.state, batches, 6, state), horizon]

    lanes, (alone, alone_horizon) = works(), works()
    replicas = Replicas(HORIZON)
    rest, roll_out = replicas.perform(lanes)
    assert isinstance(rest, Training)
    assert rest.n_steps == 2
    torch.testing.assert_close(roll_out.hypergradient, alone_horizon.perform().hypergradient, **EXACT)
    (trained,) = replicas.perform([rest])
    torch.testing.assert_close(trained.state.parameters, alone.perform().state.parameters, **EXACT)


def weights_under(outcomes) -> list[Tensors]:
    return [outcome.state.parameters for outcome in outcomes]


def test_a_lane_that_turns_nan_is_alone_with_it():
    case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1))
    works = [work_of(case, i) for i in range(N_LANES)]
    works[1] = replace(works[1], alpha={**works[1].alpha, "penalties": float64(1e3, float("nan"), 0.0)})
    outcomes = Replicas(HORIZON).perform(works)
    assert [outcome.is_finite for outcome in outcomes] == [True, False, True]
    alone = [work_of(case, i).perform() for i in (0, 2)]
    torch.testing.assert_close(weights_under(outcomes[::2]), weights_under(alone), **EXACT)
    torch.testing.assert_close(outcomes[2].hypergradient, alone[1].hypergradient, **EXACT)


def test_a_lane_whose_data_fail_is_alone_with_it():
    case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1))

    def failing():
        yield from case.specimen.train_batches[:2]
        raise OSError("the disk is gone")

    def works():
        endless = {"train_batches": cycle(case.specimen.train_batches), "n_eval_batches": 2}
        return [work_of(case, 0, **endless), work_of(case, 0, train_batches=failing(), n_eval_batches=2)]

    first, second = Replicas(HORIZON).perform(works())
    assert isinstance(second, OSError)
    torch.testing.assert_close(first.state.parameters, works()[0].perform().state.parameters, **EXACT)


def test_the_loss_draws_other_random_numbers_in_every_lane_and_round():
    case = Case(SPECIMENS["dropout"](), SGD(lr=0.1))
    replicas = Replicas(HORIZON)
    rounds = [replicas.perform([work_of(case, 0), work_of(case, 0)]) for _ in range(2)]
    outcomes = [parameters["0.weight"] for outcomes in rounds for parameters in weights_under(outcomes)]
    assert len({tuple(x.flatten().tolist()) for x in outcomes}) == len(outcomes)
    again = Replicas(HORIZON).perform([work_of(case, 0), work_of(case, 0)])
    assert torch.equal(again[1].state.parameters["0.weight"], outcomes[1])


@pytest.mark.parametrize("name", ["spectral", "ift", "ift-cg", "drmad", "distill", "forward"])
def test_an_estimator_that_cannot_be_stacked_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{type(ESTIMATORS[name]).__name__}.*use Greedy"):
        require_stackable(ESTIMATORS[name])


class TestUnlike:
    def refused(self, *cases, match):
        replicas = Replicas(HORIZON)
        replicas.require_alike(work_of(cases[0], 0))
        with pytest.raises(ValueError, match=match):
            replicas.require_alike(work_of(cases[1], 0))

    def test_shapes_are_named(self):
        other = classification(nn.Linear(4, 4, dtype=torch.float64))
        self.refused(
            Case(classification(), SGD()),
            Case(other, SGD()),
            match=r"its parameters are .*1\.weight.*\[4, 4\].*, and not",
        )

    def test_a_setting_of_the_model(self):
        cases = [Case(classification(nn.Dropout(p)), SGD()) for p in (0.1, 0.2)]
        self.refused(*cases, match=r"its module has p=0\.2 at '1', and not 0\.1")

    def test_another_update_rule(self):
        self.refused(
            Case(classification(), SGD()), Case(classification(), Adam()), match=r"update rule is Adam.* not SGD"
        )

    def test_another_shape_of_a_hyperparameter(self):
        specimen = classification()
        longer = {**specimen.hyperparameters, "penalties": Hyperparameter(torch.ones(4, dtype=torch.float64))}
        other = replace(specimen, hyperparameters=longer)
        self.refused(Case(specimen, SGD()), Case(other, SGD()), match=r"hyperparameters are .*'penalties': '\[4\]'")

    def test_a_loss_that_closes_over_what_is_a_trials_own(self):
        def specimen(scale):
            return replace(
                classification(), val_loss=lambda model, alpha, batch: scale * model(batch[0]).square().mean()
            )

        Replicas(HORIZON).require_alike(work_of(Case(specimen(2.0), SGD()), 0))
        self.refused(
            Case(specimen(2.0), SGD()), Case(specimen(3.0), SGD()), match="its val_loss is another, or closes over"
        )
        replicas = Replicas(HORIZON)
        for _ in range(2):
            replicas.require_alike(work_of(Case(specimen(2.0), SGD()), 0))

    def test_another_value_of_what_is_not_trained(self):
        specimens = [classification(), classification()]
        for specimen, value in zip(specimens, (0.0, 1.0), strict=True):
            specimen.module[0].weight.requires_grad_(False).fill_(value)
        self.refused(*(Case(specimen, SGD()) for specimen in specimens), match="its frozen part is another")


def test_a_state_that_is_kept_does_not_keep_the_other_lanes():
    case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1, momentum=0.9))
    outcome, *_ = Replicas(HORIZON).perform([work_of(case, i) for i in range(N_LANES)])
    kept = outcome.state.parameters["0.weight"]
    assert kept.untyped_storage().nbytes() == kept.nbytes
