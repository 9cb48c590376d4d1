"""The data commands: prepare, index, verify, order. Imports any room; no room imports it."""
