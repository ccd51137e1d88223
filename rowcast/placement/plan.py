"""A plan: which rung runs where, and how every byte of each device's budget is used. Torch-free.

The engine executes a plan and nothing else; without one it makes the all-resident plan (`resident`). The planner's plans foretell their
speed, too (`forecast`). Files are msgpack (`plan_file`); `to_json` is for reading.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from rowcast.placement import plan_file
from rowcast.placement.forecast import LINKS, MEMORY_CLASSES, TIERS, DeviceMemory, Forecast, RungTime, Share, Stage
from rowcast.placement.plan_file import Rule, WrongField
from rowcast.placement.units import MAX_BYTES, format_bytes
from rowcast.placement.workload import Input

FORMAT = 6
"""Raised when a field changes its meaning; files of another format are refused."""

VERIFICATIONS = ("coupled", "maximal")
"""The rules by which a rung's proposals stand."""

MODES = ("exact", "approximate")
"""Who has the last word: the whole model, or a sparse or low-bit rung."""

WEIGHTS = ("packed", "unpacked")
"""How weights that a checkpoint has packed into few bits are held: as they are, or in the number format of passes."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One model on one machine. Bytes are those of one rank."""

    format: int = FORMAT
    fingerprint: str
    """Of the weights that it was made for (`Source.fingerprint`); empty: any of `spec`, as it was made from a config alone."""
    draft_fingerprints: list[str]
    """Likewise of the draft models in `ladder`, in its order; digests of their shapes where `fingerprint` is empty."""
    ladder: list[str]
    """Rungs, cheapest first; the last decides."""
    calibration: str
    """Fingerprint of the calibration that sparse rungs read; empty where there is none."""
    adaptive: bool
    """Whether run-time control may leave any rung below the last out."""
    verification: str
    """The rule: coupled or maximal."""
    mode: str
    dtype: str
    device: str
    """cpu or cuda."""
    world: int
    max_context: int
    """Longest sequence in tokens, prompt and output together."""
    max_num_seqs: int
    max_batch_tokens: int
    """Tokens run in one step at most; longer prompts are prefilled in chunks."""
    block_size: int
    """Positions in a KV block."""
    num_blocks: int
    lookahead: int
    """Tokens that a round drafts for one sequence at most."""
    speculating_seqs: int
    """Sequences that have room in the caches of the rungs below the last; 0 where there is no such rung."""
    budget_bytes: int
    weight_bytes: int
    """Weights and buffers that live as long as the model, but matrices that no rung reads in the model's own format."""
    rung_weight_bytes: int
    """Those of draft models, and what other rungs add: rows in a layout of their own, proxies, predictors, low-bit weights."""
    kv_bytes: int
    rung_kv_bytes: int
    """Caches of the rungs below the last, chunk summaries and kept queries."""
    work_bytes: int
    """Activations, logits and masks of the largest step."""
    pass_bytes: int
    """Weights that one pass of the last rung reads: predicted traffic of a decode step, KV aside."""
    kv_token_bytes: int
    """KV of one position in all layers."""
    notes: list[str]
    """Why automatic choices came out as they did."""
    weights: str = "unpacked"
    """Of `WEIGHTS`."""
    spec: str = ""
    """Digest of the model's shape."""
    machine: str = ""
    """What it was made for, in one line; empty: where it was made."""
    forecast: Forecast | None = None
    """What to expect of it; None where nobody asked."""
    ceiling_bytes: int = 0
    """What a process may take of its GPU by the driver's count, context and libraries included, where that was asked for. 0: by the
    forecast's memory, if there is one; else only `budget_bytes` counts."""

    @property
    def kv_tokens(self) -> int:
        """Positions that the KV memory holds."""
        return self.num_blocks * self.block_size

    @property
    def margin_bytes(self) -> int:
        """What the budget leaves unused."""
        return self.budget_bytes - self.weight_bytes - self.kv_bytes - self.rung_bytes - self.work_bytes

    @property
    def rung_bytes(self) -> int:
        """What the ladder takes beside the model's weights and its KV."""
        return self.rung_weight_bytes + self.rung_kv_bytes

    @property
    def ladder_text(self) -> str:
        """The ladder in one line, as a user writes it."""
        return " / ".join(self.ladder)

    def save(self, path: str | Path) -> None:
        """Write the plan file. Raises UserError where that cannot be."""
        plan_file.write(path, asdict(self))

    def to_json(self) -> str:
        """The same content to read, indented."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def summary(self) -> str:
        """One line: what takes how much."""
        parts = [
            ("weights", self.weight_bytes),
            ("KV", self.kv_bytes),
            ("rungs", self.rung_bytes),
            ("work", self.work_bytes),
        ]
        used = ", ".join(f"{name} {format_bytes(count)}" for name, count in parts if count)
        where = f"{format_bytes(self.budget_bytes)} on {self.device}"
        return f"{used} of {where}; {self.kv_tokens} KV tokens; ladder {self.ladder_text}"

    def places(self, rank: int = 0) -> dict[str, dict[str, int]]:
        """Bytes of one rank's parts by tier, where any lies elsewhere than next to the compute; else empty."""
        shares = [] if self.forecast is None else [share for share in self.forecast.shares if rank in share.ranks and share.count]
        found: dict[str, dict[str, int]] = {}
        for tier in TIERS:
            for share in shares:
                if share.tier == tier:
                    held = found.setdefault(tier, {})
                    held[share.part] = held.get(share.part, 0) + share.bytes
        return found if found.keys() - {"resident"} else {}

    def places_text(self, rank: int = 0) -> str:
        """The same in one line, such as "resident 1.2 GiB: attention, 30% of the neurons; streamed 4.1 GiB: 70% of the neurons"; empty
        where `places` is."""
        places = self.places(rank)
        whole = {part: sum(held.get(part, 0) for held in places.values()) for part in PARTS}

        def told(part: str, held: int) -> str:
            name = part if part in ("KV", "attention") else f"the {part}"
            return part if held == whole[part] else f"{held / whole[part]:.2%} of {name}".replace(".00%", "%")

        lines = []
        for tier, held in places.items():
            parts = ", ".join(told(part, held[part]) for part in PARTS if held.get(part))
            lines.append(f"{tier} {format_bytes(sum(held.values()))}: {parts or 'nothing'}")
        return "; ".join(lines)

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file. Raises UserError when there is none, and for one that is foreign, damaged or of another format."""
        return Plan.decode(plan_file.read(path), path)

    @staticmethod
    def decode(data: bytes, path: str | Path) -> Plan:
        """Likewise from a file's bytes; `path` is for the errors' sentences."""
        content = plan_file.decode(data, path, FORMAT)
        try:
            plan = plan_file.build(Plan, content, _RULES)
            _check_whole(plan)
        except WrongField as error:
            raise plan_file.damaged(path, str(error)) from error
        return plan


PARTS = ("attention", "neurons", "LM head", "embeddings", "KV")
"""Of a model, as `Share` names them."""

_SIZE = Rule(most=MAX_BYTES)
_COUNT, _ONE_AT_LEAST = Rule(most=1 << 40), Rule(least=1, most=1 << 40)

_RULES: dict[tuple[type, str], Rule] = {
    **{(Plan, name): _ONE_AT_LEAST for name in ("max_context", "max_num_seqs", "max_batch_tokens", "block_size", "num_blocks")},
    **{(Plan, name): _COUNT for name in ("lookahead", "speculating_seqs")},
    **{
        (Plan, f"{name}_bytes"): _SIZE
        for name in ("ceiling", "budget", "weight", "rung_weight", "kv", "rung_kv", "work", "pass", "kv_token")
    },
    (Plan, "world"): Rule(least=1, most=1 << 16),
    (Plan, "verification"): Rule(among=VERIFICATIONS),
    (Plan, "mode"): Rule(among=MODES),
    (Plan, "weights"): Rule(among=WEIGHTS),
    (Plan, "dtype"): Rule(among=tuple(DTYPE_BYTES)),
    **{(Forecast, name): _ONE_AT_LEAST for name in ("tensor_parallel", "pipeline_stages", "context", "prompt", "batch")},
    (Forecast, "bottleneck"): Rule(among=LINKS),
    (Forecast, "bottleneck_share"): Rule(most=1),
    (Forecast, "gap"): Rule(least=-1, most=1),  # Below 0 by rounding.
    (DeviceMemory, "budget_bytes"): _SIZE,
    (DeviceMemory, "classes"): Rule(among=MEMORY_CLASSES, most=MAX_BYTES),
    (RungTime, "bound_by"): Rule(among=LINKS),
    (Stage, "bytes"): Rule(among=LINKS),
    (Stage, "seconds"): Rule(among=LINKS),
    (Share, "part"): Rule(among=PARTS),
    (Share, "layer"): Rule(least=-1),
    (Share, "tier"): Rule(among=TIERS),
    (Share, "bytes"): _SIZE,
    (Input, "value"): Rule(least=-1e300),
}
"""Of fields that take less than any text or any number from 0."""


def _check_whole(plan: Plan) -> None:
    """What fields have to do with one another. Raises WrongField."""
    if not plan.ladder:
        raise WrongField("ladder is empty")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", plan.device):
        raise WrongField(f"device is {plan_file.shown(plan.device)}, not cpu or cuda")
    if not (plan.fingerprint or plan.spec):
        raise WrongField("fingerprint and spec are both empty, so it is of no model")
    if plan.margin_bytes < 0:
        used = plan.budget_bytes - plan.margin_bytes
        raise WrongField(f"budget_bytes is {plan.budget_bytes}, less than the {used} that it takes")
    if plan.forecast is not None:
        _check_forecast(plan.forecast)


def _check_forecast(forecast: Forecast) -> None:
    least, most = forecast.tokens_per_s_range if len(forecast.tokens_per_s_range) == 2 else (1.0, 0.0)
    if least > most:
        raise WrongField("forecast.tokens_per_s_range is not a least and a most")
    for memory in forecast.memory:
        if sum(memory.classes.values()) != memory.budget_bytes:
            raise WrongField(
                f"forecast.memory of {memory.device!r:.40} does not add up to its budget of {memory.budget_bytes} bytes"
            )
    for share in forecast.shares:
        if share.first + share.count > share.of:
            raise WrongField(f"forecast.shares has groups {share.first} to {share.first + share.count} of {share.of}")
