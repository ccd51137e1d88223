"""The cost model: what each part of a model takes in bytes and seconds at each tier, as a `Problem` for the solver. Torch-free.

A pass of a rung over a stage takes as long as the slowest of these chains, and what every layer adds that nothing hides:

    GPU memory   all bytes that the card reads; streamed bytes are written once and read once
    compute      the products' arithmetic
    bus          all bytes that cross to the card; copies of whole layers run ahead and hide under everything else
    bus, serial  what is not neurons, then rows that are known only when they are needed; of rows that are known ahead, choosing and
                 fetching them, then all but attention
    host memory  all bytes that leave it, for all cards of the node and for the CPU
    CPU          what is not neurons, then the neurons that the CPU computes
    peers        bytes read from other cards
    launches     calls of every layer, selection, sums over ranks, the CPU's and the fetches' latency: added to the slowest chain

Entries of KV in host memory that views of a few copy anew in each round are a pass of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rowcast.placement.constants import STREAM_BYTES, Constants
from rowcast.placement.groups import ATTENTION, EMBEDDINGS, KV, NEURONS, Groups, make_groups, mlp_bytes, unplaced_bytes
from rowcast.placement.hardware import Host, Quantity
from rowcast.placement.layout import Layout, Site
from rowcast.placement.resident import layered_tokens, states_bytes
from rowcast.placement.solver import Problem
from rowcast.placement.workload import LadderUse, RungUse, Workload
from rowcast.runtime.spec import kv_bytes_per_token, layer_parameters, parameter_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CHUNK_TOKENS = 2048
"""Of prompts that one pass of a prefill runs: the engine's default."""

RESIDENT, STREAMED, ROWS, CPU, HOST, PEER = range(6)
"""Tiers, in the order of `forecast.TIERS` but for the last two; PEER + i: the site that holds it is the i-th of the layout."""


@dataclass(frozen=True, slots=True)
class Mode:
    """Which tiers may be used beside `resident`. Each has a price of its own, whatever lies there."""

    streamed: bool = False
    rows: bool = False
    cpu: bool = False
    kv_away: bool = False
    """KV may be streamed; the rungs below the last then show a copy of their part of it."""

    @property
    def name(self) -> str:
        ways = ["whole layers streamed"] * self.streamed + ["rows fetched when needed"] * self.rows
        ways += ["cold neurons computed on the CPU"] * self.cpu + ["KV in host memory"] * self.kv_away
        return ", ".join(ways) or "everything next to the compute"


def modes(ladder: LadderUse, layout: Layout) -> list[Mode]:
    """Those that the ladder and the machine have a use for, the plainest first."""
    if layout.on_cpu:
        return [Mode()]
    sparse = any(rung.neurons < 1 for rung in ladder.rungs)
    found = [Mode()]
    for kv_away in (False, True):
        for rows in (False, True) if sparse else (False,):
            for cpu in (False, True) if not ladder.packed else (False,):
                for streamed in (False, True):
                    mode = Mode(streamed, rows, cpu, kv_away)
                    if mode not in found:
                        found.append(mode)
    return found


@dataclass(frozen=True, slots=True)
class Chain:
    """What one row of a problem's seconds stands for."""

    rung: int
    """One more than there are: entries that views copy anew."""
    stage: int
    site: int
    """-1: all of the stage's."""
    link: str
    """Of `forecast.LINKS`."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A problem with what its rows mean."""

    problem: Problem
    groups: Groups
    chains: tuple[Chain, ...]
    limits: tuple[str, ...]
    """Names of the problem's limits."""
    fixed: tuple[dict[str, int], ...]
    """For each site, bytes by memory class that are spent whatever goes where."""
    launches: tuple[tuple[float, float], ...]
    """For each rung, seconds of a pass that nothing hides: calls; sums over ranks and hops between stages."""


