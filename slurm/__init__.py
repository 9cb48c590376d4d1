"""Submits commands to a cluster and monitors them: `jobs` for any scheduler, `commands`, and modules for Slurm itself.

Imports the command line, the configuration and the exit codes of `training`."""
