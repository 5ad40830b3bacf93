import copy
import functools
from itertools import repeat

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.problems import SPECIMENS, Case, Weights, classification, float64, toy


def clone(tensors):
    return {name: x.detach().clone() for name, x in tensors}


def seed_values(specimen):
    return {name: h.init for name, h in specimen.hyperparameters.items()}


@pytest.mark.parametrize("name", ["full-batch", "batchnorm"])
def test_losses_are_those_of_the_users_module_in_its_two_modes(name):
    specimen = SPECIMENS[name]()
    problem, alpha = specimen.problem(), seed_values(specimen)
    parameters, buffers = problem.initial_parameters, problem.initial_buffers
    train_batch, val_batch = specimen.train_batches[0], specimen.val_batches[0]

    expected = specimen.val_loss(copy.deepcopy(specimen.module).eval(), alpha, val_batch)
    torch.testing.assert_close(problem.validate(parameters, buffers, alpha, val_batch), expected)

    module = copy.deepcopy(specimen.module)
    loss, buffers_after = problem.train(parameters, buffers, alpha, train_batch)
    torch.testing.assert_close(loss, specimen.train_loss(module, alpha, train_batch))
    torch.testing.assert_close(buffers_after, dict(module.named_buffers()))


def test_weights_are_those_it_is_called_with():
    problem, parameters = toy().problem(), {"w": float64(0.5, -1.5)}
    expected = 0.5**2 + 1.5**2 + 10 * (float64(0.5).sin() ** 2 + float64(1.5).sin() ** 2)
    torch.testing.assert_close(problem.validate(parameters, {}, {}, None), expected)


