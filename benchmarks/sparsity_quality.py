"""What each selector is worth: sparse neurons and heads beside the oracle and the dense model, on real text.

    python benchmarks/sparsity_quality.py CALIBRATION --text FILE [--text FILE ...] [--tokens 4096] [--device cuda]

For each density every way to choose neurons: the oracle; few bits, low rank and Deja Vu's predictors, each from the MLP's own input and
from the attention's (-ahead); 1.5 times as many candidates and exact re-ranking; the exact gate; a fixed set of hot neurons; and the
untrained lookahead, the exact weights applied to what the MLP's norm makes of the residual before attention. Then heads, by the oracle
and by the calibration's predictors. Text is teacher-forced (see `rowcast.calibration.evaluate`); densities by layer are the
calibration's for all. What the calibration lacks is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.evaluate import evaluate
from rowcast.calibration.quality import LEAST_WINDOW, cut
from rowcast.calibration.quality_report import table
from rowcast.calibration.text import read_text
from rowcast.errors import UserError
from rowcast.runtime.banks import BankWeights, FfnBank
from rowcast.runtime.checkpoint import open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.device import choose_device
from rowcast.runtime.shard import Shard
from rowcast.runtime.sparse.artefact import Calibration
from rowcast.runtime.sparse.build import scorer
from rowcast.runtime.sparse.checks import check_scorer
from rowcast.runtime.sparse.heads import HeadOracle, HeadSelector
from rowcast.runtime.sparse.scorers import Reads, Scored, Scorer
from rowcast.runtime.sparse.selection import Selector
from rowcast.runtime.sparse.sizes import layer_shares
from rowcast.runtime.sparse.weights import SparseWeights
from rowcast.runtime.tokenizer import load_tokenizer

FEW_BITS = ("q2", "q3", "q4", "q8")
FITTED = ("lowrank", "dejavu")
RERANKED = ("q2", "q3", "q4", "lowrank", "q2-ahead", "q3-ahead", "q4-ahead", "lowrank-ahead", "untrained-ahead")
OVER = 1.5
CHECKED = 0.5
"""The density that the check lines are about."""


@dataclass(frozen=True)
class UntrainedLookahead:
    """Exact contributions of the MLP's weights to mlp_norm(residual before attention), which is affine in attn_norm of it."""

    bank: FfnBank
    scale: Tensor
    shift: Tensor
    """[D] each."""
    reads: Reads = "ahead"

    @property
    def bytes(self) -> int:
        return len(self.bank.order) * self.bank.in_row_bytes

    def __call__(self, x: Tensor) -> Scored:
        return Scored(self.bank.score(self.bank.hidden(x * self.scale + self.shift)))


@dataclass(frozen=True)
class Hot:
    """The same scores for every token: how often the calibration's tokens had a neuron among their best."""

    values: Tensor
    """[N]."""
    reads: Reads = "own"
    bytes: int = 0

    def __call__(self, x: Tensor) -> Scored:
        return Scored(self.values.expand(len(x), -1))


def untrained(banks: BankWeights, layer: int) -> UntrainedLookahead:
    size = banks.spec.hidden_size
    ones = torch.ones(size, dtype=banks.ffn[layer].up_down.dtype, device=banks.ffn[layer].up_down.device)
    signs = ones.clone()
    signs[1::2] = -1  # Mean 0 and variance 1: what a norm, RMS or layer norm, makes of it is its own weight and bias.
    affine = []
    for which in ("attn", "mlp"):
        plus, minus = (banks.norm_of(layer, which)(s * signs[None])[0] for s in (1, -1))
        affine.append(((plus - minus) / 2 * signs, (plus + minus) / 2))
    (attn_weight, attn_bias), (mlp_weight, mlp_bias) = affine
    scale = mlp_weight / attn_weight
    return UntrainedLookahead(banks.ffn[layer], scale, mlp_bias - attn_bias * scale)


def neuron_scorers(banks: BankWeights, calibration: Calibration) -> Iterator[tuple[str, list[Scorer]]]:
    """By name, one a layer."""
    for name in ("oracle", *(f"{by}{end}" for by in (*FEW_BITS, *FITTED) for end in ("", "-ahead")), "gate"):
        try:
            check_scorer(name, banks.spec, calibration)
        except UserError as error:
            print(f"{name} is left out: {error}")
            continue
        yield name, [scorer(name, bank, layer, calibration) for layer, bank in enumerate(banks.ffn)]
    spec = banks.spec
    if spec.pre_norm and not spec.parallel_norms:
        yield "untrained-ahead", [untrained(banks, layer) for layer in range(spec.num_layers)]
    hot = (calibration.tensor(f"layers.{i}.frequency").float()[bank.order] for i, bank in enumerate(banks.ffn))
    yield "hot set", [Hot(values.to(bank.up_down.device)) for values, bank in zip(hot, banks.ffn, strict=True)]


