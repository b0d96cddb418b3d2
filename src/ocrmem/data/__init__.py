"""Conversations to samples to batches."""
