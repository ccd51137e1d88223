"""Structured pruning: the neurons and heads that matter least are cut out, and what is left makes up for them.

Importance by calibration, the cut, a closed-form refit of the products behind it, recovery by distillation from the original.
"""

from __future__ import annotations

from rowcast.calibration.pruning.run import Settings, default_batch, prune

__all__ = ["Settings", "default_batch", "prune"]
