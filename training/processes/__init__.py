"""Ranks, collectives, starting and ending processes: the only code that reads RANK and SLURM_*. Imports config."""
