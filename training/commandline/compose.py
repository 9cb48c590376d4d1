"""`load_config(verb, ["experiment=demo", "train.steps=50"])` returns the settings that a command would run with."""

from training.cli.compose import load_config

__all__ = ["load_config"]
