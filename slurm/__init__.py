"""Submitting commands to a cluster. Imports the command line, the configuration and the exit codes of `training`."""
