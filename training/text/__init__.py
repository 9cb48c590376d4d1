"""Frozen text encoders: captions to embeddings, their identity and their cost; a captioner. Imports config."""
