"""Checkpoints: a refinement survives the death of its process.

A storage with heartbeats finds out that a worker is dead, and ``RetryHeartbeatStaleTrialCallback`` queues its trial
anew, with all its attributes. One of them, a system attribute, says where the refinement stands:

    greedyhg:checkpoint     {"artifact": id, "sha256": digest, "leftovers": [id, ...]}
                            {"ended": number} when the trial of this number has ended, and there is none any more

The artifact is a file of ``torch.save``, ``{"version": 1, "signature": {...}, "content": {...}}``, which is loaded with
``weights_only=True``. One is replaced by the next in this order:

    write b;    artifact a → b, leftovers b → a, c, in one write of the attribute;    remove a

So a kill at any moment leaves a whole one, or none before the first. What may be there and is not the checkpoint, the
one before it and the one being written, is always among the leftovers, and whoever goes on with the trial removes them.
A name is used once, so that a worker that was only taken for dead writes nothing into the files of its successor.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, FrozenTrial, Trial
from torch import Tensor
from torch.serialization import default_restore_location

from optuna_greedyhg.trials.outages import outlast
from optuna_greedyhg.trials.records import ArtifactStore
from optuna_greedyhg.trials.signatures import Signature, difference

PREFIX = "greedyhg-checkpoint-"
_ATTRIBUTE = "greedyhg:checkpoint"
_ENDED = "ended"
_VERSION = 1

_logger = logging.getLogger("optuna.greedyhg")


class Checkpoints:
    """The checkpoints of one trial: one at a time, and none once the trial has ended.

    Args:
        trial: A running trial. One without a storage has no checkpoints.
        store: Where they are kept, if anywhere.
        every: Number of outer steps from one to the next; 0 makes none.
        signature: Of the refinement.
        device: Where it is computed.
    """

    def __init__(
        self, trial: BaseTrial, store: ArtifactStore | None, every: int, signature: Signature, device: torch.device
    ) -> None:
        self._trial = trial
        self._store = store
        self._every = every if isinstance(trial, Trial) and store is not None else 0
        self._signature = signature
        self._device = device
        self._current: str | None = None
        self._sha256: str | None = None
        self._leftovers: list[str] = []
        self._next = _new_name()
        self._noted = False

    def load(self, trial: FrozenTrial) -> dict[str, Any] | None:
        """What ``save`` was last given for this trial, in whichever process; ``None`` to start over, logged if in vain.

        Tensors come back on the CPU if they were there, and else on the device of the refinement.

        Args:
            trial: The trial as its storage has it.
        """
        noted = trial.system_attrs.get(_ATTRIBUTE)
        found = None if noted is None or _ENDED in noted else noted  # a trial may die when it has all but ended
        if self._store is None:
            if found is not None:
                self._warn_of_refusal("it is in an artifact store, and none was given")
            return None
        content: dict[str, Any] | None = None
        if found is not None:
            self._current, self._sha256, self._leftovers = found["artifact"], found["sha256"], found["leftovers"]
            content = self._content()
            if content is None:
                self._abandon()
        if noted is not None or self._every > 0:
            self._note()
        self._remove_leftovers()
        return content

    def is_due(self, outer_step: int) -> bool:
        """Whether there is to be one after this outer step."""
        return self._every > 0 and outer_step % self._every == 0

    def save(self, content: Mapping[str, Any]) -> None:
        """Replaces the checkpoint by another.

        A store that fails costs the checkpoint, not the trial: it is logged, and the one before it stays.

        Args:
            content: Made of tensors, numbers, strings, ``None``, and tuples, lists and dictionaries of these.

        Raises:
            UpdateFinishedTrialError: If the trial was ended by somebody else, who took this worker for dead.
        """
        try:
            sha256 = self._write(content)
        except Exception as error:  # whatever a store may raise: full, read-only, unreachable
            _logger.warning(f"Trial {self._trial.number}: a checkpoint could not be stored, and is lost: {error!r}")
            return
        written = self._next
        self._abandon()
        self._current, self._sha256, self._next = written, sha256, _new_name()
        try:
            self._note()
        except UpdateFinishedTrialError:
            self._remove(written)  # all else belongs to the trial's successor
            raise
        self._remove_leftovers()

    def remove(self) -> None:
        """Removes all that there is, when the trial has ended in a way that nobody goes on from.

        Raises:
            UpdateFinishedTrialError: If the trial was ended by somebody else; then nothing is removed.
        """
        if self._noted:
            self._abandon()
            self._note()  # if this fails, the checkpoint may be needed yet
            self._leftovers.append(self._next)
            self._remove_leftovers()
            self._set_attribute({_ENDED: self._trial.number})

    def _abandon(self) -> None:
        if self._current is not None:
            self._leftovers.append(self._current)
        self._current = self._sha256 = None

    def _note(self) -> None:
        leftovers = [*self._leftovers, self._next]
        self._set_attribute({"artifact": self._current, "sha256": self._sha256, "leftovers": leftovers})
        self._noted = True

    def _set_attribute(self, value: Mapping[str, Any]) -> None:
        assert isinstance(self._trial, Trial)  # it has had a store
        outlast(self._trial.storage.set_trial_system_attr, self._trial._trial_id, _ATTRIBUTE, value)

    def _write(self, content: Mapping[str, Any]) -> str:
        """Writes the next file, and returns its digest."""
        assert self._store is not None
        whole = {"version": _VERSION, "signature": self._signature, "content": _compact(content)}
        with tempfile.TemporaryFile() as file:  # has no name, so that a kill leaves nothing of it
            torch.save(whole, file)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._store.write(self._next, cast(BinaryIO, file))
        return sha256

    def _content(self) -> dict[str, Any] | None:
        if self._current is None:
            return None  # it died before the first
        try:
            whole = outlast(self._read)
        except Exception as error:  # whatever a store may raise, and what a torn file may be taken for
            self._warn_of_refusal(f"it cannot be read: {error!r}")
            return None
        if whole.get("version") != _VERSION:
            self._warn_of_refusal(f"it has format version {whole.get('version')}, and this release reads {_VERSION}")
            return None
        if why := difference(whole["signature"], self._signature):
            self._warn_of_refusal(why)
            return None
        content: dict[str, Any] = whole["content"]
        return content

    def _read(self) -> dict[str, Any]:
        assert self._store is not None
        assert self._current is not None
        with tempfile.TemporaryFile() as file:
            with self._store.open_reader(self._current) as reader:
                shutil.copyfileobj(reader, file)
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != self._sha256:
                raise ValueError("it is not what was written")
            file.seek(0)
            whole: dict[str, Any] = torch.load(file, map_location=self._restore, weights_only=True)
        return whole

    def _restore(self, storage: Any, location: str) -> Any:
        # Random states stay on the CPU, on whatever device the weights are.
        target = "cpu" if location == "cpu" else str(self._device)
        return default_restore_location(storage, target)  # type: ignore[no-untyped-call]

    def _remove_leftovers(self) -> None:
        for artifact in self._leftovers:
            self._remove(artifact)
        self._leftovers = []

    def _remove(self, artifact: str) -> None:
        assert self._store is not None
        _remove(self._store, artifact, self._trial.number)

    def _warn_of_refusal(self, why: str) -> None:
        _logger.warning(f"Trial {self._trial.number}: its checkpoint is refused, and it starts over: {why}.")


def heartbeat_interval(storage: BaseStorage) -> int | None:
    """The seconds between two signs of life of a trial, by which others find out that its worker is dead."""
    # The class that storages with heartbeats share has no public name.
    get_interval = getattr(storage, "get_heartbeat_interval", None)
    return None if get_interval is None else get_interval()


def is_unfinished(trial: FrozenTrial) -> bool:
    """Whether a trial has been refined with checkpoints, and not come to an end of it.

    Neither has one that was queued in place of such a trial, even if it has not begun, or if that had all but ended.
    """
    return trial.system_attrs.get(_ATTRIBUTE) not in (None, {_ENDED: trial.number})


def remove_checkpoints(trial: FrozenTrial, store: ArtifactStore) -> None:
    """Removes what a trial that is not to be gone on with has left in a store."""
    noted = trial.system_attrs.get(_ATTRIBUTE, {})
    for artifact in (noted.get("artifact"), *noted.get("leftovers", ())):
        if artifact is not None:
            _remove(store, artifact, trial.number)


def _remove(store: ArtifactStore, artifact: str, number: int) -> None:
    try:
        store.remove(artifact)
    except Exception as error:  # whatever a store may raise
        if "NotFound" not in type(error).__name__:  # not all stores say so with Optuna's ArtifactNotFound
            _logger.warning(f"Trial {number}: {artifact} is of no use, but stays: {error!r}")


def _new_name() -> str:
    return PREFIX + str(uuid.uuid4())


def _compact(content: Any) -> Any:
    """The same, without what else is in its tensors' memory: with a slice of the data, all of them would be written."""
    if isinstance(content, Tensor):
        is_part = content.is_contiguous() and content.untyped_storage().nbytes() > content.nbytes
        return content.clone() if is_part else content
    if isinstance(content, Mapping):
        return {key: _compact(item) for key, item in content.items()}
    if type(content) in (tuple, list):
        return type(content)(_compact(item) for item in content)
    return content
