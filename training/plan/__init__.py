"""Before anything runs: checks, memory, FLOPs, time and cost. Imports engine and the folders below it."""
