"""The cluster commands: launch, status, logs, stop. Imports anything in `slurm`; no other module imports it."""
