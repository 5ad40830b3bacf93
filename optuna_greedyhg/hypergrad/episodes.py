"""Meta-learning: α is what many tasks share, and every outer step draws some of them.

    α* = argmin_α E_e[ L_val^e(w_T^e(α), α) ],      w_t^e = Φ(w_{t−1}^e, α) on episode e,  w_0^e = w_0

An *episode* is one task: the batches that it is trained on, and those that the trained weights are judged by. Model,
losses and w_0 are the same in all. With ``outer_parameters``, α may be layers of the model itself, which warp the loss
that the others are trained on (Flennerhag et al., "Meta-learning with warped gradient descent", ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from optuna_greedyhg.hypergrad.problem import BilevelProblem, Loss, Metric
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.trees import Tensors


class Episode(NamedTuple):
    """One task: a ``DataLoader``, a list of batches, or one full batch each to train on and to be judged by."""

    train_batches: Any
    val_batches: Any


class MetaProblem:
    """A distribution of episodes, to be given to ``descend`` or ``refine`` in place of a :class:`BilevelProblem`.

    Each outer step draws ``n_episodes``, trains every one of them from w_0 for a horizon, and moves α along the mean of
    their hypergradients. α is evaluated on episodes that are given: each is trained from w_0, for a horizon unless
    ``Retrain(n_steps)`` says otherwise, and what comes out is the mean of their scores. So nothing is carried from
    one outer step to the next: there is no online evaluation, and no estimator's memory of other episodes.

    Running greedy estimates, which are biased where a *single* training restarts, are not warned of here. What they
    descend along, the validation losses of all the steps with weights γ^(T−t), is an aim in its own right for learning
    from few steps (the multi-step loss of Antoniou et al., "How to train your MAML", ICLR 2019); the terminal variant
    looks at the last step alone.

    Args:
        model: As for :class:`BilevelProblem`, as are both losses, metrics, outer parameters, device and autocast.
        train_loss: ``(model, alpha, batch) -> L_train``.
        val_loss: ``(model, alpha, batch) -> L_val``.
        draw: Draws an episode with torch's global generator, which is seeded anew for each outer step: the same seed
            gives the same episodes, whatever α is.
        val_episodes: What α is evaluated on.
        test_episodes: Likewise; evaluated and recorded, never chosen by, and nobody's cost.
        n_episodes: Number of episodes in an outer step.
        metrics: Further scores by name, ``(model, alpha, batch) -> mean``.
        outer_parameters: The parameters of the model that are hyperparameters.
        product_mode: As for :class:`BilevelProblem`.
        device: Where to compute.
        autocast: The dtype of what tolerates it.
        cuda_graphs: Whether to record and replay, where episodes have batches of equal shapes.

    Raises:
        TypeError: If ``draw`` is not callable, or as :class:`BilevelProblem` does.
        ValueError: If ``n_episodes`` is less than 1, there are no validation episodes, or as above.
    """

    episodic = True

    def __init__(
        self,
        *,
        model: nn.Module,
        train_loss: Loss,
        val_loss: Loss,
        draw: Callable[[], Episode],
        val_episodes: Iterable[Episode],
        test_episodes: Iterable[Episode] = (),
        n_episodes: int = 1,
        metrics: Mapping[str, Metric] | None = None,
        outer_parameters: Sequence[str] = (),
        product_mode: ProductMode | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if not callable(draw):
            raise TypeError("draw must be a function without arguments that returns an Episode.")
        if n_episodes < 1:
            raise ValueError(f"n_episodes must be at least 1, but got {n_episodes}.")
        held_out = list(val_episodes)
        if not held_out:
            raise ValueError("val_episodes must hold at least one episode, on which α is evaluated, but it is empty.")
        train_batches, val_batches = held_out[0]
        first = BilevelProblem(
            model=model,
            train_loss=train_loss,
            val_loss=val_loss,
            train_batches=train_batches,
            val_batches=val_batches,
            metrics=metrics,
            outer_parameters=outer_parameters,
            product_mode=product_mode,
            device=device,
            autocast=autocast,
            cuda_graphs=cuda_graphs,
        )
        self.val_episodes = (first, *(first.with_batches(*episode) for episode in held_out[1:]))
        self.test_episodes = tuple(first.with_batches(*episode) for episode in test_episodes)
        self._draw = draw
        self._n_episodes = n_episodes

    @property
    def outer_parameters(self) -> Tensors:
        """The parameters that are hyperparameters, by name: where each starts."""
        return self.val_episodes[0].outer_parameters

    def draw_episodes(self) -> Sequence[BilevelProblem]:
        """The episodes of one outer step."""
        drawn = [self._draw() for _ in range(self._n_episodes)]  # all of them before any training draws from the seed
        return [self.val_episodes[0].with_batches(*episode) for episode in drawn]


Problem = BilevelProblem | MetaProblem
"""What can be descended on: its ``draw_episodes`` are what an outer step trains, its ``val_episodes`` what α is
evaluated on, and its ``test_episodes`` what it is tested on besides."""
