"""The command line. Each command imports the heavy libraries that it needs, so that `--help` is quick."""

from rayml.cli import training  # each module adds its commands, in the order of `--help`

# isort: split
from rayml.cli import learning

# isort: split
from rayml.cli import data, deploy, quickstart, store
from rayml.cli.app import app, main

__all__ = ["app", "data", "deploy", "learning", "main", "quickstart", "store", "training"]
