"""What the server of tests/training/forks.py imports once: what the ranks of a run would import each."""

import gc
import importlib

import botocore.session
import torch

import tests.s3
import training.run.session
import training.train
from training.cli.compose import load_config
from training.engine.deepspeed import import_deepspeed

NOWHERE = {"region_name": "us-east-1", "aws_access_key_id": "none", "aws_secret_access_key": "none"}

torch.set_num_threads(1)
import_deepspeed()
load_config("train", ["data.shards=none"])
botocore.session.get_session().create_client("s3", **NOWHERE)  # else each fork reads S3's descriptions
for name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.module_inject.auto_ep_presets.registry",
    "deepspeed.moe.ep_router",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ma",
    "numpy.random",
    "peft",
    "s3fs",
    "safetensors.torch",
    "training.cli.main",
    "training.optim.adamw",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # what is here stays: no collection of a fork, of which ZeRO 3 asks for some, looks at it again
__all__ = ["tests", "training"]
