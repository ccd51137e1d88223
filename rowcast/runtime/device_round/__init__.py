"""Rounds of the ladder that the device runs by itself: see `rounds`."""
