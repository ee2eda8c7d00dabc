"""``lambdapo compare``: does an estimator, or a setting, help on your task? Runs, statistics, tables and plots."""

from lightning_lambdapo.commands.compare.command import main

__all__ = ["main"]
