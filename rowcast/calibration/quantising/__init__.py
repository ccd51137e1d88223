"""Rounding a model's matrices to few bits, each column's error made good by the columns that are still to come."""
