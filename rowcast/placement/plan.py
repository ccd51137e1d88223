"""A plan: which rung runs where, and how every byte of each device's budget is used. Torch-free.

The engine executes a plan and nothing else; without one it makes the all-resident plan (`resident`). Files are msgpack; `to_json`
is for reading.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import msgpack

from rowcast.errors import UserError
from rowcast.placement.units import format_bytes

FORMAT = 3
"""Raised when a field changes its meaning; files of another format are refused."""

VERIFICATIONS = ("coupled", "maximal")
"""The rules by which a rung's proposals stand."""

MODES = ("exact", "approximate")
"""Who has the last word: the whole model, or a sparse or low-bit rung."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One model on one machine. Bytes are those of one rank."""

    format: int = FORMAT
    fingerprint: str
    """Of the weights that it was made for (`Source.fingerprint`)."""
    draft_fingerprints: list[str]
    """Likewise of the draft models in `ladder`, in its order."""
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
        """Write the plan file."""
        Path(path).write_bytes(msgpack.packb(asdict(self)))

    def to_json(self) -> str:
        """The same content to read, indented."""
        return json.dumps(asdict(self), indent=2)

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

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan file. Raises UserError when there is none, it is damaged, or of another version."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the plan file {path}: {error.strerror}") from error
        try:
            content = msgpack.unpackb(data)
        except Exception as error:
            raise UserError(f"{path} is not a plan file: write one with Plan.save") from error
        return Plan._from_content(path, content)

    @staticmethod
    def _from_content(path: str | Path, content: Any) -> Plan:
        names = {f.name for f in fields(Plan)}
        if not isinstance(content, dict) or "format" not in content:
            raise UserError(f"{path} is not a plan file: write one with Plan.save")
        if content["format"] != FORMAT:
            raise UserError(
                f"{path} has plan format {content['format']!r}, this version reads format {FORMAT}: make the plan again"
            )
        if set(content) != names:
            wrong = sorted(names ^ set(content))
            raise UserError(f"{path} lacks or adds the plan fields {', '.join(map(str, wrong))}: make the plan again")
        for name, kind in get_type_hints(Plan).items():
            plain = {list[str]: list}.get(kind, kind)
            if not isinstance(content[name], plain) or isinstance(content[name], bool) != (plain is bool):
                raise UserError(
                    f"{path}: the plan field {name} is {content[name]!r}, not of type {plain.__name__}: make the plan again"
                )
        plan = Plan(**content)
        sizes = dict.fromkeys(("world", "max_context", "max_num_seqs", "max_batch_tokens", "block_size", "num_blocks"), 1)
        for name, low in (sizes | {"lookahead": 0, "speculating_seqs": 0}).items():
            if content[name] < low:
                raise UserError(
                    f"{path}: the plan field {name} is {content[name]}, at least {low} is needed: make the plan again"
                )
        for name in ("ladder", "draft_fingerprints", "notes"):
            if not all(isinstance(text, str) for text in content[name]):
                raise UserError(f"{path}: the plan field {name} does not hold texts only: make the plan again")
        for name, known in (("verification", VERIFICATIONS), ("mode", MODES), ("dtype", tuple(DTYPE_BYTES))):
            if content[name] not in known:
                raise UserError(
                    f"{path}: the plan field {name} is {content[name]!r:.60}, not one of {', '.join(known)}: make the plan again"
                )
        return plan
