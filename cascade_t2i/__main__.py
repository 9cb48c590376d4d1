"""`python -m cascade_t2i VERB key=value ...` is `cascade VERB key=value ...`."""

from training.cli.main import program

if __name__ == "__main__":
    program()
