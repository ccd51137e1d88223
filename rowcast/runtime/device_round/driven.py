"""A last rung's pass that the host drives, at the end of a round whose other passes the device runs by itself.

Where the last rung's KV or weights lie in host memory the host starts their copies, layer by layer, so that its pass is not captured.
The rungs below may have all that they need next to the compute: theirs are. The host waits for the device once, to learn what they
proposed: little beside what such a pass waits for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rowcast.kernels.rounds import Pass
from rowcast.runtime.kv.device import DeviceStore
from rowcast.runtime.ladder.climb import Climber
from rowcast.runtime.ladder.model_runner import ModelRunner
from rowcast.runtime.step import SeqStep


def needs_host(rung: ModelRunner) -> str | None:
    """Why the device cannot run the rung's passes by itself; None if it can."""
    if not isinstance(rung.view, DeviceStore) or not rung.view.serves_device:
        return f"the KV view of {rung.name} needs true positions, or lies in host memory"
    if not rung.decoder.weights.on_device:
        return f"the weights of {rung.name} are chosen, or brought, by the host"
    return None


def driven_pass(runner: ModelRunner, at: Pass, batch: int, climbers: Sequence[Climber]) -> Tensor:
    """Run the pass that `at` describes, of up to T tokens of each of B = `batch` sequences: hidden states [B * T, D], zeros where a
    sequence has fewer. Waits for the device. Precondition: the view has room for its tokens."""
    counts, ids = at.counts.tolist(), at.ids.view(batch, -1).tolist()
    width = len(ids[0])
    steps = [
        SeqStep(path.seq_id, ids[row][: counts[row]], path.committed - 1, path.blocks, path.prompt_length, sample=True)
        for row, path in enumerate(climber.path for climber in climbers)
    ]
    hidden = runner.decoder.run(steps, runner.view)
    rows = [row * width + token for row, step in enumerate(steps) for token in range(len(step.tokens))]
    out = hidden.new_zeros(batch * width, hidden.shape[1])
    out[torch.tensor(rows, device=hidden.device)] = hidden
    return out
