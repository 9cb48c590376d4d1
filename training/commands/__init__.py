"""The commands besides train: thin mains. Imports any room; no room imports it."""
