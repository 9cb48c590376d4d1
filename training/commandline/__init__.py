"""The settings of a command, for programs and notebooks: the public part of `training.cli`."""
