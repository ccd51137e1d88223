"""What sparse passes are worth on text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from rowcast.calibration.metrics import Laws
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.protocols import WeightView

LOGIT_ELEMENTS = 1 << 24
"""Most logits of one model at a time."""

DENSE = "dense"


@torch.inference_mode()
def measure(
    dense: WeightView, sparse: Mapping[str, WeightView], windows: Tensor, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Laws]:
    """Laws of the next token over windows [W, n] beside the dense model's, which is called "dense"; all tokens but the first count as
    generated."""
    spec = dense.spec
    decoders = {name: Decoder(view, SoloComm(), device) for name, view in ({DENSE: dense} | dict(sparse)).items()}
    laws = {name: Laws() for name in decoders}
    count = max(1, LOGIT_ELEMENTS // spec.vocab_size)
    kv = OneLayerKV(spec, 1, windows.shape[1], dtype=dtype, device=device)
    for window in windows:
        steps = window_steps(window[None], prompt_length=1)
        hidden = {name: decoder.run(steps, kv)[:-1] for name, decoder in decoders.items()}
        targets = window[1:].to(device)
        for start in range(0, len(targets), count):
            rows = slice(start, start + count)
            log_p = F.log_softmax(decoders[DENSE].logits(hidden[DENSE][rows]).float(), -1)
            for name, decoder in decoders.items():
                log_q = log_p if name == DENSE else F.log_softmax(decoder.logits(hidden[name][rows]).float(), -1)
                laws[name].add(log_p, log_q, targets[rows])
    return laws
