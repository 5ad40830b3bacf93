"""GreedyHGSampler: any sampler hands out seeds, and learns from what became of them.

A trial's parameter can be written only once, and what is written is what all see: ``best_params``, importances,
the dashboard, the sampler's next suggestion. So a refinable parameter is drawn from the base sampler as a *seed*
without being written, refined, and *committed* as the trial's ordinary parameter when its value is known:

    before_trial          remembers the trial
    seed(trial, ...)      one draw from the study's sampler, on behalf of ``Alpha``
    commit(trial, ...)    makes ``sample_independent`` return the refined value when ``trial.suggest_float`` asks
    after_trial           commits the seeds of a trial that was never refined, and forgets the trial

Parameters that are suggested on the trial itself reach the base sampler as usual, its relative sampling included. A
trial that the sampler has not been told of (``before_trial`` was not called) is sampled as by the base sampler.

What the base sampler reads of the study is decided in ``credit``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from optuna_greedyhg.trials.credit import Credit, require_possible, seen, with_those_inside
from optuna_greedyhg.trials.views import view_of

# Where Optuna keeps the parameters of an enqueued trial.
_FIXED_PARAMS = "fixed_params"

_Key = tuple[int, str, int]


class GreedyHGSampler(BaseSampler):
    """Draws the seeds of refinable parameters from another sampler, and commits refined values as a trial's parameters.

    Used with :class:`Alpha` and :func:`refine`. By default, the base sampler sees refined parameters with the values
    that they earned, and so learns where refinement ends well; with ``credit="seed"`` it sees the seeds with those
    values, and learns where refinement should start. A trial's parameters are the refined values either way.

    A parameter fixed by ``study.enqueue_trial`` is the seed *and* stays in the trial's parameters, because Optuna lets
    fixed values win over a sampler's; its refined value is in the trial's attributes. To enqueue a seed only, give it
    as an attribute: ``study.enqueue_trial({}, user_attrs={"seed_lr": 0.1})``.

    With :class:`~optuna.samplers.PartialFixedSampler` inside, ``GreedyHGSampler(PartialFixedSampler(...))``, what that
    one fixes are seeds. Around, ``PartialFixedSampler(..., GreedyHGSampler(...))``, it is fixed as if it were enqueued,
    and all else is refined as ever.

    Args:
        base_sampler: The sampler that draws the seeds and all other parameters; a :class:`~optuna.samplers.TPESampler`
            by default.
        seed: Seed of the default base sampler.
        credit: What the base sampler learns from: ``"refined"`` or ``"seed"``.

    Raises:
        ValueError: If both ``base_sampler`` and ``seed`` are given, or the base sampler is one that cannot learn from
            seeds and is to: :class:`~optuna.samplers.CmaEsSampler` with margin,
            :class:`~optuna.samplers.GridSampler`, :class:`~optuna.samplers.BruteForceSampler`.
    """

    def __init__(
        self, base_sampler: BaseSampler | None = None, *, seed: int | None = None, credit: Credit = "refined"
    ) -> None:
        if base_sampler is not None and seed is not None:
            raise ValueError(
                f"seed={seed} would have no effect on {base_sampler}; give it to the base sampler instead."
            )
        self._base_sampler = TPESampler(seed=seed) if base_sampler is None else base_sampler
        require_possible(credit, self._base_sampler)
        self._credit = credit
        self._contexts: dict[_Key, _Context] = {}

    def __str__(self) -> str:
        told = "" if self._credit == "refined" else f", credit={self._credit!r}"
        return f"{type(self).__name__}({self._base_sampler}{told})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contexts": {}}  # running trials stay with the process that runs them

    def reseed_rng(self) -> None:
        self._base_sampler.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._contexts[_key(study, trial)] = _Context()
        self._base_sampler.before_trial(*self._seen(study, trial))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._context(study, trial):
            return {}  # drawn in _draw, together with the seeds
        return self._base_sampler.infer_relative_search_space(*self._seen(study, trial))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if self._context(study, trial):
            return {}
        return self._base_sampler.sample_relative(*self._seen(study, trial), search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        context = self._context(study, trial)
        if context is None:
            return self._base_sampler.sample_independent(*self._seen(study, trial), param_name, param_distribution)
        if param_name in context.committed:
            return context.committed[param_name]
        if param_name in context.seeded:
            raise ValueError(
                f"The parameter {param_name!r} is declared on Alpha, and is written when it has been refined; take its "
                "seed from what alpha.suggest_float returns, or suggest it on the trial only."
            )
        return self._draw(context, study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        context = self._context(study, trial)
        if context is not None:
            try:
                for settle in context.settlers:
                    settled = settle()
                    trial.params, trial.distributions = settled.params, settled.distributions
            finally:
                del self._contexts[_key(study, trial)]
        self._base_sampler.after_trial(*self._seen(study, trial), state, values)

    def knows(self, trial: Trial) -> bool:
        """Whether it has prepared the trial, so that seeds can be drawn without being written."""
        return _key(trial.study, trial) in self._contexts

    def seed(self, trial: Trial, name: str, distribution: FloatDistribution) -> float:
        """Draws a seed from the study's sampler, without writing it to the trial. A fixed parameter is its own seed.

        Raises:
            ValueError: If the parameter was enqueued with a value out of its range.
        """
        # Trial has no public way to the trial as its storage has it now, which is what a sampler is given by Optuna.
        frozen = trial.storage.get_trial(trial._trial_id)
        fixed = frozen.system_attrs.get(_FIXED_PARAMS, {})
        if name in fixed:
            if not _contains(distribution, fixed[name]):
                raise ValueError(f"The enqueued {name}={fixed[name]} is outside of {distribution}; enqueue another.")
            return float(fixed[name])
        return float(trial.study.sampler.sample_independent(trial.study, frozen, name, distribution))

    def commit(self, trial: Trial, name: str, value: float) -> None:
        """Makes the next ``trial.suggest_float(name, ...)`` return, and so write, ``value``."""
        self._contexts[_key(trial.study, trial)].committed[name] = value

    def seeded(self, trial: Trial) -> frozenset[str]:
        """The names for which seeds have been handed out, and that nobody else may use in this trial."""
        return frozenset(self._contexts[_key(trial.study, trial)].seeded)

    def register(self, trial: Trial, name: str, settle: Callable[[], Trial]) -> None:
        """Notes that a name has a seed, and what commits it, should the trial end without having been refined."""
        context = self._contexts[_key(trial.study, trial)]
        context.seeded.add(name)
        if settle not in context.settlers:
            context.settlers.append(settle)

    def _context(self, study: Study, trial: FrozenTrial) -> _Context | None:
        return self._contexts.get(_key(study, trial))

    def _seen(self, study: Study, trial: FrozenTrial) -> tuple[Study, FrozenTrial]:
        """The study and the trial as the base sampler is to see them."""
        show = partial(seen, credit=self._credit)
        return view_of(study, trial, show), show(trial)

    def _draw(
        self, context: _Context, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """The base sampler's value for one parameter: from its relative sample, drawn once a trial, or independent."""
        base = self._base_sampler
        if context.relative_params is None:
            seen_study, seen_trial = self._seen(study, trial)
            context.search_space = base.infer_relative_search_space(seen_study, seen_trial)
            context.relative_params = base.sample_relative(seen_study, seen_trial, context.search_space)
        if name in context.relative_params:
            check_distribution_compatibility(context.search_space[name], distribution)
            if _contains(distribution, context.relative_params[name]):
                return context.relative_params[name]
        return base.sample_independent(*self._seen(study, trial), name, distribution)


@dataclass
class _Context:
    """What a running trial has been given."""

    search_space: dict[str, BaseDistribution] = field(default_factory=dict)
    relative_params: dict[str, Any] | None = None
    seeded: set[str] = field(default_factory=set)
    committed: dict[str, float] = field(default_factory=dict)
    settlers: list[Callable[[], Trial]] = field(default_factory=list)


def sampler_of(trial: Trial) -> GreedyHGSampler | None:
    """The one that has prepared the trial: the study's own sampler, or one inside of that."""
    for sampler in with_those_inside(trial.study.sampler):
        if isinstance(sampler, GreedyHGSampler) and sampler.knows(trial):
            return sampler
    return None


def _key(study: Study, trial: FrozenTrial | Trial) -> _Key:
    # Two storages may each have a study of this name. The bracket's study under Hyperband has no public storage.
    return id(study._storage), study.study_name, trial.number


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    return bool(distribution.low <= value <= distribution.high)
