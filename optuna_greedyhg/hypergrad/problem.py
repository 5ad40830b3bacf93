"""The bilevel problem: a model, the loss it is trained with, the loss it is judged by, and their batches.

    w*(α) = the weights after training on L_train(·, α)          α* = argmin_α L_val(w*(α), α)

Both losses are ordinary functions of ``(model, alpha, batch)``. ``model`` is called as the user's own module would be,
but computes with the *current* weights; ``alpha`` is a read-only mapping from names to tensors. Each returns a
0-dimensional tensor, the mean over the batch:

    def train_loss(model, alpha, batch):
        x, y, index = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (torch.sigmoid(alpha["example_logits"][index]) * losses).mean()

Parts of the model may be hyperparameters themselves (``outer_parameters``): training leaves them alone, and ``model``
computes with their values in ``alpha``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call

from optuna_greedyhg.hypergrad import batches, likeness, randomness, trees
from optuna_greedyhg.hypergrad.batches import Batch, Source, Stream
from optuna_greedyhg.hypergrad.devices import as_device
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.randomness import RandomState
from optuna_greedyhg.hypergrad.recordings import Recorder, cuda_recorder
from optuna_greedyhg.hypergrad.second_derivatives import PlainWeightNorm, has_lean_layers, has_weight_norm
from optuna_greedyhg.hypergrad.trees import Tensors

_NO_HOOKS = (
    "A model must be called without hooks on saved tensors, but there are some, as those of torch.utils.checkpoint: "
    "they would compute activations again by the module's own weights, and not by those of the training step. Call "
    "the module's parts directly; where memory is short, use BilevelProblem(product_mode=ProductMode.FORWARD)."
)


class _View:
    """What a :class:`Model` and its parts have alike: the names and the items of a part of the user's module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # nothing of the module's, and an endless search in an instance without a module
            raise AttributeError(name)
        return self._at(name)

    def __getitem__(self, key: int | str) -> Any:
        return self._at(_name_of(key, self._container))

    def __len__(self) -> int:
        return len(self._container)

    def __bool__(self) -> bool:  # a module without a length is true, too
        return True

    def __iter__(self) -> Iterator[Any]:
        """The parts, or the keys of a dictionary of them."""
        container = self._container
        if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
            return iter(container)
        return (self[key] for key in range(len(container)))

    def __contains__(self, key: object) -> bool:
        return key in self._container

    def _at(self, path: str) -> Any:
        """What is at a dotted path from here, with the given weights."""
        raise NotImplementedError

    @property
    def _container(self) -> Any:
        """The part of the user's own module, whose weights are others."""
        raise NotImplementedError


class Model(_View):
    """The user's module with given weights: called like the module, it computes with ``parameters`` and ``buffers``.

    So do the module's own methods (``model.encode(x)``), its parts (``model.head(x)``, ``model[0](x)``), their weights
    and properties. What ``nn.Module`` itself has, such as ``train()``, is not there.

    Buffers that a call updates (BatchNorm's running statistics) are replaced in ``buffers``, never written in place
    into the caller's tensors. The outer parameters are read from α when the model is called, and not before.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Tensors,
        buffers: Tensors,
        constants: Tensors,
        outer: Callable[[], Tensors],
        tied: bool,
    ) -> None:
        self._module = module
        self._tied = tied
        self._parameters = parameters
        self._constants = constants
        self._outer = outer
        self.buffers = trees.clone(buffers)  # in eval mode, too, where a part may have been left in training mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._computed(self._module, "", args, kwargs)

    @property
    def _container(self) -> Any:
        return self._module

    def _at(self, path: str) -> Any:
        name = path.rpartition(".")[2]
        if name != "forward" and callable(getattr(nn.Module, name, None)):
            raise AttributeError(
                f"A loss must take no {name!r} of the model, which is a view of the module with other weights: there "
                "are its forward pass, its own methods and parts, parameters() and named_parameters()."
            )
        if _is_module(self._module, path):  # then weights need not be put in yet
            return _Part(self, path)
        found = self._computed(_Getter(self._module), "module.", (path, None), {})
        return _Part(self, path) if callable(found) or isinstance(found, nn.Module) else found

    def _computed(self, module: nn.Module, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's output; ``prefix`` leads from it to the user's."""
        own = {**self._parameters, **self._constants, **self._outer(), **self.buffers}
        tensors = {prefix + name: x for name, x in own.items()} if prefix else own
        # To look for tied weights takes as long as a small layer does: it is done once, by the problem.
        with disable_saved_tensors_hooks(_NO_HOOKS):
            output = functional_call(module, tensors, args, kwargs, tie_weights=self._tied)
        self.buffers = {name: tensors[prefix + name] for name in self.buffers}  # some modules assign a buffer anew
        return output

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The current weights that training moves, by the names they have in the module; no outer parameters."""
        return iter(self._parameters.items())

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._parameters.values())

    @property
    def training(self) -> bool:
        return self._module.training


class _Part(_View):
    """A method or a part of the user's module, with the weights of a :class:`Model`."""

    def __init__(self, model: Model, path: str) -> None:
        self._model = model
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model
        result = model._computed(_Getter(model._module), "module.", (self._path, (args, kwargs)), {})
        many = result if isinstance(result, (list, tuple)) else [result]
        if any(isinstance(x, (nn.Module, Iterator, ValuesView, ItemsView)) for x in many):
            raise TypeError(
                f"A loss must take the model's parts one by one, as model.heads['a'], but model.{self._path}() returns "
                "them as they are, with other weights than those of the moment."
            )
        return result

    def _at(self, path: str) -> Any:
        return self._model._at(f"{self._path}.{path}")

    @property
    def _container(self) -> Any:
        return attrgetter(self._path)(self._model._module)


