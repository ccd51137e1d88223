"""Offline: activation statistics, predictors, drafts and adaptation, written to files that the runtime reads.

Sits beside `cluster`: may import `kernels`, `offload`, `runtime` and `placement`, and is imported by `cli` only.
"""

from __future__ import annotations

from rowcast.calibration.run import Settings, calibrate

__all__ = ["Settings", "calibrate"]
