"""Training copies of a model: the ground that distilling, adapting and pruning stand on.

Modules are Transformers' own; here are their weights from any checkpoint that the engine reads, text, a loop that can be killed, the
way back to a checkpoint, and figures.
"""