class CostModel:
    """Prices one ladder on one layout. Groups are made once; each mode and each machine that is a little different is priced anew."""

    def __init__(self, work: Workload, ladder: LadderUse, layout: Layout, constants: Constants, groups: int) -> None:
        """`groups`: about how many, of all layers of one rank."""
        self.work, self.ladder, self.layout, self.constants = work, ladder, layout, constants
        self.groups = make_groups(work, ladder, layout, groups)

    def tokens(self, rung: RungUse) -> float:
        """In one pass, of all sequences that take part in it."""
        return rung.tokens * rung.sequences * self.work.batch

    def kv_bytes(self, site: Site, layers: int | None = None) -> float:
        """Of all sequences on one rank of the site, for so many layers of its stage (all if None)."""
        spec, tp = self.work.spec, self.layout.tensor_parallel
        count = len(self.layout.stages[site.stage].layers) if layers is None else layers
        per_layer = kv_bytes_per_token(spec, self.work.width) / spec.num_layers
        copies = max(1, tp // spec.num_kv_heads)
        return per_layer * copies / tp * count * self.work.context * self.work.batch

    def fixed_bytes(self, site: Site, mode: Mode) -> dict[str, int]:
        """By memory class, what a rank of the site holds whatever goes where."""
        work, ladder, constants, tp = self.work, self.ladder, self.constants, self.layout.tensor_parallel
        spec, share = work.spec, len(self.layout.stages[site.stage].layers) / work.spec.num_layers
        slots = ladder.slot_bytes if mode.kv_away else ladder.listed_slot_bytes
        own_work = ladder.work_bytes if mode.kv_away else ladder.listed_work_bytes
        whole = sum(rung.whole_proxy_bytes for rung in ladder.rungs) if self._fetches(site, mode) else 0
        speculating = ladder.speculating * work.batch
        rest = unplaced_bytes(spec, work.width, len(self.layout.stages[site.stage].layers))
        buffers = 0.0
        layer = layer_parameters(spec) * work.width * ladder.placed_share / tp
        if mode.streamed:
            buffers += 2 * min(layer, STREAM_BYTES)
        if mode.kv_away:
            buffers += 2 * min(self.kv_bytes(site, 1), STREAM_BYTES)
        if mode.rows:
            fetched = max(rung.fetched for rung in ladder.rungs)
            buffers += mlp_bytes(spec, work.width) * ladder.placed_share / tp * fetched
        layered = layered_tokens(spec, work.width, work.prompt, site.card.memory_bytes) if mode.kv_away else 0
        on_cpu = self.layout.on_cpu
        return {
            "weights": rest,
            "draft": ladder.fixed_bytes if site.stage == 0 else 0,
            "rung weights": round((ladder.shared_bytes + whole) * share / tp),
            "rung KV": round(
                slots * share / tp * max(1, tp // spec.num_kv_heads) * speculating
                + ladder.kv_share * self.kv_bytes(site)
                + ladder.draft_kv_bytes * speculating * (site.stage == 0)
            ),
            "buffers": round(buffers),
            "work": work.work_bytes + own_work + states_bytes(spec, work.width, layered),
            "graphs": 0 if on_cpu else self._outside_bytes(site) + constants.graphs_bytes,
            "margin": constants.host_margin_bytes if on_cpu else round(constants.margin_share * site.card.memory_bytes),
        }

    def _outside_bytes(self, site: Site) -> int:
        """Of a rank of the site."""
        machine = self.layout.machine
        return self.constants.outside_bytes(machine.num_gpus, nvlink_peers=machine.nodes[site.node].nvlink_peers)

    def price(self, mode: Mode, corrections: Sequence[float] | None = None) -> Priced:
        """Of this mode. `corrections`: for each rung, measured seconds of a pass over predicted ones."""
        import numpy as np

        layout, groups, ladder = self.layout, self.groups, self.ladder
        rungs, sites = ladder.rungs, layout.sites
        tiers = PEER + len(sites) * any(self._may_hold(site, holder) for site in sites for holder in sites)
        memory_link = "host memory" if layout.on_cpu else "GPU memory"
        factors = [1.0] * len(rungs) if corrections is None else list(corrections)
        count = len(groups)
        reads = groups.reads if not mode.kv_away else self.reads_away()
        rows: list[Floats] = []
        base: list[float] = []
        chains: list[Chain] = []

        def chain(rung: int, stage: int, site: int, link: str, seconds: Floats | None, start: float) -> None:
            rows.append(np.zeros((count, tiers)) if seconds is None else seconds * factors[rung])
            base.append(start * factors[rung])
            chains.append(Chain(rung, stage, site, link))

        for k, rung in enumerate(rungs):
            for s in range(len(layout.stages)):
                nodes = layout.stages[s].nodes
                host, cpu, shared = ({n: np.zeros((count, tiers)) for n in nodes} for _ in range(3))
                own: list[tuple[int, Floats, float]] = []
                for i, site in enumerate(sites):
                    if site.stage != s:
                        continue
                    mine = groups.site == i
                    node = layout.machine.nodes[site.node]
                    size, read = groups.bytes * mine, groups.bytes * reads[k] * mine
                    memory = self._memory_rate(site)
                    at_rest = self._read_seconds(site, rung, size, read)
                    gpu = np.zeros((count, tiers))
                    gpu[:, RESIDENT] = at_rest
                    touched = size * (reads[k] > 0)
                    gpu[:, STREAMED] = at_rest + touched / memory
                    gpu[:, ROWS] = 2 * read / memory
                    gpu[:, HOST] = self._lookup_seconds(site, rung) * mine * (groups.part == EMBEDDINGS)
                    bus = np.zeros((count, tiers))
                    serial = np.zeros((count, tiers))
                    rate = self._rate(site.card.bus_rate, self.constants.bus_share)
                    if rate:
                        bus[:, STREAMED] = touched / rate
                        fetched = read * (1 - self.work.hit_rate)
                        bus[:, ROWS] = fetched / (rate * self.constants.bus_rows_share)
                        serial[:, ROWS] = 0.0 if rung.ahead else bus[:, ROWS]
                        host_rate = self._rate(node.host.memory_rate, self.constants.host_share)
                        ranks = len(site.ranks)
                        host[site.node][:, STREAMED] += ranks * touched / host_rate
                        host[site.node][:, ROWS] += ranks * fetched / host_rate
                        host[site.node][:, CPU] += ranks * read / host_rate
                        tokens = self.tokens(rung)
                        arithmetic = tokens / self.work.width * 2 / (node.host.flops.value * self.constants.cpu_flops_share)
                        product_rate = min(host_rate, self._cpu_product_rate(node.host, rung))
                        cpu[site.node][:, CPU] += ranks * np.maximum(read / product_rate, read * arithmetic)
                        if node.shared_bus_rate is not None:
                            shared[site.node] += ranks * bus * rate / self._rate(node.shared_bus_rate, self.constants.bus_share)
                    peers = np.zeros((count, tiers))
                    for j, holder in enumerate(sites):
                        if self._may_hold(site, holder):
                            peers[:, PEER + j] = read / self._rate(node.peer_rate, self.constants.peer_share)
                            gpu[:, PEER + j] = 2 * read / memory
                    fixed = self.fixed_read_seconds(site, rung, mode)
                    before = gpu * (groups.part != NEURONS)[:, None]
                    chain(k, s, i, "host memory" if rung.at == "driver" else memory_link, gpu, fixed)
                    chain(k, s, i, "compute", None, self._compute_seconds(site, rung))
                    if mode.streamed or mode.kv_away or mode.rows:
                        chain(k, s, i, "bus", bus, 0.0)
                    if mode.rows and not rung.ahead:
                        late = before + serial
                        late[:, ROWS] += gpu[:, ROWS] * (groups.part == NEURONS)
                        chain(k, s, i, "bus", late, fixed)
                    if mode.rows and rung.ahead:
                        late = gpu * ((groups.part != ATTENTION) & (groups.part != KV))[:, None]
                        late[:, ROWS] += bus[:, ROWS]
                        chain(k, s, i, "bus", late, fixed + self._aside_seconds(rung, mode, len(layout.stages[s].layers)))
                    if peers.any():
                        chain(k, s, i, "peers", peers, 0.0)
                    own.append((site.node, before, fixed))
                for n in nodes if mode != Mode() else ():
                    chain(k, s, -1, "host memory", host[n], 0.0)
                for n, before, fixed in own if mode.cpu else ():
                    chain(k, s, -1, "CPU", before + cpu[n], fixed)
                if not self.constants.eager and self._is_driven(rung, mode):
                    layers = len(layout.stages[s].layers) if rung.model is None else rung.model.num_layers
                    chain(k, s, -1, "launches", None, layers * self.constants.driven_layer_s)
                for n in nodes:
                    if shared[n].any():
                        chain(k, s, -1, "bus", shared[n], 0.0)

        per_token = [rung.passes / ladder.tokens_per_round for rung in rungs]
        stages = len(layout.stages)
        if mode.kv_away and any(rung.renewed for rung in rungs):
            factors.append(1.0)
            per_token.append(1 / ladder.tokens_per_round)
            for i, site in enumerate(sites):
                copied = np.zeros((count, tiers))
                copied[:, STREAMED] = self.renewed_seconds(site) * groups.bytes * ((groups.site == i) & (groups.part == KV))
                chain(len(rungs), site.stage, i, "bus", copied, 0.0)
        launches = tuple(self._launch_seconds(rung, mode) for rung in rungs)
        constant = self.constants.round_s / ladder.tokens_per_round
        constant += sum(each * sum(lost) for each, lost in zip(per_token[: len(rungs)], launches, strict=True))
        limits, names, sizes = self._limits(mode, tiers)
        problem = Problem(
            allowed=self._allowed(mode, tiers),
            seconds=np.stack(rows),
            base=np.array(base),
            passes=np.array([chain.rung * stages + chain.stage for chain in chains]),
            weights=np.repeat(per_token, stages),
            constant=constant,
            bytes=sizes,
            limits=np.array(limits),
        )
        fixed_all = tuple(self.fixed_bytes(site, mode) for site in sites)
        return Priced(problem, groups, tuple(chains), tuple(names), fixed_all, launches)

    def first_token_s(self, bus_bytes: float, kv_bus_bytes: float) -> float:
        """The prefill of a batch's prompts, stage after stage.

        Each stage waits for the longest of: arithmetic at the dense rate; weights, read once a chunk of `CHUNK_TOKENS`; what crosses
        the bus, layer by layer, so that nothing crosses twice. Sums over ranks and calls hide under nothing.

        `bus_bytes`: weights of one rank that are not resident. `kv_bus_bytes`: KV of one whole context on one rank that is not, of
        which the prompt's part goes to the host.
        """
        spec, work, layout = self.work.spec, self.work, self.layout
        prompts = work.prompt * work.batch
        chunks = -(-prompts // CHUNK_TOKENS)
        last = self.ladder.rungs[-1]
        total = 0.0
        for index, stage in enumerate(layout.stages):
            layers, tp = len(stage.layers), layout.tensor_parallel
            slowest = 0.0
            for site in layout.sites:
                if site.stage != index:
                    continue
                products = 2 * layers * layer_parameters(spec) * prompts / tp
                attention = 2 * layers * work.prompt * prompts * spec.num_heads * spec.head_dim / tp
                share = self.constants.cpu_flops_share if layout.on_cpu else self.constants.flops_share
                arithmetic = (products + attention) / (site.card.flops.value * share)
                parameters = layers * layer_parameters(spec)
                if index == len(layout.stages) - 1:
                    parameters += spec.vocab_size * spec.embed_size
                weights = parameters * work.width * self.ladder.placed_share / tp
                memory = chunks * weights / (self._memory_rate(site) * self.constants.weights_share)
                rate = self._rate(site.card.bus_rate, self.constants.bus_share)
                moved = (bus_bytes + kv_bus_bytes * prompts / work.context) / rate if rate else 0.0
                slowest = max(slowest, arithmetic, memory, moved)
            total += slowest
        calls, sums = self._launch_seconds(last, Mode())
        state = spec.hidden_size * work.width
        crossing = sum(
            (2 * len(stage.layers) * self._crossing_seconds(index, state) if layout.tensor_parallel > 1 else 0.0)
            for index, stage in enumerate(layout.stages)
        )
        return total + chunks * (calls + sums) + prompts * crossing + self.constants.round_s

    def _cpu_product_rate(self, host: Host, rung: RungUse) -> float:
        """Bytes/s of neurons that the CPU multiplies with a token; infinite where that was not measured."""
        for found in host.products:
            if found.width == self.work.width:
                return (found.whole if rung.neurons >= 1 else found.chosen).value
        return math.inf

    def _memory_rate(self, site: Site) -> float:
        share = self.constants.host_share if self.layout.on_cpu else self.constants.copy_share
        return self._rate(site.card.memory_rate, share)

    @staticmethod
    def _rate(quantity: Quantity, share: float) -> float:
        """What a program reaches: a share of what is printed or assumed; what was measured or given as it is."""
        return quantity.value * (share if quantity.origin in ("datasheet", "assumed") else 1.0)

    def _read_seconds(self, site: Site, rung: RungUse, size: Floats, read: Floats) -> Floats:
        """From the memory next to the compute: rows where that is less than the whole block."""
        import numpy as np

        memory, part = self._memory_rate(site), self.groups.part
        alone = self.ladder.alone_bits
        products = self.constants.lowbit(alone) if alone else self.constants.weights_share
        whole = size * (read > 0) / (memory * products)
        some = read / (memory * min(products, self.constants.rows_share))
        seconds = np.minimum(whole, some)
        return np.where(part == KV, read / (memory * self.constants.kv_share), seconds)

    def _lookup_seconds(self, site: Site, rung: RungUse) -> float:
        """A pass's rows of the embeddings, where these lie in host memory."""
        rate = self._rate(site.card.bus_rate, self.constants.bus_share)
        row = self.work.spec.embed_size * self.work.width
        return self.constants.fetch_layer_s + self.tokens(rung) * row / rate if rate and rung.model is None else 0.0

    def fixed_read_seconds(self, site: Site, rung: RungUse, mode: Mode) -> float:
        """Of what a pass reads wherever the groups lie."""
        memory = self._memory_rate(site)
        if rung.at == "driver":
            memory = self._rate(self.layout.machine.nodes[0].host.memory_rate, self.constants.host_share)
        return sum(bytes_ / (memory * share) for bytes_, share in self.fixed_reads(site, rung, mode))

    def _is_driven(self, rung: RungUse, mode: Mode) -> bool:
        """Whether the host starts the calls of its passes one by one: of the last rung's, where it brings what they read, and of all
        rungs' where it does so for a lower one."""
        brought = mode.streamed or mode.cpu
        *lower, last = self.ladder.rungs
        if not (brought or mode.kv_away):
            return False
        return rung is last or any(
            each.model is None and ((brought and self.ladder.reads_placed(each)) or (mode.kv_away and each.kv_entries is None))
            for each in lower
        )

    def fixed_reads(self, site: Site, rung: RungUse, mode: Mode) -> list[tuple[float, float]]:
        """What a pass reads on one rank wherever the groups lie, as bytes and the share of the copy rate that they are read at:
        weights of its own, proxies, a draft, the copy of a part of the KV that lies elsewhere."""
        work, tp, constants = self.work, self.layout.tensor_parallel, self.constants
        share = len(self.layout.stages[site.stage].layers) / work.spec.num_layers
        if rung.model is not None:
            if site.stage:
                return []  # ranks of the first stage run it whole, each or one of them, or the driver does on its CPU
            entries = min(work.context, rung.kv_entries or work.context)
            kv = kv_bytes_per_token(rung.model, work.width) * entries * work.batch * rung.sequences
            return [(parameter_count(rung.model) * work.width, constants.weights_share), (kv, 1.0)]
        found = [((rung.proxy_bytes + rung.whole_proxy_bytes * self._fetches(site, mode)) * share / tp, constants.rows_share)]
        if rung.own_weights_bytes and not self.ladder.reads_placed(rung):
            found.append((rung.own_weights_bytes * share / tp, constants.lowbit(rung.own_bits)))
        if mode.kv_away and rung.kv_entries is not None:
            part = min(1.0, rung.kv_entries / work.context)
            found.append((self.kv_bytes(site) * part * rung.sequences, constants.kv_share))
        return found

    def renewed_seconds(self, site: Site) -> float:
        """In a round, for each byte of the site's KV that lies in host memory: entries of it that views of a few copy anew."""
        rate = self._rate(site.card.bus_rate, self.constants.bus_share) * self.constants.bus_entries_share
        entries = sum(rung.renewed * rung.sequences for rung in self.ladder.rungs)
        return min(1.0, entries / self.work.context) / rate if rate else 0.0

    def _compute_seconds(self, site: Site, rung: RungUse) -> float:
        """Arithmetic of one pass on one rank, all rows dense."""
        work, stage = self.work, self.layout.stages[site.stage]
        if rung.model is not None and site.stage:
            return 0.0
        spec = work.spec if rung.model is None else rung.model
        layers, tp = (len(stage.layers), self.layout.tensor_parallel) if rung.model is None else (spec.num_layers, 1)
        tokens = self.tokens(rung)
        entries = min(work.context, rung.kv_entries or work.context)
        operations: float = 2 * tokens * (layers * layer_parameters(spec) + spec.vocab_size * spec.hidden_size)
        operations += 4 * tokens * entries * layers * spec.num_heads * spec.head_dim
        if rung.at == "driver":
            return operations / (self.layout.machine.nodes[0].host.flops.value * self.constants.cpu_flops_share)
        share = self.constants.cpu_flops_share if self.layout.on_cpu else self.constants.flops_share
        return operations / tp / (site.card.flops.value * share)

    def _launch_seconds(self, rung: RungUse, mode: Mode) -> tuple[float, float]:
        """Of one pass, what nothing hides: calls and latencies; sums over ranks and hops between stages."""
        constants, spec = self.constants, self.work.spec if rung.model is None else rung.model
        each = constants.eager_layer_s if self.ladder.apart and not self.layout.on_cpu else constants.layer_launch_s
        if rung.model is not None:
            told = {"ranks": 0.0, "first": constants.first_s, "driver": constants.driver_s}[rung.at]
            return spec.num_layers * each, told * rung.asked / rung.passes if rung.passes else 0.0
        aside = self._is_aside(rung, mode)
        if rung.heads < 1 and not (rung.heads_ahead and aside):
            each += constants.select_s
        elif rung.neurons < 1 and not (rung.ahead and aside):
            each += constants.select_s * (1.0 if any(self._fetches(site, mode) for site in self.layout.sites) else rung.asking)
        if mode.rows and rung.neurons < 1 and not rung.ahead:
            each += constants.fetch_layer_s
        if mode.cpu and self.ladder.reads_placed(rung):
            each += constants.cpu_layer_s
        hidden = spec.hidden_size * self.work.width * self.tokens(rung)
        sums = 0.0
        for index, stage in enumerate(self.layout.stages):
            if self.layout.tensor_parallel > 1:
                sums += 2 * len(stage.layers) * self._all_reduce_seconds(index, hidden)
            sums += self.layout.hop_s(index, hidden, constants.hop_s, constants.peer_share)
        return spec.num_layers * each, sums

    def _is_aside(self, rung: RungUse, mode: Mode) -> bool:
        """Whether what is chosen ahead has a stream of its own."""
        return not self.layout.on_cpu and not self._is_driven(rung, mode)

    def _aside_seconds(self, rung: RungUse, mode: Mode, layers: int) -> float:
        """Of so many layers whose rows are known ahead, choosing and fetching them, beyond their bytes."""
        select_s = self.constants.select_s if self._is_aside(rung, mode) else 0.0
        return layers * (select_s + self.constants.fetch_layer_s) if rung.neurons < 1 else 0.0

    def _crossing_seconds(self, stage: int, bytes_: float) -> float:
        """What so many bytes add to a sum over the stage's ranks."""
        return self._all_reduce_seconds(stage, bytes_) - self._all_reduce_seconds(stage, 0.0)

    def _all_reduce_seconds(self, stage: int, bytes_: float) -> float:
        link, machine = self.layout.stages[stage].link, self.layout.machine
        start = self.constants.all_reduce(link, self.layout.tensor_parallel)
        if link == "network":
            assert machine.inter_node_rate is not None
            return start + 2 * machine.inter_node_latency_s + 2 * bytes_ / machine.inter_node_rate.value
        rate = machine.nodes[self.layout.stages[stage].nodes[0]].peer_rate
        return start + 2 * bytes_ / self._rate(rate, self.constants.peer_share)

    def _may_hold(self, site: Site, holder: Site) -> bool:
        """Whether ranks of one site may read what lies with ranks of another: unequal cards of a node with a link between them."""
        link = self.layout.machine.nodes[site.node].link
        return site is not holder and site.node == holder.node and link in ("nvlink", "pcie")

    def _fetches(self, site: Site, mode: Mode) -> bool:
        """Whether ranks of the site may fetch rows, which they find by a selector, even if it is of all of them."""
        return mode.rows or any(self._may_hold(site, holder) for holder in self.layout.sites)

    def reads_away(self) -> Floats:
        """Where KV may lie in host memory, rungs that see a part of it read their own copy and none of it."""
        reads: Floats = self.groups.reads.copy()
        for k, rung in enumerate(self.ladder.rungs):
            if rung.kv_entries is not None:
                reads[k, self.groups.part == KV] = 0.0
        return reads

    def _allowed(self, mode: Mode, tiers: int) -> NDArray[np.bool_]:
        import numpy as np

        groups, sites = self.groups, self.layout.sites
        allowed = np.zeros((len(groups), tiers), dtype=bool)
        allowed[:, RESIDENT] = True
        weights, neurons = groups.part != KV, groups.part == NEURONS
        computed = weights & (groups.part != EMBEDDINGS)
        allowed[:, STREAMED] = (computed & mode.streamed) | (~weights & mode.kv_away)
        allowed[:, ROWS] = neurons & mode.rows
        allowed[:, CPU] = neurons & mode.cpu
        allowed[:, HOST] = (groups.part == EMBEDDINGS) & (not self.layout.on_cpu)
        for i, site in enumerate(sites):
            for j, holder in enumerate(sites):
                if self._may_hold(site, holder):
                    allowed[(groups.site == i) & neurons, PEER + j] = True
        return allowed

    def _limits(self, mode: Mode, tiers: int) -> tuple[list[float], list[str], Floats]:
        """Bytes that are left by device, host and its pinned part, and what each group takes of them at each tier."""
        import numpy as np

        groups, layout, sites = self.groups, self.layout, self.layout.sites
        limits: list[float] = []
        names: list[str] = []
        sizes: list[Floats] = []
        for i, site in enumerate(sites):
            size = np.zeros((len(groups), tiers))
            size[:, RESIDENT] = groups.bytes * (groups.site == i)
            for j, other in enumerate(sites):
                if self._may_hold(other, site):
                    size[:, PEER + i] += groups.bytes * (groups.site == j) * len(other.ranks) / len(site.ranks)
            limits.append(site.card.memory_bytes - sum(self.fixed_bytes(site, mode).values()))
            names.append(f"GPU {site.ranks[0]}" if not layout.on_cpu else "host of node 0")
            sizes.append(size)
        if not layout.on_cpu:
            for n, node in enumerate(layout.machine.nodes):
                pinned, total = np.zeros((len(groups), tiers)), np.zeros((len(groups), tiers))
                for i, site in enumerate(sites):
                    if site.node == n:
                        away = len(site.ranks) * groups.bytes * (groups.site == i)
                        pinned[:, STREAMED] += away
                        pinned[:, ROWS] += away
                        pinned[:, CPU] += away  # Passes over many tokens stream them.
                        total[:, HOST] += away
                total += pinned
                limits += [max(0.0, node.host.pin_bytes), max(0.0, node.host.memory_bytes - self.constants.host_margin_bytes)]
                names += [f"pinned memory of node {n}", f"host of node {n}"]
                sizes += [pinned, total]
        return limits, names, np.stack(sizes)
