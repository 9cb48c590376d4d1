"""Ranks, collectives, launching and ending of processes: the only readers of RANK and SLURM_*. Imports config."""
