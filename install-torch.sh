#!/bin/sh
# install-torch.sh PYTHON REQUIREMENT: the build for this machine. With an NVIDIA driver the default (CUDA) build; else the
# CPU build, from the configured package sources if they have it, else through uv, which knows where PyTorch keeps it.
python=$1 requirement=$2
pip() { "$python" -m pip install -q --disable-pip-version-check "$@"; }
if command -v nvidia-smi >/dev/null 2>&1; then
    pip "$requirement"
    exit
fi
pip "$requirement+cpu" 2>/dev/null && exit 0
echo "no CPU build in the configured package sources; trying uv"
pip uv && "$python" -m uv pip install -q --python "$python" --torch-backend cpu "$requirement" && exit 0
echo "falling back to the default build of torch (it works without a GPU, but is large)"
pip "$requirement"
