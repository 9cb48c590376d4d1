"""The cluster commands: launch, status, compare, logs, resume, stop. May import anything in `slurm`; no module imports
them."""
