"""From a checkpoint to a decoder on one rank."""

from __future__ import annotations

import torch

from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.loader import Progress
from rowcast.runtime.protocols import Comm, Source
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.weights import DenseWeights


def load_decoder(
    spec: ModelSpec,
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    comm: Comm | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """The plain rung's decoder: this rank's share of all weights, resident on `device` (default: CPU)."""
    device, comm = device or torch.device("cpu"), comm or SoloComm()
    return Decoder(DenseWeights(spec, source, comm, dtype=dtype, device=device, progress=progress), comm, device)
