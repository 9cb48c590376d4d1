"""`python -m cascade_t2i VERB key=value ...` is `cascade VERB key=value ...`."""

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]

# `python -m` searches the working directory first, and PYTHONPATH comes before a checkout that is installed in place:
# a queue.py or a training/ there is not ours. Children of multiprocessing, which run this again, start with our path.
if not sys.flags.safe_path and "__mp_main__" not in sys.modules:
    del sys.path[0]
if not Path(__file__).with_name("training").is_dir():  # a checkout, not a wheel
    sys.path.insert(0, str(HOME))

try:
    from training.cli.main import program
except KeyboardInterrupt:  # Ctrl-C while Python imports the command line: nothing has begun
    raise SystemExit(130) from None

if __name__ == "__main__":
    program()
