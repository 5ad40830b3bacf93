"""Alpha: the refinable hyperparameters of a trial, declared as on the trial itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TypeVar, cast

import torch
from optuna.distributions import CategoricalChoiceType, FloatDistribution
from optuna.trial import BaseTrial, Trial, TrialState
from torch import Tensor

from optuna_greedyhg.hypergrad.domains import Domain, Hyperparameter, Interval, Unbounded
from optuna_greedyhg.trials import records
from optuna_greedyhg.trials.inheritance import Ancestor, find_ancestor, inherited
from optuna_greedyhg.trials.once import warn_once
from optuna_greedyhg.trials.outages import outlast
from optuna_greedyhg.trials.records import ArtifactStore
from optuna_greedyhg.trials.sampler import GreedyHGSampler, sampler_of

Choice = TypeVar("Choice", bound=CategoricalChoiceType)

_logger = logging.getLogger("optuna.greedyhg")

_SLOWNESS = 3.0  # of what the sampler seeds; domains say why


class Alpha:
    """The hyperparameters α of one trial that gradients may refine.

    Scalars are seeded by the study's sampler, tensors start from a given value:

        >>> alpha = Alpha(trial)
        >>> alpha.suggest_float("lr", 1e-3, 1.0, log=True)
        >>> alpha.tensor("example_logits", torch.zeros(1000))

    What has no gradient is suggested beside them, and stays as the sampler has drawn it:

        >>> width = alpha.suggest_int("width", 16, 64)

    With :class:`GreedyHGSampler` a scalar is written to the trial when it has been refined; with any other sampler its
    seed is written at once, and the refined value goes to the trial's attributes.

    Args:
        trial: A running trial, or a :class:`~optuna.trial.FixedTrial`.
        artifact_store: Where :func:`refine` keeps the tensors of trials, and where others inherit them from.
        inherit: Whether tensors are inherited that do not say so themselves; see :meth:`tensor`.
    """

    def __init__(self, trial: BaseTrial, *, artifact_store: ArtifactStore | None = None, inherit: bool = False) -> None:
        self._trial = trial
        self._artifact_store = artifact_store
        self._inherit = inherit
        self._hyperparameters: dict[str, Hyperparameter] = {}
        self._distributions: dict[str, FloatDistribution] = {}
        # Values of seeded names that are not the trial's parameters yet, and their ranges.
        self._uncommitted: dict[str, tuple[float, FloatDistribution]] = {}
        self._committed = False
        self._inherited_from: int | None = None

    @property
    def artifact_store(self) -> ArtifactStore | None:
        """The store that it was given."""
        return self._artifact_store

    @cached_property
    def _ancestor(self) -> Ancestor | None:
        assert self._artifact_store is not None
        return find_ancestor(self._trial, self._artifact_store)

    @property
    def hyperparameters(self) -> Mapping[str, Hyperparameter]:
        """All groups by name: where each starts, and the domain it stays in."""
        return dict(self._hyperparameters)

    @property
    def scalars(self) -> tuple[str, ...]:
        """The names of those that the sampler has seeded."""
        return tuple(self._distributions)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Declares a refinable number in [low, high], as ``trial.suggest_float``, and returns its seed.

        Args:
            name: A parameter name, unique in the trial.
            low: Lower end of the range, included.
            high: Upper end of the range, included.
            step: Must be ``None``: what moves in steps has no gradient.
            log: Whether to sample, and refine, on a log scale.

        Raises:
            ValueError: If the name is taken, a step is given, or the range is empty or a single point.
        """
        if step is not None:
            raise ValueError(
                f"{name!r} cannot be refined in steps of {step}; use trial.suggest_float, or leave out the step."
            )
        self._require_free(name)
        domain = Interval(low, high, log, slowness=_SLOWNESS)
        distribution = FloatDistribution(low, high, log=log)
        seed = self._seed(name, distribution)
        records.write_seed(self._trial, name, seed, distribution)
        self._hyperparameters[name] = Hyperparameter(torch.tensor(seed, dtype=torch.float64), domain)
        self._distributions[name] = distribution
        return seed

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """``trial.suggest_int``: drawn by the sampler, written to the trial at once, never refined.

        Raises:
            ValueError: If the name is that of a refinable hyperparameter.
        """
        self._require_unrefined(name)
        return self._trial.suggest_int(name, low, high, step=step, log=log)

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Choice:
        """``trial.suggest_categorical``: drawn by the sampler, written to the trial at once, never refined.

        Raises:
            ValueError: If the name is that of a refinable hyperparameter.
        """
        self._require_unrefined(name)
        return cast(Choice, self._trial.suggest_categorical(name, choices))

    def tensor(self, name: str, init: Tensor, domain: Domain | None = None, *, inherit: bool | None = None) -> Tensor:
        """Declares a refinable tensor of any shape, and returns the value it starts from.

        Args:
            name: A name, unique among the trial's hyperparameters.
            init: Where every trial starts; floating point.
            domain: Where its entries may live; all real numbers by default.
            inherit: Start from what the best complete trial of the study has refined it to, and from ``init`` only
                while there is no such trial, or, with a warning in the log, if its tensor is lost or does not fit. The
                trial that it is from is recorded as ``inherited_from``. ``None`` is what the ``Alpha`` was made with.
                Wrong for an ``init`` that depends on what the sampler draws, which it would put aside.

        Raises:
            TypeError: If ``init`` is not a floating point tensor.
            ValueError: If the name is taken, ``init`` lies outside of ``domain``, or a tensor is to be inherited
                without an artifact store or in a study of several objectives.
        """
        self._require_free(name)
        try:
            start = Hyperparameter(init, domain or Unbounded())
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name!r}: {error}") from None
        if self._inherit if inherit is None else inherit:
            start = self._inherited(name, start)
        self._hyperparameters[name] = start
        return start.init

    def commit(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Makes refined scalars the trial's parameters, where its sampler allows it, and returns them as floats.

        They are clipped to their range, in which rounding may not have left them.

        Raises:
            RuntimeError: If it is called a second time.
            ValueError: If a value is not finite.
        """
        self._require_uncommitted()
        self._committed = True
        refined = {}
        for name, distribution in self._distributions.items():
            seed, value = self._hyperparameters[name].init, float(values[name])
            if seed.to(values[name]) == values[name]:
                value = float(seed)  # it has not moved, and was only rounded to the precision of the model
            if not math.isfinite(value):
                raise ValueError(f"The refined value of {name!r} must be finite, but got {value}.")
            refined[name] = min(max(value, distribution.low), distribution.high)
        for name, (drawn, distribution) in self._uncommitted.items():
            self._uncommitted[name] = refined.get(name, drawn), distribution
        self._write_uncommitted()
        return refined

    def require_refinable_in(self, trial: BaseTrial) -> None:
        """Checks that they are those of this trial, and have not been refined yet.

        Raises:
            RuntimeError: If they have been refined, and written to the trial, before.
            ValueError: If they are another trial's.
        """
        if self._trial.number != trial.number:
            raise ValueError(
                f"The hyperparameters of trial {self._trial.number} cannot be refined in trial {trial.number}; make an "
                "Alpha(trial) in each trial."
            )
        self._require_uncommitted()

    def _require_uncommitted(self) -> None:
        if self._committed:
            raise RuntimeError("The hyperparameters have been refined already; declare a new Alpha in another trial.")

    def _inherited(self, name: str, start: Hyperparameter) -> Hyperparameter:
        if self._artifact_store is None:
            raise ValueError(
                f"{name!r} is inherited from the artifacts of another trial, but there is no store to read them from; "
                "say Alpha(trial, artifact_store=...), or leave out inherit=True."
            )
        ancestor = self._ancestor
        better = None if ancestor is None else inherited(self._trial, name, start, ancestor)
        if ancestor is not None and better is not None:
            self._inherited_from = ancestor.number
        records.write(self._trial, {records.INHERITED_FROM: self._inherited_from})
        return better or start

    def _seed(self, name: str, distribution: FloatDistribution) -> float:
        queued, sampler = self._queued_seed(name, distribution), self._sampler()
        if sampler is None:
            if isinstance(self._trial, Trial) and not self._distributions:  # once a trial
                _warn_of_other_sampler(self._trial)
            drawn = self._trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
            if queued is not None and queued != drawn:
                _logger.warning(
                    f"Trial {self._trial.number}: its enqueued seed {name}={queued} is not used, as the study's "
                    f"sampler is no GreedyHGSampler; call enqueue_trial({{{name!r}: {queued}}})."
                )
            return drawn
        assert isinstance(self._trial, Trial)
        seed = sampler.seed(self._trial, name, distribution) if queued is None else queued
        sampler.register(self._trial, name, self._settle)
        self._uncommitted[name] = seed, distribution
        return seed

    def _queued_seed(self, name: str, distribution: FloatDistribution) -> float | None:
        """The seed that the trial was enqueued, or is retried, with."""
        seed = records.read_seed(self._trial, name)
        if seed is not None and distribution.low <= seed <= distribution.high:
            return seed
        if records.SEED + name in self._trial.user_attrs:
            _logger.warning(
                f"Trial {self._trial.number}: its seed {name}={self._trial.user_attrs[records.SEED + name]!r} is no "
                f"number in {distribution}; drawing another."
            )
        return None

    def _write_uncommitted(self) -> None:
        for name, (value, distribution) in list(self._uncommitted.items()):
            # If this fails, or is interrupted, it is done again when the trial ends.
            self._write(name, value, distribution)
            del self._uncommitted[name]

    def _write(self, name: str, value: float, distribution: FloatDistribution) -> None:
        sampler = self._sampler()
        if sampler is None or not isinstance(self._trial, Trial):
            raise RuntimeError(
                f"The seed of {name!r} cannot become a parameter: the trial has ended, or the study's sampler was "
                "replaced."
            )
        sampler.commit(self._trial, name, value)
        written = outlast(self._trial.suggest_float, name, distribution.low, distribution.high, log=distribution.log)
        if written != value:
            _logger.warning(
                f"Trial {self._trial.number}: {name} stays at its enqueued value {written}, or that of a "
                f"PartialFixedSampler; its refined value {value} is in the trial's attributes. To enqueue a seed only, "
                f"call enqueue_trial({{}}, user_attrs={{'seed_{name}': ...}})."
            )

    def _settle(self) -> Trial:
        """Commits what is still to be committed: the seeds, if nobody has refined them."""
        assert isinstance(self._trial, Trial)  # a sampler has registered it
        try:
            self._write_uncommitted()
        except Exception:  # the trial is being told already; what is raised here would end the study
            _logger.exception(f"Trial {self._trial.number}: its {sorted(self._uncommitted)} could not be written.")
        return self._trial

    def _sampler(self) -> GreedyHGSampler | None:
        """The sampler that can draw a seed for this trial without writing it, if the study has one."""
        return sampler_of(self._trial) if isinstance(self._trial, Trial) else None

    def _require_free(self, name: str) -> None:
        if name in records.TRAJECTORY_COLUMNS:
            raise ValueError(
                f"A hyperparameter must not be called any of {records.TRAJECTORY_COLUMNS}, but got {name!r}."
            )
        self._require_unrefined(name)
        # The retry of a trial that died late comes with parameters that were seeds.
        if name in self._trial.params and records.read_seed(self._trial, name) is None:
            raise _taken(name)

    def _require_unrefined(self, name: str) -> None:
        sampler = self._sampler()
        seeded = () if sampler is None or not isinstance(self._trial, Trial) else sampler.seeded(self._trial)
        if name in self._hyperparameters or name in seeded:
            raise _taken(name)


def _warn_of_other_sampler(trial: Trial) -> None:
    """``load_study`` without a sampler makes a TPESampler, under which parameters are seeds."""
    for other in outlast(trial.study.get_trials, deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        attributes = other.user_attrs
        if any(
            attributes.get(records.REFINED + name) == value != attributes.get(records.SEED + name)
            for name, value in other.params.items()
        ):
            warn_once(
                trial,
                f"this study's sampler is a {type(trial.study.sampler).__name__}, under which parameters stay at their "
                f"seeds, while trials such as {other.number} have refined ones: sampler and best_params will mistake "
                "one for the other. Load the study with sampler=GreedyHGSampler(...).",
            )
            return


def _taken(name: str) -> ValueError:
    return ValueError(f"A hyperparameter's name must be unique in its trial, but {name!r} is taken; choose another.")
