"""One training run: its directory, data, state, checkpoints and reports, which `session` opens in order.

Imports cascade and the folders below it.
"""
