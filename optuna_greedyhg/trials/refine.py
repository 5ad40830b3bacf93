"""refine(): hypergradient descent inside a trial, under Optuna's pruners and into its storage."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import PatientPruner
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, Trial

from optuna_greedyhg.hypergrad.descent import (
    Achieved,
    DescentOptions,
    OuterStep,
    achieved_at,
    descent,
    next_step,
)
from optuna_greedyhg.hypergrad.episodes import Problem
from optuna_greedyhg.hypergrad.estimators import Estimator, Greedy
from optuna_greedyhg.hypergrad.evaluation import Online, Protocol
from optuna_greedyhg.hypergrad.outer import ADAM, OuterOptimizer
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.update_rules import UpdateRule
from optuna_greedyhg.hypergrad.work import Walk, at_once
from optuna_greedyhg.trials import records
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.checkpoints import Checkpoints, heartbeat_interval
from optuna_greedyhg.trials.exhibits import write_exhibits
from optuna_greedyhg.trials.once import warn_once
from optuna_greedyhg.trials.outages import outlast
from optuna_greedyhg.trials.policies import Always, Policy, decide
from optuna_greedyhg.trials.records import ArtifactStore
from optuna_greedyhg.trials.signatures import signature_of

_SCORES = {"accuracy", "acc", "auc", "auroc", "f1", "precision", "recall", "r2"}
_TURNED_ROUND = {"neg", "negative", "negated", "minus", "inverse", "inv"}

_logger = logging.getLogger("optuna.greedyhg")

Callback = Callable[[BaseTrial, OuterStep], None]


@at_once
def refine(
    trial: BaseTrial,
    problem: Problem,
    alpha: Alpha,
    *,
    update_rule: UpdateRule,
    estimator: Estimator[Any] | None = Greedy(),
    policy: Policy = Always(),
    horizon: int = 10,
    n_outer_steps: int = 50,
    outer_optimizer: OuterOptimizer = ADAM,
    evaluate: Protocol | Literal["retrain", "online"] = "retrain",
    evaluate_every: int = 10,
    metric: str = "loss",
    patience: int | None = None,
    restart: bool = False,
    rebase: bool = True,
    max_hypergradient_norm: float | None = None,
    max_failures: int = 5,
    timeout: float | None = None,
    seed: int = 0,
    artifact_store: ArtifactStore | None = None,
    keep_weights: bool | None = None,
    checkpoint_every: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Walk[float]:
    """Refines a trial's hyperparameters by hypergradients while the model trains, and returns the trial's value.

    The value is the best score of any α that was evaluated, the seed among them, under one declared protocol. By
    default, that is the validation loss after training afresh with α fixed for ``horizon·n_outer_steps`` steps; it is
    the same for a trial that is not refined, by its ``policy`` or with ``estimator=None``, which evaluates its seed.

    On the outer steps 0 (the seed), ``evaluate_every``, 2·``evaluate_every``, ... and the last, the best score so far
    is reported to the trial under the outer step's number, and on all but the last the pruner is asked. So pruners
    count in outer steps. :class:`~optuna.pruners.PatientPruner` never prunes; ``patience`` is in its place.

    However a trial ends, it keeps the best α that was evaluated until then: as its parameters and in its attributes.
    After ``study.stop()`` and ``timeout`` it ends with the outer step in progress, and is complete. By an error, in a
    loss, a callback or the data, and by Ctrl-C it fails, and the error goes on to the study; in other threads
    (``n_jobs``), Optuna has trials go on to their ends after Ctrl-C. A seed whose training
    diverges gets the worst of all values, infinity, instead of failing. While the storage cannot be reached, the trial
    waits, for a minute at most. A trial that somebody else has ended meanwhile is left as they have left it.

    What has been achieved is logged under ``optuna.greedyhg``: a line a trial at Optuna's default verbosity, and with
    ``optuna.logging.set_verbosity(optuna.logging.DEBUG)`` one for each evaluation.

    A trial whose process dies goes on in the trial that ``RetryHeartbeatStaleTrialCallback`` queues in its place: from
    its last checkpoint, if that is of the same refinement in all that can be compared, and else, with a warning in the
    log, from the seed again. It ends as if nothing had happened, on the CPU to the bit. A checkpoint is removed when
    its trial ends; one that is killed and never retried leaves it behind, for :func:`requeue_lost_trials` to remove.

    Args:
        trial: A running trial, or a :class:`~optuna.trial.FixedTrial`.
        problem: Model, losses and batches, or episodes in their place.
        alpha: The trial's refinable hyperparameters.
        update_rule: The inner optimizer.
        estimator: The hypergradient's estimator; ``None`` refines nothing.
        policy: Decides whether this trial is refined, and how far, which is rounded up to the next evaluation:
            :class:`Always`, :class:`Never`, :class:`Fraction`, :class:`Promising`, :class:`Budget`, or one of your own.
            It is asked once: when the seed has been evaluated, or, with ``evaluate="online"``, at the beginning.
        horizon: Number of training steps in one outer step.
        n_outer_steps: Number of outer steps.
        outer_optimizer: Makes the optimizer that moves α from a list of tensors, for example
            ``functools.partial(torch.optim.Adam, lr=0.3)``, which is the default.
        evaluate: ``"retrain"`` or :class:`Retrain`: α is the result. ``"online"`` or :class:`Online`: the weights
            carried along are.
        evaluate_every: Number of outer steps between two evaluations.
        metric: The score that is the trial's value: ``"loss"``, or one of the problem's metrics.
        patience: Stop after this many evaluations in a row without a new best.
        restart: Train every horizon from the initial weights, instead of carrying the weights on.
        rebase: After every evaluation, go on from the weights that it has trained; with ``evaluate="online"`` those are
            the ones carried along.
        max_hypergradient_norm: Scale longer hypergradients down to this norm.
        max_failures: After NaN or infinity, go back and halve the step at most this many times in a row.
        timeout: Seconds after which to end with the outer step in progress; the seed is evaluated in any case. In a
            trial that was resumed, those until its checkpoint count. The ``timeout`` of ``study.optimize`` is not known
            to a trial, and only keeps further ones from starting.
        seed: Seeds batches, dropout and augmentation; the same in all trials, so that they compare.
        artifact_store: Keeps the tensors of α, the weights if they are to be kept, and, for the dashboard, the
            trajectory as a table and as a picture; that of ``alpha`` by default.
        keep_weights: Whether the store keeps the weights that have earned the trial's value, for
            :func:`refined_weights`; by default where they are the result, with ``evaluate="online"``. Of a
            :class:`MetaProblem` they are those of the first validation episode.
        checkpoint_every: Number of outer steps between two checkpoints, the first when the seed has been evaluated; 0
            makes none. By default ``evaluate_every`` where there is an artifact store and the study's storage has
            heartbeats, and else 0. Each takes as much space as the weights and the optimizer's state, and the weights
            once more.
        callbacks: Called as ``callback(trial, outer_step)`` after every outer step, the seed's evaluation being the
            first, and before the pruner is asked; not again for those that a resumed trial has behind it. What they
            raise ends the trial as if the objective had raised it; ``trial.study.stop()`` ends the trial and the study
            with what there is.

    Returns:
        The trial's value.

    Raises:
        optuna.TrialPruned: If the pruner says so.
        optuna.exceptions.UpdateFinishedTrialError: If the trial was ended by somebody else.
        RuntimeError: If ``alpha`` has been refined before.
        TypeError: If the update rule, the estimator, the policy or the store is a name or a class, and no object.
        ValueError: If a setting is out of its range or does not fit the problem, checkpoints or weights are to be kept
            without a store, ``alpha`` is of another trial, the study has several objectives, it maximizes a loss, or
            the policy cannot decide, or not so, under this protocol.
    """
    options = DescentOptions(
        horizon=horizon,
        n_outer_steps=n_outer_steps,
        outer_optimizer=outer_optimizer,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        metric=metric,
        maximize=_maximizes(trial, metric),
        patience=patience,
        restart=restart,
        rebase=rebase,
        max_hypergradient_norm=max_hypergradient_norm,
        max_failures=max_failures,
        seed=seed,
    ).suited_to(problem)
    store, callbacks = artifact_store or alpha.artifact_store, tuple(callbacks)
    _require_objects(update_rule, estimator, policy, store)
    keep_weights = _keeps_weights(keep_weights, options, store)
    checkpoint_every = _checkpoint_every(checkpoint_every, trial, store, options.evaluate_every)
    _warn_of_patient_pruner(trial)
    alpha.require_refinable_in(trial)
    described = {"estimator": str(estimator), "policy": str(policy), "protocol": _described(options)}
    signature = signature_of(problem, alpha.hyperparameters, update_rule, estimator, options)
    checkpoints = Checkpoints(trial, store, checkpoint_every, signature, problem.val_episodes[0].device)
    recorder = _Recorder(trial, problem, alpha, options, store, keep_weights, checkpoints)
    until, seed_is_judged = options.n_outer_steps, not isinstance(options.protocol, Online)
    try:
        checkpoint = recorder.resume()
        deadline = math.inf if timeout is None else recorder.start + timeout
        if checkpoint is not None:  # all was decided, and written, then
            until, estimator = checkpoint["until"], estimator if checkpoint["refined"] else None
        elif estimator is not None and not seed_is_judged and decide(policy, trial, None, options) == 0:
            estimator = None  # trains as long, under the seed
        resume_from = None if checkpoint is None else checkpoint["resume_point"]
        steps = descent(problem, alpha.hyperparameters, update_rule, estimator, options, resume_from)
        if checkpoint is None:
            records.write(trial, described)
        stopped = ""
        while not stopped:
            step = yield from next_step(steps)
            recorder.observe(step)
            if step.index == 0:
                if estimator is not None and seed_is_judged:
                    until = decide(policy, trial, recorder.value, options)
                refined = estimator is not None and until > 0
                records.write(trial, {"refined": refined})
                if refined and store is None:
                    _warn_of_lost_tensors(trial, alpha)
            for callback in callbacks:
                callback(trial, step)
            stopped = _reason_to_stop(trial, step, until, deadline)
            if not stopped and checkpoints.is_due(step.index):
                decided = {"until": until, "refined": estimator is not None}
                checkpoints.save({**decided, **recorder.standing(), "resume_point": step.resume_point})
    except (Exception, KeyboardInterrupt) as error:  # what was found until now is kept, and the error goes on its way
        recorder.finish_early("pruned" if isinstance(error, TrialPruned) else "failed")
        raise
    recorder.finish(stopped)
    if stopped == "pruned":
        raise TrialPruned(f"Pruned at outer step {step.index} with {metric} {recorder.value:.6g}.")
    return recorder.value


class _Recorder:
    """Follows a descent, and writes what it has found to the trial when it ends, however it ends."""

    def __init__(
        self,
        trial: BaseTrial,
        problem: Problem,
        alpha: Alpha,
        options: DescentOptions,
        artifact_store: ArtifactStore | None,
        keep_weights: bool,
        checkpoints: Checkpoints,
    ) -> None:
        self._trial = trial
        self._problem = problem
        self._alpha = alpha
        self._options = options
        self._artifact_store = artifact_store
        self._keep_weights = keep_weights
        self._checkpoints = checkpoints
        self._trajectory = records.Trajectory()
        self._improvements: list[records.Row] = []
        self._achieved: Achieved | None = None
        self._product_mode: ProductMode | None = None
        self._reports: dict[int, float] = {}
        self._known: frozenset[int] = frozenset()  # outer steps that the trial was queued with
        self.start = time.perf_counter()

    @property
    def value(self) -> float:
        """The best score so far; where even the best is NaN, the worst there is."""
        assert self._achieved is not None
        loss = self._options.loss_of(self._achieved.best)
        return -loss if self._options.maximize else loss

    def resume(self) -> dict[str, Any] | None:
        """Goes on with what another process has recorded, and returns its checkpoint; ``None`` if there is none."""
        if not isinstance(self._trial, Trial):
            return None
        queued = outlast(self._trial.storage.get_trial, self._trial._trial_id)
        self._known = frozenset(queued.intermediate_values)
        checkpoint = self._checkpoints.load(queued)
        if checkpoint is not None:
            self._trajectory = records.Trajectory(checkpoint["trajectory"])
            self._improvements = list(checkpoint["improvements"])
            self._achieved = achieved_at(checkpoint["resume_point"])
            self.start -= checkpoint["seconds"]
            for outer_step, value in checkpoint["reports"].items():
                self._report(outer_step, value)
        if checkpoint is not None or records.RESUMED_FROM in queued.user_attrs:
            came_from = None if self._achieved is None else self._achieved.n_outer_steps
            records.write(self._trial, {records.RESUMED_FROM: came_from})
            if came_from is not None:
                _logger.info(
                    f"Trial {self._trial.number} goes on from outer step {came_from} of a trial that was killed."
                )
        return checkpoint

    def standing(self) -> dict[str, Any]:
        """What ``resume`` needs of a checkpoint, but for the resume point."""
        return {
            "trajectory": self._trajectory.rows,
            "improvements": list(self._improvements),
            "reports": self._reports,
            "seconds": time.perf_counter() - self.start,
        }

    def observe(self, step: OuterStep) -> None:
        """Takes note of an outer step, and reports it if it was evaluated."""
        self._achieved = Achieved(step.index, step.best, step.cost)
        self._product_mode = step.product_mode
        score = None if step.evaluation is None else step.evaluation.scores[self._options.metric]
        self._trajectory.append(
            step.index, score, step.values, val_loss=step.val_loss, hypergradient_norm=step.hypergradient_norm
        )
        if step.evaluation is not None:
            if step.evaluation is step.best:
                seconds = time.perf_counter() - self.start
                self._improvements.append(records.improvement(step.index, step.best, step.cost, seconds))
            self._report(step.index, self.value)
            _logger.debug(
                f"Trial {self._trial.number}, outer step {step.index} of {self._options.n_outer_steps}: "
                f"{self._options.metric} {score:.6g}, best {self.value:.6g}."
            )

    def _report(self, outer_step: int, value: float) -> None:
        self._reports[outer_step] = value
        if outer_step not in self._known:
            outlast(self._trial.report, value, outer_step)

    def finish_early(self, stopped: str) -> None:
        """Keeps what can be kept, without getting in the way of the error that has ended the trial."""
        try:
            if self._achieved is None:  # nothing was evaluated: the sampler settles the seeds
                self._checkpoints.remove()
            else:
                self.finish(stopped)
        except UpdateFinishedTrialError:
            pass  # logged already, and most likely the very error that has ended the trial
        except Exception:
            _logger.exception(f"Trial {self._trial.number}: what it had found before it failed could not be written.")

    def finish(self, stopped: str) -> None:
        """Commits the best α, writes all that is known about the trial, and removes its checkpoint."""
        try:
            self._write(stopped)
            self._checkpoints.remove()
            self._log(stopped)
        except UpdateFinishedTrialError:
            _logger.warning(
                f"Trial {self._trial.number} was ended by somebody else, and is left as it is. Optuna's optimize() "
                "cannot go on after it: call it again, or use study.ask() and study.tell(skip_if_finished=True)."
            )
            raise

    def _log(self, stopped: str) -> None:
        assert self._achieved is not None
        best = self._achieved.best
        if not math.isfinite(best.scores["loss"]) and best.state.is_finite():
            _logger.warning(
                f"Trial {self._trial.number}: its weights are finite, but its validation loss is "
                f"{best.scores['loss']}; look for NaN or infinities in val_batches, or in val_loss."
            )
        if self._achieved.n_outer_steps > 0:
            seed = self._trajectory.rows[0]["value"]
            _logger.info(
                f"Trial {self._trial.number}: {self._options.metric} {seed:.6g} → {self.value:.6g} in "
                f"{self._achieved.n_outer_steps} outer steps ({stopped})."
            )

    def _write(self, stopped: str) -> None:
        assert self._achieved is not None
        best = self._achieved.best
        refined = self._alpha.commit(best.values)
        records.write(
            self._trial,
            {
                **{records.REFINED + name: value for name, value in refined.items()},
                **{f"val_{name}": score for name, score in best.scores.items()},
                **{f"test_{name}": score for name, score in best.test_scores.items()},
                **{records.COST + name: n for name, n in asdict(self._achieved.cost).items()},
                records.COST + "seconds": time.perf_counter() - self.start,
                "best_outer_step": best.outer_step,
                "n_outer_steps": self._achieved.n_outer_steps,
                "stopped": stopped,
                "product_mode": self._product_mode and self._product_mode.value,
            },
        )
        records.write_trajectory(self._trial, self._trajectory)
        records.write_improvements(self._trial, self._improvements)
        is_tensor = set(best.values) - set(refined)
        inits = {name: h.init for name, h in self._alpha.hyperparameters.items()}
        problem = self._problem.val_episodes[0]
        state = best.state if self._keep_weights else None
        records.write_tensors(
            self._trial,
            self._artifact_store,
            seed={name: x for name, x in inits.items() if name in is_tensor},
            refined={name: x for name, x in best.values.items() if name in is_tensor},
            weights={} if state is None else problem.state_dict(state.parameters, state.buffers, best.values),
        )
        write_exhibits(
            self._trial,
            self._artifact_store,
            self._trajectory,
            metric=self._options.metric,
            best_outer_step=best.outer_step,
        )


def _require_objects(update_rule: object, estimator: object, policy: object, store: object) -> None:
    """Checks what would be found out only when the seed has been evaluated, or the trial has ended."""
    for name, value, method, example, or_none in (
        ("update_rule", update_rule, "theta", "SGD(lr=0.1)", ""),
        ("estimator", estimator, "estimate", "Greedy()", ", or None"),
        ("policy", policy, "n_outer_steps", "Always()", ""),
        ("artifact_store", store, "open_reader", "FileSystemArtifactStore('folder')", ", or None"),
    ):
        if or_none and value is None:
            continue
        if isinstance(value, type) or not hasattr(value, method):
            raise TypeError(f"{name} must be an object such as {example}{or_none}, but got {value!r}.")


def _described(options: DescentOptions) -> str:
    protocol = options.protocol
    if isinstance(protocol, Online):
        return f"Online(), {options.n_outer_steps} × {options.horizon} steps"
    return str(protocol)


def _keeps_weights(asked: bool | None, options: DescentOptions, artifact_store: ArtifactStore | None) -> bool:
    if asked and artifact_store is None:
        raise ValueError("keep_weights=True needs a place for the weights; give refine() an artifact_store.")
    return isinstance(options.protocol, Online) if asked is None else asked


def _checkpoint_every(
    asked: int | None, trial: BaseTrial, artifact_store: ArtifactStore | None, evaluate_every: int
) -> int:
    """The number of outer steps between two checkpoints; 0 for none."""
    if asked is None:
        known_when_dead = isinstance(trial, Trial) and heartbeat_interval(trial.storage) is not None
        return evaluate_every if artifact_store is not None and known_when_dead else 0
    if not isinstance(asked, int) or asked < 0:
        raise ValueError(f"checkpoint_every must be an integer of at least 0, or None, but got {asked!r}.")
    if asked > 0 and artifact_store is None:
        raise ValueError(f"checkpoint_every={asked} needs a place for checkpoints; give refine() an artifact_store.")
    return asked


def _maximizes(trial: BaseTrial, metric: str) -> bool:
    """Whether the study wants a large value."""
    study = trial.study if isinstance(trial, Trial) else None
    if study is None:
        return False
    if len(study.directions) != 1:
        raise ValueError(
            f"refine() needs a study with a single objective, but {study.study_name!r} has {len(study.directions)}; "
            "make one study for each, or combine the objectives in val_loss."
        )
    maximizes = study.direction == StudyDirection.MAXIMIZE
    if maximizes and metric == "loss":
        raise ValueError(
            f"The study {study.study_name!r} maximizes, but the trial's value would be a loss, which is minimized; "
            "create the study with direction='minimize', or name what to maximize: give BilevelProblem a metric, "
            "metrics={'accuracy': ...}, and refine() metric='accuracy'."
        )
    if not maximizes and isinstance(trial, Trial) and _is_usually_maximized(metric):
        warn_once(
            trial,
            f"the study {study.study_name!r} minimizes {metric!r}, of which more is better as a rule; if here, too, "
            "create the study with direction='maximize'.",
        )
    return maximizes


def _is_usually_maximized(metric: str) -> bool:
    words = metric.lower().split("_")
    return words[-1] in _SCORES and not _TURNED_ROUND.intersection(words)


def _reason_to_stop(trial: BaseTrial, step: OuterStep, until: int, deadline: float) -> str:
    """Why to end after the outer step just made; empty if there is no reason to."""
    if step.stopped is not None:
        return step.stopped
    if step.evaluation is not None and step.index >= until:
        return "policy"
    if step.evaluation is not None and outlast(trial.should_prune):
        return "pruned"
    # Study has no public way to tell that stop() was called. Out of optimize(), the flag is left from an earlier one.
    study = trial.study if isinstance(trial, Trial) else None
    if study is not None and study._thread_local.in_optimize_loop and study._stop_flag:
        return "study_stop"
    return "timeout" if time.perf_counter() >= deadline else ""


def _warn_of_lost_tensors(trial: BaseTrial, alpha: Alpha) -> None:
    names = sorted(set(alpha.hyperparameters) - set(alpha.scalars))
    if names and isinstance(trial, Trial):
        warn_once(
            trial,
            f"what {names} are refined to will not be kept, and best_value cannot be had again without it; give "
            "refine() an artifact_store.",
        )


def _warn_of_patient_pruner(trial: BaseTrial) -> None:
    if isinstance(trial, Trial) and isinstance(trial.study.pruner, PatientPruner):
        warnings.warn(
            "PatientPruner prunes when reports get worse, which those of refine() never do, as they are the best so "
            "far; give refine() a patience, and the study the pruner that PatientPruner wraps, if any.",
            stacklevel=4,
        )