def neuron_views(banks: BankWeights, calibration: Calibration, args: argparse.Namespace) -> dict[str, SparseWeights]:
    """By "name density"."""
    found = {}
    for name, scorers in neuron_scorers(banks, calibration):
        if args.only and name not in args.only:
            continue
        for density in args.densities:
            shares = layer_shares(density, banks.spec.num_layers, calibration)
            for over in (1.0, OVER) if name in RERANKED else (1.0,):
                selectors = [
                    Selector(one, len(bank.order), keep=max(1, round(share * len(bank.order))), over=over)
                    for one, bank, share in zip(scorers, banks.ffn, shares, strict=True)
                ]
                found[label(name, density, over)] = SparseWeights(banks, selectors)
    return found


def label(name: str, density: float, over: float = 1.0) -> str:
    return f"{name}{f' x{over:g}' if over > 1 else ''} {density:.2f}"


def head_views(banks: BankWeights, calibration: Calibration, args: argparse.Namespace) -> dict[str, SparseWeights]:
    """By "heads name count/all"."""
    spec, found = banks.spec, {}
    neurons = [None] * spec.num_layers
    device = banks.ffn[0].up_down.device
    reads: Reads
    for keep in args.heads:
        count = f"{keep}/{spec.num_heads}"
        found[f"heads oracle {count}"] = SparseWeights(banks, neurons, heads=[HeadOracle(keep)] * spec.num_layers)
        for reads in ("own", "ahead"):
            if f"layers.1.heads.{reads}.weight" not in calibration:
                print(f"heads {reads} is left out: the calibration has none")
                continue
            chosen = [
                HeadSelector.calibrated(calibration, layer, keep=keep, reads=reads, spec=spec, shard=Shard(), device=device)
                for layer in range(spec.num_layers)
            ]
            found[f"heads {reads} {count}"] = SparseWeights(banks, neurons, heads=chosen)
    return found


def checks(views: dict[str, Any]) -> dict[str, float]:
    """What the lookahead gains by being trained, and what it loses in recall beside the predictor from the MLP's own input."""
    found = {}
    for over in (1.0, OVER):
        plain = views.get(label("untrained-ahead", CHECKED, over))
        for by in (*FEW_BITS, *FITTED):
            own, ahead = views.get(label(by, CHECKED, over)), views.get(label(f"{by}-ahead", CHECKED, over))
            name = label(f"{by}-ahead", CHECKED, over)
            if ahead is not None and plain is not None:
                found[f"acceptance: {name} - untrained"] = ahead["acceptance"] - plain["acceptance"]
            if ahead is not None and own is not None:
                found[f"recall: own - {name}"] = own["neurons"]["recall"] - ahead["neurons"]["recall"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--densities", type=float, nargs="*", default=[0.7, 0.5, 0.35, 0.25])
    parser.add_argument(
        "--heads", type=int, nargs="*", help="query heads that are kept; left out: 6, 5 and 4 where the model has more"
    )
    parser.add_argument("--only", nargs="*", help="these selectors of neurons")
    args = parser.parse_args()
    try:
        measure(args)
    except (UserError, OSError) as error:
        parser.error(str(error))


def measure(args: argparse.Namespace) -> None:
    checkpoint = open_checkpoint(args.model)
    calibration = Calibration.open(args.calibration, checkpoint.source.fingerprint())
    spec, encoder = spec_from_config(checkpoint.config), load_tokenizer(checkpoint)
    if args.heads is None:
        args.heads = [keep for keep in (6, 5, 4) if keep < spec.num_heads]
    if wrong := [keep for keep in args.heads if not 0 < keep <= spec.num_heads]:
        raise UserError(f"--heads {wrong[0]} is not a number of heads: give 1 to {spec.num_heads}")
    if args.window < LEAST_WINDOW:
        raise UserError(f"--window {args.window} is too short: give {LEAST_WINDOW} or more")
    window = min(args.window, spec.max_context)
    texts = {path: cut(read_text(path)[0], encoder, args.tokens, window, str(path)) for path in args.text}
    device, _ = choose_device(args.device)
    banks = BankWeights(spec, checkpoint.source, SoloComm(), dtype=torch.float32, device=device)
    views = neuron_views(banks, calibration, args) | head_views(banks, calibration, args)
    report: dict[str, Any] = {"model": args.model, "tokens": args.tokens, "window": window, "texts": {}}
    for path, windows in texts.items():
        started = time.perf_counter()
        found = evaluate(banks, views, windows, device=device).to_json()
        found |= {"checks": checks(found["views"]), "seconds": time.perf_counter() - started}
        report["texts"][str(path)] = found
        print(f"{path}: {found['tokens']} tokens, {found['seconds']:.0f} s")
        print("\n".join(table(found)))
        for name, difference in found["checks"].items():
            print(f"{name}: {difference:+.3f}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
