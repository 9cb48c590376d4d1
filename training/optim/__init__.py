"""Optimizers with the weight averages they maintain, and the pieces into which ZeRO splits their states. Imports
config."""
