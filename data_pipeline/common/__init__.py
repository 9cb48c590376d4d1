"""Shared by all folders: errors, thread pools, ordered parallel work, progress. Imports no other folder."""
