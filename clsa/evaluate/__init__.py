"""Measuring a checkpoint: held-out cross-entropy by context length, and what the selection covers."""
