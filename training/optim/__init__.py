"""Optimizers with the averages they keep, and how their states are cut into pieces. Imports config."""
