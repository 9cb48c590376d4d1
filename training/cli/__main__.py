"""`python -m training.cli VERB key=value ...` is `cascade VERB key=value ...`."""

from training.cli.main import program

program()
