"""Submitting commands to a cluster and watching them: `jobs` for any scheduler, `commands`, and Slurm's own files.

Imports the command line, the configuration and the exit codes of `training`."""
