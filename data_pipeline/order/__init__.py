"""Which sample comes at which position: arithmetic without I/O. Imports common."""
