"""All that is written to a trial, and how it is read back.

User attributes, flat so that the dashboard can sort by them; a number that is not finite is written as ``None``:

    seed_<name>, refined_<name>     the scalars of α before and after refinement
    val_<metric>, test_<metric>     the best α's scores; ``loss`` and the problem's metrics
    cost_n_train_gradients, cost_n_val_gradients, cost_n_products, cost_n_evaluations   in examples
    cost_seconds                    wall-clock time inside ``refine``
    best_outer_step, n_outer_steps, stopped     where the best α was found, how far it went, and why it ended
    product_mode                    how the training loss was differentiated twice; ``None`` if it was not
    policy, refined                 what has decided whether to refine the trial, and whether it was to be: a bool
    resumed_from                    the outer step from which a retried trial has gone on; ``None`` if it started over
    inherited_from                  the number of the trial that tensors were inherited from, ``None`` if it was in vain
    estimator, protocol             what it was done with, and how its value was made
    tensors, tensors_artifact       the names of α's tensors, and the id of the artifact that holds them

The trajectory, which plots are made of, is a *system* attribute: it would make a page of the dashboard very wide. So
are the improvements, which say what had been found at what cost, the ranges that seeds were drawn from, until they are
those of the trial's parameters, and where the checkpoint is (see ``checkpoints``).

Tensors are too large for a storage's attributes. They go to an artifact, a file of ``torch.save`` that is loaded with
``weights_only=True``: ``{"version": 1, "seed": {name: tensor}, "refined": {...}, "weights": {...}}``; the weights are
there if they are the result (``evaluate="online"``).
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from optuna.artifacts import _protocol, download_artifact, upload_artifact
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json, json_to_distribution
from optuna.trial import BaseTrial, FrozenTrial, Trial
from torch import Tensor

from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.evaluation import Evaluation
from optuna_greedyhg.trials.outages import outlast

# Optuna has no public name for what all artifact stores have in common.
ArtifactStore = _protocol.ArtifactStore

SEED, REFINED, COST = "seed_", "refined_", "cost_"
INHERITED_FROM, RESUMED_FROM = "inherited_from", "resumed_from"
TRAJECTORY_COLUMNS = ("outer_step", "value", "val_loss", "hypergradient_norm")
_TRAJECTORY = "greedyhg:trajectory"
_IMPROVEMENTS = "greedyhg:improvements"
_RANGE = "greedyhg:range:"
_TENSORS, _TENSORS_ARTIFACT = "tensors", "tensors_artifact"
_VERSION = 1
_QUANTILES = (0.1, 0.5, 0.9)
_TRAJECTORY_LENGTH = 100
_SAMPLE = 100_000
_READ_AT_ONCE = 10  # outer steps: each reading waits for the device

Row = dict[str, float | None]

_logger = logging.getLogger("optuna.greedyhg")

# The stores that this process has written to, by artifact, so that what a script has stored it can read back without
# saying again where. They are not kept alive by it.
_stores: WeakValueDictionary[str, Any] = WeakValueDictionary()


def write(trial: BaseTrial, attributes: Mapping[str, Any]) -> None:
    """Writes user attributes: numbers, strings, and lists of them."""
    for key, value in attributes.items():
        outlast(trial.set_user_attr, key, plain(value))


def plain(value: Any) -> Any:
    """The value as every storage and every reader of JSON takes it: NaN and infinities become ``None``."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_seed(trial: BaseTrial, name: str, seed: float, distribution: FloatDistribution) -> None:
    """Writes one seed, as soon as it is drawn: a retry of the trial starts from it, and parallel ones can avoid it."""
    if isinstance(trial, Trial):
        # Nobody else would know it before the parameter is written.
        described = distribution_to_json(distribution)
        outlast(trial.storage.set_trial_system_attr, trial._trial_id, _RANGE + name, described)
    outlast(trial.set_user_attr, SEED + name, seed)


def read_seed(trial: BaseTrial, name: str) -> float | None:
    """The seed that a trial was enqueued or retried with; ``None`` if there is none."""
    seed = trial.user_attrs.get(SEED + name)
    return float(seed) if isinstance(seed, (int, float)) and not isinstance(seed, bool) else None


def read_seeds(trial: FrozenTrial) -> dict[str, tuple[float, BaseDistribution]]:
    """The seeds of a trial by name, each with what it was drawn from; also those that are not parameters yet."""
    written = {key.removeprefix(_RANGE): value for key, value in trial.system_attrs.items() if key.startswith(_RANGE)}
    unwritten = {name: json_to_distribution(x) for name, x in written.items() if name not in trial.distributions}
    seeds: dict[str, tuple[float, BaseDistribution]] = {}
    for name, distribution in {**trial.distributions, **unwritten}.items():
        seed = read_seed(trial, name)
        # A user's own attribute may have such a name.
        if (
            seed is not None
            and isinstance(distribution, FloatDistribution)
            and distribution.low <= seed <= distribution.high
        ):
            seeds[name] = seed, distribution
    return seeds


