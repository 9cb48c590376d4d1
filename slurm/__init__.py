"""Slurm's own: the script of a job, its options, what runs inside the allocation, and the queue. Imports the
configuration and the exit codes of `training`."""
