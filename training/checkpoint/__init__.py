"""Checkpoints: written in the background, committed by a manifest, verified before use. Imports engine, config and
processes."""
