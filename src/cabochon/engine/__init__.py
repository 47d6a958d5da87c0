"""Continuous batching over a paged key/value cache."""