def cost_of(trial: FrozenTrial) -> Cost:
    """What a trial has cost; nothing, if it recorded no cost."""
    return Cost(**{f.name: trial.user_attrs.get(COST + f.name, 0) for f in fields(Cost)})


def was_refined(trial: FrozenTrial) -> bool:
    """Whether a trial was refined, and not only valued at its seed."""
    return trial.user_attrs.get("refined") is True


class Trajectory:
    """What every outer step has left behind, as columns that fit into one attribute.

    Columns are ``outer_step``, ``value`` (``None`` on steps that were not evaluated), ``val_loss`` and
    ``hypergradient_norm`` of the descent itself, one for each scalar of α, and the 10, 50 and 90% quantiles of each of
    its tensors, ``<name>.q10``. Long descents are thinned to two hundred steps at most, huge tensors to a sample.
    """

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = list(rows)
        self._unread: list[Mapping[str, Tensor]] = []  # α of the last rows, whose columns are still to come

    @property
    def rows(self) -> list[Row]:
        """All outer steps, from which it can be made again."""
        self._read()
        return list(self._rows)

    def append(
        self,
        outer_step: int,
        value: float | None,
        alpha: Mapping[str, Tensor],
        *,
        val_loss: float,
        hypergradient_norm: float,
    ) -> None:
        """One more outer step."""
        numbers = (outer_step, value, val_loss, hypergradient_norm)
        self._rows.append(dict(zip(TRAJECTORY_COLUMNS, numbers, strict=True)))
        self._unread.append({name: _sampled(x) for name, x in alpha.items()})
        if len(self._unread) == _READ_AT_ONCE:
            self._read()

    def _read(self) -> None:
        if not self._unread:
            return
        rows = self._rows[-len(self._unread) :]
        for name in self._unread[0]:
            device = self._unread[-1][name].device  # the seed is where it was declared
            of_steps = torch.stack([alpha[name].to(device) for alpha in self._unread])
            columns: dict[str, Tensor] = {}
            if of_steps.ndim == 1:
                columns = {name: of_steps}
            elif of_steps.numel() > 0:
                entries = of_steps.double()
                quantiles = torch.quantile(entries, entries.new_tensor(_QUANTILES), dim=1)
                columns = {f"{name}.q{100 * q:.0f}": x for q, x in zip(_QUANTILES, quantiles, strict=True)}
            for key, column in columns.items():
                for row, number in zip(rows, column.tolist(), strict=True):
                    row[key] = number
        self._unread.clear()

    def columns(self) -> dict[str, list[float | None]]:
        every = self.rows
        evaluated = _thinned([k for k, row in enumerate(every) if row["value"] is not None])
        rows = [every[k] for k in sorted({*evaluated, *_thinned(range(len(every)))})]
        return {key: [_six_digits(row[key]) for row in rows] for key in (rows[0] if rows else {})}


def write_trajectory(trial: BaseTrial, trajectory: Trajectory) -> None:
    """Writes the columns. A trial without a storage keeps none, and one whose storage finds them too long neither."""
    _write_hidden(trial, _TRAJECTORY, trajectory.columns(), "trajectory")


def read_trajectory(trial: FrozenTrial) -> Any:
    """What ``write_trajectory`` has written; ``None`` if nothing."""
    return trial.system_attrs.get(_TRAJECTORY)


def improvement(outer_step: int, best: Evaluation, cost: Cost, seconds: float) -> Row:
    """What a trial had found, and what it had spent, when an evaluation was its best so far."""
    return {
        "outer_step": outer_step,
        "seconds": seconds,
        **asdict(cost),
        **{f"val_{name}": score for name, score in best.scores.items()},
        **{f"test_{name}": score for name, score in best.test_scores.items()},
    }


def write_improvements(trial: BaseTrial, improvements: Sequence[Row]) -> None:
    """Writes them, each a row of :func:`improvement`, in their order; a hundred at most, the first and the last among
    them. The numbers are not rounded."""
    kept = [improvements[k] for k in _thinned(range(len(improvements)))]
    _write_hidden(trial, _IMPROVEMENTS, plain(kept), "improvements")


def read_improvements(trial: FrozenTrial) -> list[Row]:
    """What ``write_improvements`` has written; nothing, if nothing."""
    rows: list[Row] = trial.system_attrs.get(_IMPROVEMENTS, [])
    return rows


def _write_hidden(trial: BaseTrial, key: str, content: Any, what: str) -> None:
    if not isinstance(trial, Trial):
        return
    try:
        # As Optuna's own artifacts and the dashboard's notes do; Trial has no public way to its system attributes.
        outlast(trial.storage.set_trial_system_attr, trial._trial_id, key, content)
    except Exception as error:  # whatever a database may raise
        _logger.warning(f"Trial {trial.number}: its {what} could not be stored, and is lost: {error!r}")


