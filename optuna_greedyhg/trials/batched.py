"""optimize_batched(): many trials at once on one device, as lanes of one computation."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from optuna import Study, TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.replicas import Replicas, require_stackable
from optuna_greedyhg.hypergrad.work import Training, Walk
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.heartbeats import Heartbeats
from optuna_greedyhg.trials.refine import Callback, refine

MakeProblem = Callable[[Trial, Alpha], BilevelProblem]
StudyCallback = Callable[[Study, FrozenTrial], None]

_logger = logging.getLogger("optuna.greedyhg")


def optimize_batched(
    study: Study,
    make_problem: MakeProblem,
    n_trials: int | None = None,
    n_lanes: int = 16,
    *,
    timeout: float | None = None,
    catch: Iterable[type[Exception]] | type[Exception] = (),
    callbacks: Sequence[StudyCallback] = (),
    on_outer_step: Sequence[Callback] = (),
    trial_timeout: float | None = None,
    **settings: Any,
) -> None:
    """``study.optimize`` of trials that are refined, many at once as lanes of one computation.

    Each lane is a trial with weights, α, optimizer states, batches and random numbers of its own. It is asked, reports,
    is pruned, and is told by itself, and when it ends, the next trial takes its place: no lane waits for the slowest.
    What is written to the study is what :func:`refine` would have written, to rounding, if it had been asked and pruned
    with what the study knew then.

    Lanes run the code of the first trial's problem on their own data. Weights' shapes, losses and the model's settings
    must be the same in all; of a trial where they are not, the error says what differs, and only that trial fails.

        >>> def make_problem(trial, alpha):
        ...     alpha.suggest_float("lr", 1e-3, 1.0, log=True)
        ...     return ghg.BilevelProblem(model=make_model(trial.number), train_loss=train_loss, ...)
        >>> ghg.optimize_batched(study, make_problem, 256, 64, update_rule=ghg.SGD(lr="lr"))

    Args:
        study: The study.
        make_problem: Declares a trial's hyperparameters on ``alpha``, and returns its problem.
        n_trials: Number of trials; ``None`` goes on until ``timeout`` or ``study.stop()``.
        n_lanes: The most trials at a time.
        timeout: Seconds after which no further trial begins.
        catch: Errors that fail their trial and no more. After any other, no further trial begins, those that run end as
            they would have, and the error is raised, as by ``study.optimize(n_jobs=...)``.
        callbacks: Called as ``callback(study, frozen_trial)`` after every trial; may call ``study.stop()``, after which
            all trials end with their outer steps in progress.
        on_outer_step: The ``callbacks`` of :func:`refine`.
        trial_timeout: The ``timeout`` of :func:`refine`.
        **settings: All other settings of :func:`refine`.

    Raises:
        ValueError: If a number is out of its range, or the estimator takes inner products over all weights
            (:class:`Spectral`, :class:`Implicit`, :class:`HyperDistill`), or is :class:`Forward` or :class:`DrMAD`.
        TypeError: If a setting is unknown, or ``make_problem`` returns anything but a :class:`BilevelProblem`.
        RuntimeError: If it is called in an objective or a callback of the same study.
    """
    if n_lanes < 1:
        raise ValueError(f"n_lanes must be at least 1, but got {n_lanes}.")
    settings |= {"callbacks": on_outer_step, "timeout": trial_timeout}
    bound = inspect.signature(refine).bind(None, None, None, **settings)  # a TypeError now, and not in every trial
    bound.apply_defaults()
    require_stackable(bound.arguments["estimator"])
    caught = (catch,) if isinstance(catch, type) else tuple(catch)
    session = _Session(study, make_problem, settings, Replicas(bound.arguments["horizon"]), caught, callbacks)
    session.run(n_trials, n_lanes, timeout)


class _Lane:
    """A running trial, and the work that its refinement waits for.

    Attributes:
        work: What it waits for.
        told: The trial, when it has ended.
        error: What it has ended by, if that was an error.
    """

    def __init__(self, study: Study, trial: Trial, walk: Walk[float]) -> None:
        self._study = study
        self.trial = trial
        self._walk = walk
        self.work: Any = None
        self.told: FrozenTrial | None = None
        self.error: BaseException | None = None

    def proceed(self, answer: Any) -> None:
        """Goes on to the next demand for work, or to the end of the trial, which is told.

        Args:
            answer: What has come of the work; an exception is raised where it was asked for.
        """
        try:
            self.work = self._walk.throw(answer) if isinstance(answer, BaseException) else self._walk.send(answer)
        except StopIteration as end:
            self._tell(end.value, None)
            _logger.info(
                f"Trial {self.trial.number} finished with value {end.value} and parameters {self.trial.params}."
            )
        except TrialPruned as pruned:
            self._tell(None, TrialState.PRUNED)
            _logger.info(f"Trial {self.trial.number} pruned. {pruned}")
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            self._tell(None, TrialState.FAIL)
            _logger.warning(f"Trial {self.trial.number} failed because of {error!r}.", exc_info=error)

    def _tell(self, value: float | None, state: TrialState | None) -> None:
        # One that somebody else has ended stays as they have left it.
        self.told = self._study.tell(self.trial, value, state, skip_if_finished=True)


class _Session:
    """One call: the trials that run, and all that begins and ends them."""

    def __init__(
        self,
        study: Study,
        make_problem: MakeProblem,
        settings: Mapping[str, Any],
        replicas: Replicas,
        catch: tuple[type[Exception], ...],
        callbacks: Sequence[StudyCallback],
    ) -> None:
        self._study = study
        self._make_problem = make_problem
        self._settings = settings
        self._replicas = replicas
        # Of a trial that was ended by somebody else nothing is lost but itself.
        self._catch = (*catch, UpdateFinishedTrialError)
        self._callbacks = callbacks
        self._heartbeats = Heartbeats(study)
        self._running: list[_Lane] = []
        self._error: Exception | None = None

    def run(self, n_trials: int | None, n_lanes: int, timeout: float | None) -> None:
        """Begins trials while it may, and works on those that run, until there are none."""
        # As study.optimize() does: without it, study.stop() refuses to work, and there is no public way.
        if self._study._thread_local.in_optimize_loop:
            raise RuntimeError(
                "optimize_batched() must not be called while the same study is optimized in this thread."
            )
        self._study._thread_local.in_optimize_loop, self._study._stop_flag = True, False
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        try:
            n_begun = 0
            while True:
                while len(self._running) < n_lanes and n_begun != n_trials and self._may_begin(deadline):
                    n_begun += 1
                    self._begin()
                if not self._running:
                    break
                self._round()
        except BaseException as error:  # Ctrl-C, or a storage that is gone
            for lane in self._running:
                lane.proceed(error)
            raise
        finally:
            self._study._thread_local.in_optimize_loop = False
        if self._error is not None:
            raise self._error

    def _may_begin(self, deadline: float) -> bool:
        return not self._study._stop_flag and self._error is None and time.monotonic() < deadline

    def _begin(self) -> None:
        """Asks for a trial, and goes up to its first demand for work."""
        self._heartbeats.fail_stale_trials()
        trial = self._study.ask()
        lane = _Lane(self._study, trial, self._refinement(trial))
        self._running.append(lane)
        self._heartbeats.beat([trial])
        self._proceed(lane, None)
        if lane.told is None:
            try:
                self._replicas.require_alike(lane.work)
            except ValueError as error:
                self._proceed(lane, error)

    def _refinement(self, trial: Trial) -> Walk[float]:
        alpha = Alpha(trial, artifact_store=self._settings.get("artifact_store"))
        problem = self._make_problem(trial, alpha)
        if not isinstance(problem, BilevelProblem):
            raise TypeError(f"make_problem must return a BilevelProblem, but got {type(problem).__name__}.")
        # The walk, of which refine() does the work at once.
        refinement: Walk[float] = inspect.unwrap(refine)(trial, problem, alpha, **self._settings)
        return (yield from refinement)

    def _round(self) -> None:
        """Does what the running trials wait for, and lets those go on that need wait no more."""
        self._heartbeats.beat_if_due([lane.trial for lane in self._running])
        lanes = list(self._running)
        outcomes = self._replicas.perform([lane.work for lane in lanes])
        for lane, outcome in zip(lanes, outcomes, strict=True):
            if isinstance(outcome, Training):
                lane.work = outcome
            else:
                self._proceed(lane, outcome)

    def _proceed(self, lane: _Lane, answer: Any) -> None:
        lane.proceed(answer)
        if lane.told is None:
            return
        self._running.remove(lane)
        if isinstance(lane.error, KeyboardInterrupt):
            raise lane.error
        if isinstance(lane.error, Exception) and not isinstance(lane.error, self._catch):
            self._error = self._error or lane.error
        for callback in self._callbacks:
            callback(self._study, lane.told)
