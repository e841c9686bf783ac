"""Checkpoints of every published format: read without running code, converted, and loaded into the backbone."""
