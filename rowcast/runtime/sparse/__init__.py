"""Contextual sparsity: weight views that read only the rows that a token needs."""
