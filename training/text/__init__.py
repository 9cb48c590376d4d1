"""Frozen text encoders: captions to embeddings, their identity and their cost. Imports config."""
