"""The products and attentions that take the time, each beside a torch reference that defines its result.

One dispatch point chooses by device and shape. Knows tensors, not models.
"""
