"""Signs of life of trials that were asked for by hand, for which Optuna gives none."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from typing import cast

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import Trial

from optuna_greedyhg.trials.checkpoints import heartbeat_interval


class Heartbeats:
    """Those of a study's running trials, if its storage wants any; by which others find out that a worker is dead.

    Args:
        study: The study.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._interval = heartbeat_interval(study._storage)  # of which a study has no public name
        self._last = time.monotonic()

    def beat(self, trials: Iterable[Trial]) -> None:
        """A sign of life of each."""
        if self._interval is not None:
            storage = cast(RDBStorage, self._study._storage)
            for trial in trials:
                storage.record_heartbeat(trial._trial_id)

    def beat_if_due(self, trials: Iterable[Trial]) -> None:
        """A sign of life of each, twice in an interval if it is called often enough."""
        if self._interval is not None and time.monotonic() - self._last >= self._interval / 2:
            self._last = time.monotonic()
            self.beat(trials)

    def fail_stale_trials(self) -> None:
        """Fails, and has others queue anew, the trials whose worker is dead, as every worker does before each trial."""
        if self._interval is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(self._study)
