"""`python -m training.cli VERB key=value ...` is the same as `cascade VERB key=value ...`."""

from training.cli.main import program

program()
