"""The settings of a command, for programs and notebooks: the public names of `training.cli`."""
