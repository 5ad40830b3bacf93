"""How commands open a storage, and what a person sees of Optuna meanwhile."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
import typer
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Says in one line what a storage finds wrong; SQLAlchemy, its drivers and Optuna each raise their own."""
    try:
        yield
    except (typer.TyperException, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        named = "in memory" if url is None else repr(shown(url))
        raise typer.BadParameter(f"cannot use the storage {named}: {reason}", param_hint="--storage") from error


def open_storage(url: str | None) -> BaseStorage:
    """The storage at a URL, by default in memory."""
    return InMemoryStorage() if url is None else RDBStorage(url)


@contextmanager
def optuna_silenced() -> Iterator[None]:
    """Keeps Optuna's line a trial from tearing the progress bar, and the traceback of a Ctrl-C from being a message."""

    def is_no_interrupt(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], KeyboardInterrupt))

    handlers = logging.getLogger("optuna").handlers
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for handler in handlers:
        handler.addFilter(is_no_interrupt)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        for handler in handlers:
            handler.removeFilter(is_no_interrupt)


def shown(url: str) -> str:
    """The URL of a storage, without its password, also where it is none, or its password is in the query."""
    try:
        url = make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):  # the latter of a port that is no number
        url = re.sub(r":[^:/@]*@", ":***@", url)
    return re.sub(r"(?i)([?&](?:password|passwd|pwd)=)[^&]*", r"\1***", url)
