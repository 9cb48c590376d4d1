"""The data commands: prepare, index, verify, order. May import any folder; no folder imports it."""
