"""Warnings in Optuna's log that concern a study, and need not be said again in each of its trials."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from optuna.storages import BaseStorage
from optuna.trial import Trial

_logger = logging.getLogger("optuna.greedyhg")

_said: WeakKeyDictionary[BaseStorage, set[tuple[str, str]]] = WeakKeyDictionary()


def warn_once(trial: Trial, message: str) -> None:
    """Logs a warning in the first trial of a study, in this process, that has reason to."""
    said = _said.setdefault(trial.storage, set())
    if (trial.study.study_name, message) not in said:
        said.add((trial.study.study_name, message))
        _logger.warning(f"Trial {trial.number}: {message}")
