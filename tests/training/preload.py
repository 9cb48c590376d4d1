"""What the server of tests/training/forks.py imports once."""

import torch

import training.run.session
import training.train
from training.engine.deepspeed import import_deepspeed

torch.set_num_threads(1)
import_deepspeed()
__all__ = ["training"]