class Reassigned(nn.Module):
    """Counts its calls by assigning a new buffer, and scales by the count."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(float64(1.0))
        self.register_buffer("n_calls", float64(0.0))

    def forward(self):
        self.n_calls = self.n_calls + 1
        return self.w * self.n_calls


def squares(module, x):
    """The mean square of what the module makes of ``x`` is both losses."""

    def loss(model, alpha, batch):
        return model(batch).square().mean()

    return BilevelProblem(model=module, train_loss=loss, val_loss=loss, train_batches=x, val_batches=x)


@pytest.mark.parametrize("root_in_eval", [False, True])
def test_running_statistics_are_carried_and_never_written_into_the_callers(root_in_eval):
    module = nn.Sequential(nn.BatchNorm1d(2).double())
    module.training = not root_in_eval  # the child stays in training mode, as when a user freezes all but one part
    x = torch.tensor([[0.0, 2.0], [2.0, 4.0]]).double()
    problem = squares(module, x)
    buffers = problem.initial_buffers
    before = clone(buffers.items())
    for mean in (x.mean(0) * 0.1, x.mean(0) * 0.19):  # 10% of the way, then 10% of what is left
        _, buffers = problem.train(problem.initial_parameters, buffers, {}, x)
        torch.testing.assert_close(buffers["0.running_mean"], mean)
    torch.testing.assert_close(problem.initial_buffers, before)


def test_a_buffer_that_the_module_assigns_anew_is_carried():
    problem = BilevelProblem(
        model=Reassigned(),
        train_loss=lambda model, alpha, _: model(),
        val_loss=lambda model, alpha, _: model(),
        train_batches=[0],
        val_batches=[0],
    )
    buffers = problem.initial_buffers
    for expected in (1.0, 2.0, 3.0):
        loss, buffers = problem.train(problem.initial_parameters, buffers, {}, 0)
        torch.testing.assert_close(loss.detach(), float64(expected))


def test_frozen_parameters_take_part_and_are_not_trained():
    specimen = classification()
    specimen.module[2].bias.requires_grad_(False)
    with torch.no_grad():
        specimen.module[2].bias.add_(0.7)
    problem, alpha = specimen.problem(), seed_values(specimen)
    assert problem.initial_parameters.keys() == {"0.weight", "2.weight"}
    batch = specimen.val_batches[0]
    torch.testing.assert_close(
        problem.validate(problem.initial_parameters, {}, alpha, batch),
        specimen.val_loss(specimen.module, alpha, batch),
    )


def test_the_users_module_may_change_afterwards_without_an_effect():
    specimen = toy()
    problem = specimen.problem()
    with torch.no_grad():
        specimen.module.w.fill_(100.0)
    torch.testing.assert_close(problem.initial_parameters["w"], float64(2.0, 2.0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False).double()
        self.second = nn.Linear(2, 2).double()
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("module", "n_features"), [(Tied(), 2), (SPECIMENS["batchnorm"]().module, 3)], ids=["tied", "batchnorm"]
)
def test_its_state_dict_loads_into_the_users_module(module, n_features):
    x = torch.linspace(-1, 1, 4 * n_features).double().reshape(4, n_features)
    problem = squares(module, x)
    parameters = {name: p + 0.3 for name, p in problem.initial_parameters.items()}
    buffers = {name: b + 1 for name, b in problem.initial_buffers.items()}
    loaded = copy.deepcopy(module).eval()
    loaded.load_state_dict(problem.state_dict(parameters, buffers))
    torch.testing.assert_close(loaded(x).square().mean(), problem.validate(parameters, buffers, {}, x))


class Autoencoder(nn.Module):
    """What has more than a forward pass."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(weight_norm(nn.Linear(3, 2)), nn.Tanh())
        self.norm, self.decoder = nn.BatchNorm1d(2), nn.Linear(2, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
        self.scales = nn.ParameterList([torch.ones(2), torch.ones(2)])
        self.width = 2

    def encode(self, x, *, calls=2.0, path=None):
        return calls * self.norm(self.encoder(x))

    def all_heads(self):
        return list(self.heads.values())

    def forward(self, x):
        return self.decoder(self.encode(x))

    @property
    def length(self):
        return self.decoder.weight.norm()


VIEWS = {
    "method": lambda m, x: m.encode(x).square().mean(),
    "part": lambda m, x: m.decoder(m.encoder(x)).square().mean(),
    "in a list": lambda m, x: m.encoder[-1](m.encoder[0](x)).square().mean(),
    "in a loop": lambda m, x: functools.reduce(lambda y, layer: layer(y), m.encoder, x).square().mean(),
    "in a dictionary": lambda m, x: (m.heads["a"](m.encode(x)) * m.heads.b(m.encode(x))).mean(),
    "in all of a dictionary": lambda m, x: sum(m.heads[key](m.encode(x)).mean() for key in m.heads),
    "if it is there": lambda m, x: m(x).mean() if "a" in m.heads and len(m.heads) == 2 else None,
    "in a list of weights": lambda m, x: (m.encode(x) * m.scales[0] * m.scales[-1]).sum(),
    "truth": lambda m, x: m(x).mean() if m and m.decoder else None,
    "keywords": lambda m, x: m.encode(x, calls=3.0, path="p").sum(),
    "forward": lambda m, x: m.forward(x).square().mean() + m.decoder.forward(m.encode(x)).mean(),
    "weight": lambda m, x: m.decoder.weight.square().sum(),
    "computed weight": lambda m, x: m.encoder[0].weight.square().sum(),
    "property": lambda m, x: m.length * m.width,
    "buffer": lambda m, x: (m(x).mean() * 0 + m.norm.running_mean).square().sum() + m.length,
}


class TestViewOfTheModule:
    @pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
    def test_methods_parts_and_weights_are_those_of_the_module_with_the_present_weights(self, view):
        module, x = Autoencoder().double(), torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
        problem = BilevelProblem(
            model=Autoencoder().double(),
            train_loss=lambda model, alpha, b: view(model, b),
            val_loss=lambda model, alpha, b: view(model, b),
            train_batches=x,
            val_batches=x,
        )
        parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        loss, buffers = problem.train(parameters, clone(module.named_buffers()), {}, x)
        expected = view(module, x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(buffers, dict(module.named_buffers()))
        ours = torch.autograd.grad(loss, [*parameters.values()], materialize_grads=True)
        theirs = torch.autograd.grad(expected, [*module.parameters()], materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)

    def test_a_property_runs_once_and_with_the_present_weights(self):
        seen = []

        class Seen(Autoencoder):
            @property
            def length(self):
                seen.append(float(self.decoder.weight.detach().norm()))
                return super().length

        x = torch.ones(4, 3)
        problem = BilevelProblem(
            model=Seen(), train_loss=lambda m, a, b: m.length, val_loss=VIEWS["part"], train_batches=x, val_batches=x
        )
        parameters = {name: 2 * p for name, p in problem.initial_parameters.items()}
        problem.train(parameters, problem.initial_buffers, {}, x)
        assert seen == pytest.approx([float(parameters["decoder.weight"].norm())])

    @pytest.mark.parametrize(
        ("view", "error", "message"),
        [
            (lambda m, x: m.train()(x).mean(), AttributeError, "must take no 'train' of the model"),
            (lambda m, x: m.encoder.eval()(x).mean(), AttributeError, "must take no 'eval' of the model"),
            (lambda m, x: m.missing(x).mean(), AttributeError, "no attribute 'missing'"),
            (lambda m, x: m.encoder[:1](x).mean(), TypeError, "one part of the model at a time"),
            (lambda m, x: sum(h(m.encode(x)).mean() for h in m.heads.values()), TypeError, "one by one"),
            (lambda m, x: sum(h(m.encode(x)).mean() for h in m.all_heads()), TypeError, "one by one"),
            (lambda m, x: m.encoder[5](x).mean(), IndexError, "out of range"),
            (lambda m, x: copy.deepcopy(m.encoder).missing(x).mean(), AttributeError, "no attribute 'missing'"),
        ],
    )
    def test_what_is_not_there(self, view, error, message):
        x = torch.ones(4, 3)
        problem = BilevelProblem(
            model=Autoencoder(),
            train_loss=lambda m, a, b: view(m, b),
            val_loss=lambda m, a, b: m(b).mean(),
            train_batches=x,
            val_batches=x,
        )
        with pytest.raises(error, match=message):
            problem.train(problem.initial_parameters, problem.initial_buffers, {}, x)


class TestEvaluation:
    """Means over the examples of a split, whatever the sizes of its batches."""

    specimen = classification(val_sizes=(1, 4, 2))

    def problem(self, **replaced):
        def accuracy(model, alpha, batch):
            return (model(batch[0]).argmax(1) == batch[1]).double().mean()

        return self.specimen.problem(metrics={"accuracy": accuracy}, **replaced)

    def whole(self, n_batches):
        batches = self.specimen.val_batches[:n_batches]
        return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])

    @pytest.mark.parametrize(("n_eval_batches", "n_examples"), [(None, 7), (2, 5)])
    def test_it_agrees_with_one_batch_of_all_the_examples(self, n_eval_batches, n_examples):
        problem, alpha = self.problem(n_eval_batches=n_eval_batches), seed_values(self.specimen)
        scores, n = problem.evaluate("val", problem.initial_parameters, problem.initial_buffers, alpha)
        x, y = self.whole(n_eval_batches)
        penalty = float((alpha["penalties"] ** 2).sum())
        logits = self.specimen.module(x).detach()
        assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, y)) + penalty, rel=1e-12)
        assert scores["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()), rel=1e-12)
        assert n == n_examples
        assert set(problem.metrics) == set(scores)

    def test_the_test_split_has_its_own_examples(self):
        alpha, batch = seed_values(self.specimen), self.specimen.val_batches[1]
        problem = self.problem(test_batches=[batch])
        scores, n = problem.evaluate("test", problem.initial_parameters, {}, alpha)
        expected = self.specimen.val_loss(self.specimen.module, alpha, batch).detach()
        assert scores["loss"] == pytest.approx(float(expected), rel=1e-12)
        assert n == 4

    def test_a_split_that_is_not_there_has_no_scores(self):
        problem = self.problem()
        assert problem.evaluate("test", problem.initial_parameters, {}, seed_values(self.specimen)) == ({}, 0)

    def test_batches_that_run_dry_are_named(self):
        problem = self.problem(val_batches=iter(()), n_eval_batches=2)
        with pytest.raises(RuntimeError, match="val_batches ended before the first batch"):
            problem.evaluate("val", problem.initial_parameters, {}, seed_values(self.specimen))


@pytest.mark.parametrize("loss", ["train_loss", "val_loss"])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (lambda model: model(), r"shape \(2,\)"),
        (lambda model: model()[:1], r"shape \(1,\)"),
        (lambda model: 0.5, "float"),
    ],
    ids=["vector", "one entry", "float"],
)
def test_a_loss_that_is_no_0_dimensional_tensor_is_refused(loss, value, got):
    problem = toy().problem(**{loss: lambda model, alpha, _: value(model)})
    calls = {
        "train_loss": [lambda w: problem.train(w, {}, {"target": float64(0.0, 0.0)}, None)],
        "val_loss": [lambda w: problem.validate(w, {}, {}, None), lambda w: problem.evaluate("val", w, {}, {})],
    }
    for call in calls[loss]:
        with pytest.raises(
            ValueError, match=f"{loss} must return a 0-dimensional tensor, but got {got}.*take the mean"
        ):
            call(problem.initial_parameters)


