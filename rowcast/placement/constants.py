"""The cost model's constants: what share of a rate a program reaches, what each call takes whatever its size. Torch-free.

One set serves all predictions. `docs/planning.md` has the points that they were fitted to and those that they were only checked
against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 1 << 20

STREAM_BYTES = 256 * MIB
"""A piece that is copied at once, where a layer has more; two are in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Shares are of a rate that a copy reaches, seconds are of one call."""

    copy_share: float = 0.88
    """Of a GPU's datasheet memory rate, what a copy reaches: .88 on an H200, .89 on an H100 (measured)."""
    weights_share: float = 0.90
    """Of the copy rate, products with few tokens over 16-bit weights. Fitted to Llama-2-7B's decode on an H100."""
    kv_share: float = 1.0
    """Attention over a long KV: 1.01 of the copy rate with 32 KV heads, .92 with 8 (measured on an H100)."""
    rows_share: float = 0.72
    """Gathered rows. Fitted to the sparse FFN of an OPT-175B on an H100."""
    lowbit_share: dict[int, float] | None = None
    """By bits; None: `LOWBIT_SHARES`."""
    bus_share: float = 0.85
    """Of a link's nominal rate to the host, what one large copy reaches: 54.3 of 64 GB/s on an H200 (measured)."""
    bus_rows_share: float = 0.90
    """Of that, a kernel that reads rows where they lie: .93, .86 and .91 with 8, 24 and 144 KiB a row (measured on an H100)."""
    bus_entries_share: float = 0.22
    """Of the bus rate, a view's entries of KV that lies in host memory, copied one by one (256 bytes), what chooses them included:
    11.5 of 52.9 GB/s, measured on two H200."""
    host_share: float = 0.80
    """Of host memory's nominal rate. Assumed."""
    peer_share: float = 0.75
    """Of a link's nominal rate between GPUs. Assumed."""
    flops_share: float = 0.60
    """Of the dense rate, products with many tokens. Assumed."""
    cpu_flops_share: float = 0.50
    """Likewise on a CPU. Assumed."""

    layer_s: float = 10e-6
    """One layer's calls in a captured graph, beyond what their bytes take. Fitted to Llama-2-7B and SmolLM2-135M on an H100."""
    eager_layer_s: float = 145e-6
    """The same of a framework's own kernels, nothing fused, captured or called one by one where the GPU is behind. Fitted to TriForce's
    retrieval pass on an A100."""
    select_s: float = 12e-6
    """Predictor and selection of one layer, beyond their bytes. Fitted to the sparse FFN."""
    round_s: float = 0.3e-3
    """Host work of a round that nothing hides. Fitted to SmolLM2-135M on an H100."""
    cpu_layer_s: float = 2.5e-3
    """To the CPU and back in a layer in which it computes: calls that wait for it, threads that wait for one another, moments in which
    some do not run. Measured on an H100's host, 16 virtual cores: 266 MB a layer took 5.1 ms, the bytes alone 3.4."""
    driven_layer_s: float = 1.2e-3
    """A layer's calls in a pass that the host drives, as it does where the pass reads what is streamed or computed on the CPU, or KV
    in host memory: these hide under what the pass waits for. Measured on an H100: 1.3 ms while profiled."""
    fetch_layer_s: float = 34e-6
    """A layer's fetch of rows, beyond its bytes: what the cache lacks, whose place it takes, a latency of the bus. Fitted to an
    OPT-6.7B on an H200, whose rows lay in host memory, and in another H200's."""
    hop_s: float = 20e-6
    """A pipeline stage's output to the next stage of the node, beyond its bytes. Assumed."""
    first_s: float = 100e-6
    """Proposals from rank 0 to the other ranks, over the CPU. Assumed."""
    driver_s: float = 300e-6
    """A question to the driver and its answer to all ranks, beyond the draft's passes there. Assumed."""
    all_reduce_s: dict[str, float] | None = None
    """A sum of a token's hidden state over two ranks, by link; None: `ALL_REDUCE_S`."""

    context_bytes: int = 768 * MIB
    """A GPU context with its libraries and kernels: 518 MiB before the first kernel, 768 with all of them (measured on an H100)."""
    collectives_bytes: int = 256 * MIB
    """What one of several ranks takes beside that: NCCL's kernels and buffers, what peers write for sums in one shot. Assumed."""
    nvlink_bytes: int = 584 * MIB
    """More of that for each other rank where cards are joined by NVLink, for which NCCL has many channels. Measured on H200s, torch
    2.11, beside the most that tensors took, graphs included: 763 to 829 MiB alone, 1,537 to 1,603 of two ranks, 2,759 of four."""
    graphs_bytes: int = 64 * MIB
    """Captured graphs and the states of rounds."""
    margin_share: float = 0.02
    """Of a GPU's memory, what is left free for fragments."""
    host_margin_bytes: int = 4 << 30
    """Of host memory, what the system and the process itself take."""
    eager: bool = False
    """Passes are made of a framework's own kernels: what published research systems did."""
    spread: float = 0.10
    """Rates may be so much higher or lower: the ends of a predicted range."""

    def outside_bytes(self, ranks: int, *, nvlink_peers: int) -> int:
        """What each of so many ranks takes of its GPU beside tensors and graphs; so many of the others are reached over NVLink."""
        return self.context_bytes + self.collectives_bytes * (ranks > 1) + nvlink_peers * self.nvlink_bytes

    @property
    def layer_launch_s(self) -> float:
        return self.eager_layer_s if self.eager else self.layer_s

    def all_reduce(self, link: str, ranks: int) -> float:
        """Seconds of one, by nvlink, pcie, host or network. Eight ranks take twice as long as two: gpt-fast's on 8 A100."""
        return (self.all_reduce_s or ALL_REDUCE_S)[link] * (1 + math.log2(ranks)) / 2

    def lowbit(self, bits: int) -> float:
        """Share of the copy rate that products with few tokens over low-bit weights reach; of 2 and 3 bits that of 4 is assumed."""
        return (self.lowbit_share or LOWBIT_SHARES)[8 if bits == 8 else 4]


ALL_REDUCE_S = {"nvlink": 6.5e-6, "pcie": 19e-6, "host": 40e-6, "network": 30e-6}
"""Of two ranks. nvlink: one-shot over symmetric memory, measured on two H200 (24 KB, in a captured graph). pcie: NCCL's time on the
same machine stands in for it. host, network: assumed."""

LOWBIT_SHARES = {8: 0.71, 4: 0.55}
"""Measured on an H100: 45 MB in 22.5 us, 25 MB in 15 us."""
