"""Ahead-of-time compilation for TPU slices that need not exist: memory, communication and step time."""
