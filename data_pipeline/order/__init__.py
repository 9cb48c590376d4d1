"""Which sample comes at which position: pure arithmetic, no I/O. Imports common."""
