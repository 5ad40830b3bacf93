"""The command line: ``greedyhg demo``, ``run``, ``audit``, ``compare``, ``report``, ``tasks``."""

from optuna_greedyhg.cli.commands import main

__all__ = ["main"]
