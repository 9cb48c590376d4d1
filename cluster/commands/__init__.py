"""The commands about jobs and runs: launch, status, logs, stop, compare. Imports `cluster` and `slurm`."""
