"""Compiling for TPU slices that are not at hand: what fits, what it costs, how long it would take."""