def write_tensors(
    trial: BaseTrial,
    artifact_store: ArtifactStore | None,
    *,
    seed: Mapping[str, Tensor],
    refined: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> None:
    """Writes α's tensors, and the weights if they are the result, to an artifact of the trial.

    A store that fails costs the tensors, not the trial: it is logged, and the trial goes on.
    """
    if refined:
        write(trial, {_TENSORS: list(refined)})
    if artifact_store is None or not isinstance(trial, Trial) or not (refined or weights):
        return
    content = {"version": _VERSION, "seed": _on_cpu(seed), "refined": _on_cpu(refined), "weights": _on_cpu(weights)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tensors.pt"
            torch.save(content, path)
            artifact = outlast(
                upload_artifact,
                artifact_store=artifact_store,
                file_path=str(path),
                study_or_trial=trial,
                mimetype="application/octet-stream",
            )
    except Exception as error:  # whatever a store may raise: full, read-only, unreachable
        _logger.warning(f"Trial {trial.number}: its tensors could not be stored, and are lost: {error!r}")
        return
    write(trial, {_TENSORS_ARTIFACT: artifact})
    _stores[artifact] = artifact_store


def refined_params(trial: FrozenTrial, artifact_store: ArtifactStore | None = None) -> dict[str, float | Tensor]:
    """The refined hyperparameters of a trial by name: numbers for the scalars, CPU tensors for the tensors.

    Args:
        trial: A trial that :func:`refine` has worked on, for example ``study.best_trial``.
        artifact_store: The store that its tensors were written to; not needed in the process that wrote them.

    Raises:
        ValueError: If the trial was never refined, or its tensors are in a store that was not given.
    """
    params: dict[str, float | Tensor] = {
        key.removeprefix(REFINED): value for key, value in trial.user_attrs.items() if key.startswith(REFINED)
    }
    names = trial.user_attrs.get(_TENSORS, [])
    if not params and not names:
        raise ValueError(
            f"Trial {trial.number} has no refined hyperparameters; was its objective's value made by refine()?"
        )
    if not names:
        return params
    if _TENSORS_ARTIFACT not in trial.user_attrs:
        warnings.warn(
            f"The tensors {names} of trial {trial.number} were not stored, and are left out; give refine() an "
            "artifact_store to keep them.",
            stacklevel=2,
        )
        return params
    return params | _load(trial, artifact_store)["refined"]


def refined_weights(trial: FrozenTrial, artifact_store: ArtifactStore | None = None) -> dict[str, Tensor]:
    """The weights that have earned a trial its value, as a ``state_dict`` of CPU tensors.

    They are kept with an artifact store, and ``evaluate="online"`` or ``keep_weights=True``.

    Args:
        trial: A finished trial.
        artifact_store: The store that they were written to; not needed in the process that wrote them.

    Raises:
        ValueError: If the trial has none, or they are in a store that was not given.
    """
    weights = _load(trial, artifact_store)["weights"] if _TENSORS_ARTIFACT in trial.user_attrs else {}
    if not weights:
        raise ValueError(
            f"Trial {trial.number} has no stored weights; give refine() an artifact_store, and keep_weights=True or "
            "evaluate='online'."
        )
    return weights


def read_tensors(trial: FrozenTrial, artifact_store: ArtifactStore) -> dict[str, Tensor]:
    """The refined tensors of a trial by name, on the CPU; none, if it has stored none."""
    return _load(trial, artifact_store)["refined"] if _TENSORS_ARTIFACT in trial.user_attrs else {}


def _load(trial: FrozenTrial, artifact_store: ArtifactStore | None) -> dict[str, dict[str, Tensor]]:
    artifact = trial.user_attrs[_TENSORS_ARTIFACT]
    store = artifact_store or _stores.get(artifact)
    if store is None:
        raise ValueError(
            f"The tensors of trial {trial.number} are in an artifact store; say which with artifact_store=..."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.pt"
        download_artifact(artifact_store=store, file_path=str(path), artifact_id=artifact)
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if content.get("version") != _VERSION:
        raise ValueError(
            f"The tensors of trial {trial.number} have format version {content.get('version')}, but this release "
            f"reads version {_VERSION}."
        )
    return content


def _sampled(x: Tensor) -> Tensor:
    """The number, or some of the entries, as they are now."""
    return (x if x.ndim == 0 else x.flatten()[:: 1 + x.numel() // _SAMPLE]).detach().clone()


def _thinned(indices: Sequence[int]) -> Sequence[int]:
    """At most ``_TRAJECTORY_LENGTH`` of them, evenly, the first and the last among them."""
    n = len(indices)
    if n <= _TRAJECTORY_LENGTH:
        return indices
    return [indices[round(i * (n - 1) / (_TRAJECTORY_LENGTH - 1))] for i in range(_TRAJECTORY_LENGTH)]


def _six_digits(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().clone() for name, x in tensors.items()}