def test_a_metric_of_a_wrong_shape_is_refused_by_its_name():
    problem = toy().problem(metrics={"distance": lambda model, alpha, _: model()})
    with pytest.raises(ValueError, match=r"'distance' must return a 0-dimensional tensor, but got shape \(2,\)"):
        problem.evaluate("val", problem.initial_parameters, {}, {})


def test_a_metric_may_be_a_plain_number():
    problem = toy().problem(metrics={"half": lambda model, alpha, _: 0.5})
    assert problem.evaluate("val", problem.initial_parameters, {}, {})[0]["half"] == 0.5


@pytest.mark.parametrize("loss", ["train_loss", "val_loss"])
def test_a_loss_without_a_gradient_is_refused_with_where_to_look(loss):
    specimen = toy()
    case = Case(specimen, SGD(lr=0.1))
    products = case.products()
    products.problem = specimen.problem(**{loss: lambda model, alpha, _: model().detach().sum()})
    with pytest.raises(ValueError, match=rf"{loss} must depend on the weights .* Look for \.detach\(\)"):
        products.step(products.initial_state(), case.alpha(), 0).validation()


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"train_loss": None}, TypeError, r"train_loss and val_loss must be functions of \(model, alpha, batch\)"),
        ({"val_loss": 1.0}, TypeError, "must be functions"),
        ({"train_batches": 3}, TypeError, "train_batches must be an iterable"),
        ({"val_batches": None}, TypeError, "val_batches must be an iterable"),
        ({"train_batches": []}, ValueError, "train_batches must hold at least one batch"),
        ({"val_batches": []}, ValueError, "val_batches must hold at least one batch"),
        ({"test_batches": []}, ValueError, "test_batches must hold at least one batch"),
        ({"val_batches": repeat(0)}, ValueError, "val_batches is a one-shot iterator.*n_eval_batches"),
        ({"test_batches": repeat(0)}, ValueError, "test_batches is a one-shot iterator.*n_eval_batches"),
        ({"n_eval_batches": 0}, ValueError, "n_eval_batches must be at least 1, or None .* but got 0"),
        ({"metrics": {"loss": lambda *_: 0.0}}, ValueError, "must not be called 'loss'"),
        ({"model": nn.Tanh()}, ValueError, "requires_grad=True, but there is nothing to train"),
        ({"model": Weights(1.0).requires_grad_(False)}, ValueError, "requires_grad=True"),
    ],
)
def test_a_problem_that_cannot_be_solved_is_refused(replaced, error, message):
    with pytest.raises(error, match=message):
        toy().problem(**replaced)
