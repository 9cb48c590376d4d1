"""Before anything runs: checks, memory, FLOPs, time and cost. Imports engine and below."""