def _is_module(module: nn.Module, path: str) -> bool:
    """Whether a module stands there under its own name; no code of the user's runs to see it, as a property's would."""
    for name in path.split("."):
        child = None if hasattr(type(module), name) else module._modules.get(name)
        if child is None:
            return False
        module = child
    return True


def _name_of(key: int | str, container: Any) -> str:
    """What the part, or the parameter, under this key is called within its container."""
    part = container[key]
    for name, child in (*container.named_children(), *container.named_parameters(recurse=False)):
        if child is part:
            return str(name)
    raise TypeError(f"A loss must take one part of the model at a time, but asked for {key!r}; name each part.")


class _Getter(nn.Module):
    """Its forward pass gets, or calls, what is at a path of another module; that is all ``functional_call`` knows."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, path: str, call: tuple[tuple[Any, ...], dict[str, Any]] | None) -> Any:
        found = attrgetter(path)(self.module)
        return found if call is None else found(*call[0], **call[1])


Loss = Callable[[Model, Mapping[str, Tensor], Batch], Tensor]
Metric = Callable[[Model, Mapping[str, Tensor], Batch], Tensor]

_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class BilevelProblem:
    """Two losses, a model and two streams of batches; optionally a third split that is only ever looked at.

    The model's weights at construction are w_0, from which every training starts. The module itself is copied and
    never changed. Parameters with ``requires_grad=False`` stay as they are. The training loss sees the module in the
    mode it was handed over (normally ``train()``), everything else sees it in ``eval()``.

    Args:
        model: The module to train.
        train_loss: ``(model, alpha, batch) -> L_train``, a 0-dimensional tensor, differentiable twice. What it computes
            from the weights and then cuts off (``.detach()``, ``torch.no_grad()``) makes derivatives of its gradient
            that are not symmetric: products with B are right in reverse alone, those with A nowhere.
        val_loss: ``(model, alpha, batch) -> L_val``, a 0-dimensional tensor; also the loss reported on the test split.
        train_batches: A ``DataLoader``, a list, an endless iterator, or one full batch (a tensor, a dictionary, or a
            tuple of tensors).
        val_batches: Likewise, in batches of their own size: each validation gradient takes the next one, so a batch of
            a tenth of the training batch makes it cost a tenth. An evaluation passes over all of them.
        test_batches: Likewise; evaluated and recorded, never optimised.
        metrics: Further numbers to record on the validation and test splits: ``(model, alpha, batch) -> mean``.
        n_eval_batches: How many batches make an evaluation of a split; ``None`` means a whole pass.
        outer_parameters: Names of parameters, or of modules for all of theirs (``"1"`` or ``"1."``), that are
            hyperparameters: declare each in α under its name, starting from ``outer_parameters[name]``. They are not
            trained, whether they have ``requires_grad`` or not.
        product_mode: How the training loss is differentiated twice. By default in reverse, which is the fastest, or
            forward where an operator has no second derivative in reverse. Forward can be forced where memory is short,
            differences where an operator has neither.
        device: Where everything is computed; ``"auto"`` is a CUDA device if there is one. By default where the model's
            parameters are. A full batch is moved there once, other batches as they come: on CUDA from pinned memory,
            so that nobody waits for them.
        autocast: The dtype, normally ``torch.bfloat16``, in which the losses and metrics compute what tolerates it (see
            ``torch.autocast``). Weights, gradients, the optimizer's state, α and all that is summed up keep theirs.
        cuda_graphs: Whether horizons and trainings on a CUDA device are recorded as CUDA graphs and replayed, which
            makes small models several times as fast. For losses that do the same operations in every step, whatever
            the numbers: no ``if`` on a tensor, no counter, no random numbers but those of the GPU's own generator.
            What cannot be recorded goes on without, with a warning that says why. A problem keeps up to eight
            recordings, each with the batches of a horizon. No effect on other devices.

    Raises:
        TypeError: If a loss is not callable, batches cannot be iterated over, or ``outer_parameters`` is a string.
        ValueError: If the model has nothing to train, batches are empty, a metric is called ``"loss"``, a name in
            ``outer_parameters`` matches nothing, an iterator that may never end is given without
            ``n_eval_batches``, or there is no such device.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        train_loss: Loss,
        val_loss: Loss,
        train_batches: Any,
        val_batches: Any,
        test_batches: Any = None,
        metrics: Mapping[str, Metric] | None = None,
        n_eval_batches: int | None = None,
        outer_parameters: Sequence[str] = (),
        product_mode: ProductMode | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        if not callable(train_loss) or not callable(val_loss):
            raise TypeError("train_loss and val_loss must be functions of (model, alpha, batch).")
        if n_eval_batches is not None and n_eval_batches < 1:
            raise ValueError(f"n_eval_batches must be at least 1, or None for a whole pass, but got {n_eval_batches}.")
        if metrics and "loss" in metrics:
            raise ValueError("A metric must not be called 'loss': that is the name of val_loss itself. Rename it.")
        if device is not None:
            model = copy.deepcopy(model).to(as_device(device))
        outer = _names_of(model, outer_parameters)
        inner = {name: p for name, p in model.named_parameters() if name not in outer}
        if not any(p.requires_grad for p in inner.values()):
            raise ValueError(
                "The model must have a parameter outside of outer_parameters with requires_grad=True, but there is "
                "nothing to train."
            )

        self._train_module = copy.deepcopy(model)
        self._eval_module = copy.deepcopy(model).eval()
        self._tied = _has_tied(model)
        self._has_weight_norm = has_weight_norm(model)
        self.has_lean_layers = has_lean_layers(model)
        self._outer = trees.clone({name: p for name, p in model.named_parameters() if name in outer})
        self._constants = trees.clone({name: p for name, p in inner.items() if not p.requires_grad})
        self.initial_parameters = trees.clone({name: p for name, p in inner.items() if p.requires_grad})
        self.initial_buffers = trees.clone(dict(model.named_buffers()))

        self._train_loss = train_loss
        self._val_loss = val_loss
        self._metrics = dict(metrics or {})
        self.product_mode = product_mode
        self._autocast = autocast
        self.recorder: Recorder | None = (
            cuda_recorder(self.device) if cuda_graphs and self.device.type == "cuda" else None
        )
        self._set_batches(train_batches, val_batches, test_batches, n_eval_batches)

    def with_batches(self, train_batches: Any, val_batches: Any) -> BilevelProblem:
        """The same model, losses and metrics on other batches, without a test split."""
        other = copy.copy(self)
        other._set_batches(train_batches, val_batches, None, None)
        return other

    def _set_batches(self, train_batches: Any, val_batches: Any, test_batches: Any, n_eval_batches: int | None) -> None:
        self._train_source = batches.as_source(train_batches, "train_batches", self.device)
        self._val_source = batches.as_source(val_batches, "val_batches", self.device)
        self._val_set = batches.evaluation_set(self._val_source, "val_batches", n_eval_batches)
        self._kept: list[Batch] = []
        sources = [self._train_source, self._val_source]
        self._test_set: Source | None = None
        if test_batches is not None:
            sources.append(batches.as_source(test_batches, "test_batches", self.device))
            self._test_set = batches.evaluation_set(sources[-1], "test_batches", n_eval_batches)
        self._generators = list(dict.fromkeys(g for source in sources for g in batches.generators_of(source)))

    @property
    def episodic(self) -> bool:
        """Whether every outer step trains other episodes from w_0, instead of training on."""
        return False

    def draw_episodes(self) -> Sequence[BilevelProblem]:
        """What one outer step trains: the problem itself, again and again."""
        return (self,)

    @property
    def val_episodes(self) -> Sequence[BilevelProblem]:
        """What α is evaluated on: the problem itself."""
        return (self,)

    @property
    def test_episodes(self) -> Sequence[BilevelProblem]:
        """What α is tested on apart from that: nothing."""
        return ()

    @property
    def vectorized(self) -> bool:
        """Whether its losses are called under ``torch.vmap``, which not every function of autograd knows."""
        return False

    @property
    def outer_parameters(self) -> Tensors:
        """The parameters that are hyperparameters, by name: where each starts."""
        return dict(self._outer)

    @property
    def device(self) -> torch.device:
        return next(iter(self.initial_parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of α: float64 if the weights are, else float32, in which small steps of α are not lost."""
        return torch.float64 if next(iter(self.initial_parameters.values())).dtype == torch.float64 else torch.float32

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what an evaluation gives: ``"loss"`` and the user's metrics."""
        return ("loss", *self._metrics)

    def state_dict(self, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor] = _NOTHING) -> Tensors:
        """These weights under the names of the module's own ``state_dict``, for ``module.load_state_dict``.

        Args:
            parameters: The weights.
            buffers: The buffers.
            alpha: The values of α, of which the outer parameters are taken.
        """
        known = self._eval_module.state_dict()
        current = {**self._constants, **parameters, **self._outer_values(alpha), **buffers}
        first_name = {id(p): name for name, p in self._eval_module.named_parameters()}
        for name, p in self._eval_module.named_parameters(remove_duplicate=False):
            current[name] = current[first_name[id(p)]]  # tied weights have several names
        return {name: current.get(name, known[name]) for name in known}

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        """Within the block, dropout, augmentation and the order of batches are those of ``seed``."""
        return randomness.seeded(seed, self.device, self._generators)

    def random_state(self) -> RandomState:
        """The state of the generators that training may draw from."""
        return randomness.capture(self.device, self._generators)

    def restored(self, state: RandomState) -> AbstractContextManager[None]:
        """Within the block, these generators go on from a state that they, or an equal problem's, were in."""
        return randomness.restored(state, self.device, self._generators)

    def first_batches(self, n: int) -> Iterator[Batch]:
        """The first ``n`` training batches, the same each time; those of a one-shot iterator are kept in memory."""
        if not isinstance(self._train_source, Iterator):
            return islice(self.train_stream(), n)
        self._kept += islice(self.train_stream(), max(0, n - len(self._kept)))
        return iter(self._kept[:n])

    @property
    def has_fixed_batches(self) -> bool:
        """Whether no random number is ever drawn for a batch: they are in lists."""
        return isinstance(self._train_source, list) and isinstance(self._val_source, list)

    @property
    def n_kept_batches(self) -> int:
        """How many batches of a one-shot iterator ``first_batches`` has drawn, and keeps."""
        return len(self._kept)

    def train_stream(self) -> Stream:
        """A fresh endless stream over the training batches."""
        return Stream(self._train_source, "train_batches", pin=self.device.type == "cuda")

    def val_stream(self) -> Stream:
        """A fresh endless stream over the validation batches."""
        return Stream(self._val_source, "val_batches", pin=self.device.type == "cuda")

    def n_examples(self, batch: Batch) -> int:
        """The number of examples in a batch, in which costs are counted."""
        return batches.n_examples(batch)

    def train(
        self, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensors]:
        """``L_train(w, α)`` on one batch, and the buffers after it."""
        model = self._model(self._train_module, parameters, buffers, alpha)
        with self._precision(), PlainWeightNorm() if self._has_weight_norm else nullcontext():
            loss = _scalar(self._train_loss(model, alpha, batches.to_device(batch, self.device)), "train_loss")
        return loss.to(self.dtype), {name: buffer.detach() for name, buffer in model.buffers.items()}

    def validate(self, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """``L_val(w, α)`` on one batch."""
        model = self._model(self._eval_module, parameters, buffers, alpha)
        with self._precision():
            loss = _scalar(self._val_loss(model, alpha, batches.to_device(batch, self.device)), "val_loss")
        return loss.to(self.dtype)

    def evaluate(
        self, split: str, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], int]:
        """The loss and the metrics on the ``"val"`` or ``"test"`` split, without gradients.

        Returns:
            The means over the split's examples by name, and the number of examples seen; nothing and 0 where the
            problem has no such split.
        """
        source = {"val": self._val_set, "test": self._test_set}[split]
        if source is None:
            return {}, 0
        functions = {"loss": self._val_loss, **self._metrics}
        sums: dict[str, Tensor | float] = dict.fromkeys(functions, 0.0)
        count = 0
        with torch.no_grad(), self._precision():
            model = self._model(self._eval_module, parameters, buffers, alpha)
            for batch in source:
                n = batches.n_examples(batch)
                on_device = batches.to_device(batch, self.device)
                for name, function in functions.items():
                    value = function(model, alpha, on_device)
                    if name == "loss" or not isinstance(value, (int, float)):  # a metric may be a plain number
                        value = _scalar(value, "val_loss" if name == "loss" else f"The metric {name!r}").to(self.dtype)
                    sums[name] = sums[name] + n * value
                count += n
        if count == 0:
            raise RuntimeError(
                f"{split}_batches ended before the first batch; pass something that can be iterated over again."
            )
        return {name: float(total) / count for name, total in sums.items()}, count

    def unlike(self, other: BilevelProblem) -> str:
        """What it computes otherwise than another problem, in words; empty if that is nothing.

        Apart from their batches, initial weights, initial buffers, and metrics, two alike problems are the same.
        """
        kinds: dict[str, list[Any]] = {
            "parameters": [_kinds(problem.initial_parameters) for problem in (self, other)],
            "buffers": [_kinds(problem.initial_buffers) for problem in (self, other)],
            "outer parameters": [_kinds(problem._outer) for problem in (self, other)],
            "products' modes": [problem.product_mode for problem in (self, other)],
        }
        for what, (own, others) in kinds.items():
            if own != others:
                return f"its {what} are {own}, and not {others}"
        pairs = {
            "frozen part": (self._constants, other._constants),
            "module": (self._train_module, other._train_module),
            "train_loss": (self._train_loss, other._train_loss),
            "val_loss": (self._val_loss, other._val_loss),
        }
        found = [f"its {what} {why}" for what, pair in pairs.items() if (why := likeness.difference(*pair))]
        return "; ".join(found)

    def require_outer_parameters(self, hyperparameters: Mapping[str, Hyperparameter]) -> None:
        """Raises ``ValueError`` if an outer parameter is missing among these, or has another shape."""
        for name, x in self._outer.items():
            if name not in hyperparameters:
                raise ValueError(
                    f"The outer parameter {name!r} must be a hyperparameter of this name, but there are only "
                    f"{sorted(hyperparameters)}; declare all of problem.outer_parameters."
                )
            if hyperparameters[name].init.shape != x.shape:
                raise ValueError(
                    f"The hyperparameter {name!r} must have the outer parameter's shape {tuple(x.shape)}, but has "
                    f"{tuple(hyperparameters[name].init.shape)}."
                )

    def _model(self, module: nn.Module, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor]) -> Model:
        return Model(module, parameters, buffers, self._constants, lambda: self._outer_values(alpha), self._tied)

    def _precision(self) -> AbstractContextManager[object]:
        return nullcontext() if self._autocast is None else torch.autocast(self.device.type, self._autocast)

    def _outer_values(self, alpha: Mapping[str, Tensor]) -> Tensors:
        return {name: alpha[name].to(x.dtype) for name, x in self._outer.items()}  # α is float32 at least


def _names_of(module: nn.Module, chosen: Sequence[str]) -> frozenset[str]:
    """The parameters' own names that these names, or names of modules, stand for; tied weights have several."""
    if isinstance(chosen, str):
        raise TypeError(f"outer_parameters must be a list of names, but got the string {chosen!r}; put it in a list.")
    own_name = {id(p): name for name, p in module.named_parameters()}
    names = {name: own_name[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    found: set[str] = set()
    for wanted in chosen:
        prefix = wanted.removesuffix(".") + "."
        matching = {own for name, own in names.items() if name == wanted or name.startswith(prefix)}
        if not matching:
            raise ValueError(
                f"outer_parameters must name parameters or modules of the model, but {wanted!r} matches none of "
                f"{list(names)}."
            )
        found |= matching
    return frozenset(found)


def _has_tied(module: nn.Module) -> bool:
    """Whether a parameter or buffer has several names."""
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    tensors = [x for tree in named for _, x in tree]
    return len({id(x) for x in tensors}) < len(tensors)


def _kinds(tree: Tensors) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)} on {x.device}" for name, x in tree.items()}


def _scalar(loss: Any, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name} must return a 0-dimensional tensor, but got {got}; take the mean over the batch.")
    return loss
