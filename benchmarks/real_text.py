"""Real text on one device: plain decoding and ladders, their acceptance, whether the greedy output is the same, Transformers.

    python benchmarks/real_text.py --text tests/data/news-from-nowhere.txt
    python benchmarks/real_text.py --text tests/data/jack-sheppard.txt --draft smollm2-draft --prompt-tokens 4000

SmolLM2-135M-Instruct, unless --model names another. Every ladder is loaded anew and decodes the same pieces of the text, all sides one
at a time and in turn (`rowcast bench speculation`). Transformers decodes the first piece eagerly, by its own prompt lookup and, with a
draft, by assisted generation, from weights that are read once by us. Where an output leaves plain's, it is told by how much plain
prefers its own token there: near 0 two ways of summing in 16 bits break a tie differently. A text that the draft or the model was
trained on is told as such. A table on standard error, one line of JSON on standard output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from _figures import Figure, Session, bandwidth, planned, release

from rowcast.bench import speculation
from rowcast.bench.latency import random_peer
from rowcast.runtime.checkpoint import DEFAULT_MODEL, Checkpoint, open_checkpoint
from rowcast.runtime.checkpoint.shipped import place_of
from rowcast.runtime.device import DTYPES, choose_device, choose_dtype
from rowcast.runtime.tokenizer import load_tokenizer

LADDERS = (
    "ngram:gamma=5 / plain",
    "self:kv=256,gamma=4 / plain",
    "ngram:gamma=4 / self:kv=256,gamma=6 / plain",
    "self:mlp=0.5,by=q4,gamma=3 / plain",
    "self:mlp=0.5,by=q4,kv=256,gamma=3 / plain",
    "self:bits=4,gamma=4 / plain",
    "auto",
)
WITH_DRAFT = ("draft / plain", "draft:gamma=2 / self:kv=512,gamma=6 / plain", "triforce")
EAGER, ASSISTED = "Transformers, eager", "Transformers, assisted"
TOGETHER = 3
PEER_TOKENS = 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="plain text")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--ladder", nargs="+", default=list(LADDERS))
    parser.add_argument("--draft", help="a smaller model with the same vocabulary: three ladders more")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-peer", action="store_true", help="without Transformers")
    parser.add_argument("--compiled", action="store_true", help="Transformers compiled by torch, too")
    parser.add_argument("--seconds", type=float, default=1e6, help="after which no ladder more is begun")
    args = parser.parse_args()
    device, _ = choose_device(args.device)
    session = Session("real_text", args.model, device, args.seconds, prompt_tokens=args.prompt_tokens, max_tokens=args.max_tokens)
    rate = session.head["bandwidth"] = bandwidth(device)
    if trained := [name for name in (args.model, args.draft) if name and learnt(name, Path(args.text))]:
        session.head["note"] = (
            f"{Path(args.text).name} is what {' and '.join(trained)} learnt from: their acceptance is not held out"
        )
        session.say(session.head["note"])
    peers: dict[str, float] = {}
    reference: dict[str, list[int]] = {}
    if not args.no_peer:
        try:
            peers, reference = transformers(session, args, device)
        except Exception as error:  # the ladders may run
            session.fail("Transformers", error)
    ladders = [*args.ladder, *(WITH_DRAFT if args.draft else ())]
    for report in reports(session, args, ladders):
        for name, found in report["ladders"].items():
            if any(figure.name == name for figure in session.figures):  # plain, again
                continue
            drafted = "draft" in found["ladder"]
            beside = {peer: took for peer, took in peers.items() if name == "plain" or (drafted and peer == ASSISTED)}
            session.add(told(args, name, found, rate, beside))
            for peer, took in beside.items():
                session.claim(f"{name} over {peer}", took / found["s_per_token"], 1.0)
            if name != "plain":
                gaps = [abs(each["gap"]) for each in found["differences"]]
                session.claim(f"{name}: largest gap where the output leaves plain's", max(gaps, default=0.0), 0.25, at_most=True)
    session.head["transformers_first_tokens"] = {name: ids[:16] for name, ids in reference.items()}
    return session.end()


def learnt(model: str, text: Path) -> bool:
    """Whether a model that `distill`, `adapt` or `prune` made learnt from this text, or from one of its name."""
    place = place_of(model)
    told = (place if place.is_dir() else place.parent) / "rowcast.json"
    if not told.is_file():
        return False
    digest = sha256(text.read_bytes()).hexdigest()
    texts = [each for each in json.loads(told.read_text()).get("texts", []) if each.get("held_out", 0) < each["tokens"]]
    return any(digest == each["sha256"] or text.name == each["name"] for each in texts)


def reports(session: Session, args: argparse.Namespace, ladders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of a few ladders beside one plain decoding; where one of them fails, of each with its own."""
    for first in range(0, len(ladders), TOGETHER):
        some = ladders[first : first + TOGETHER]
        if not session.time_for(", ".join(some), 12 * len(some)):
            continue
        try:
            yield speculation.run(settings(args, *some))
            continue
        except Exception as error:
            session.say(f"one by one, as {type(error).__name__}: {error}")
        for ladder in some:
            release()
            try:
                yield speculation.run(settings(args, ladder))
            except Exception as error:
                session.fail(ladder, error)


def settings(args: argparse.Namespace, *ladders: str) -> speculation.Settings:
    found = speculation.Settings(
        model=args.model,
        dtype=args.dtype,
        device=args.device,
        prompt_file=args.text,
        prompt_tokens=args.prompt_tokens,
        ladder=ladders,
        max_tokens=args.max_tokens,
        repeat=args.repeat,
    )
    return replace(found, draft=args.draft) if args.draft and any(found.places(ladder)[0] for ladder in ladders) else found


def told(args: argparse.Namespace, name: str, found: Mapping[str, Any], rate: float, peers: Mapping[str, float]) -> Figure:
    """A ladder as `rowcast bench speculation` found it."""
    acceptance = {rung: share for rung, share in found["acceptance"].items() if share is not None}
    chances = {"acceptance": ",".join(f"{rung}={min(share, 0.999):.4f}" for rung, share in acceptance.items() if ":" not in rung)}
    wish: dict[str, Any] = {} if not chances["acceptance"] else chances
    context = args.prompt_tokens + args.max_tokens
    foretold = planned(args.model, found["ladder"], dtype=args.dtype, context=context, prompt=args.prompt_tokens, **wish)
    more = {
        "tokens_per_s": 1 / found["s_per_token"],
        "speed_up": found["speedup"],
        "later_speed_up": found["later_speedup"],
        "tokens_per_round": found["tokens_per_round"],
        "acceptance": acceptance,
        "identical": found["identical"],
        "differences": found["differences"],
    }
    took, read = found["s_per_token"], found["bytes_per_token"]
    return Figure(
        name=name,
        ladder=found["ladder"],
        s_per_token=took,
        bytes=read,
        floor_s=read / rate,
        planned_s=foretold,
        peers=peers,
        more=more,
    )


@torch.no_grad()
def transformers(
    session: Session, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Seconds a token of its eager decoding, its prompt lookup and its assisted generation, and what they wrote."""
    checkpoint = open_checkpoint(args.model)
    dtype = DTYPES[choose_dtype(args.dtype, checkpoint.stored_dtype, device)[0]]
    model = load(checkpoint, dtype, device)
    ids = load_tokenizer(checkpoint).encode(Path(args.text).read_text(encoding="utf-8"))[: args.prompt_tokens]
    prompt = torch.tensor([ids], device=device)
    found, wrote, rounds = {}, {}, {}
    ways: dict[str, dict[str, Any]] = {
        EAGER: {},
        "Transformers, prompt lookup": {"prompt_lookup_num_tokens": 5},
    }
    if args.draft:
        ways[ASSISTED] = {"assistant_model": load(open_checkpoint(args.draft), dtype, device)}
    if args.compiled:  # a static cache has `generate` compile its passes
        ways["Transformers, compiled"] = {"cache_implementation": "static"}
    for name, options in ways.items():
        try:
            most = min(PEER_TOKENS, args.max_tokens)
            # The first compiles, for a cache of its length.
            for tokens in (most if "cache_implementation" in options else 16, most):
                clock = Clock()
                out = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=tokens,
                    do_sample=False,
                    streamer=clock,
                    **options,
                )
        except Exception as error:  # the others may run
            session.fail(name, error)
            continue
        (begun, few), (ended, many) = clock.marks[1], clock.marks[-1]
        found[name], wrote[name] = (ended - begun) / (many - few), [int(token) for token in out[0, len(ids) :]]
        rounds[name] = (many - few) / (len(clock.marks) - 2)
    session.head["transformers_tokens_per_round"] = rounds
    session.head["transformers_identical"] = {name: written == wrote.get(EAGER) for name, written in wrote.items()}
    del model, ways
    release()
    return found, wrote


def load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint as a Transformers model that writes all tokens that were asked for."""
    model, source = random_peer(checkpoint.config, dtype, device.type), checkpoint.source
    missing = model.load_state_dict({name: source.read(name) for name in source.names()}, strict=False)
    if any("lm_head" not in name for name in missing.missing_keys) or missing.unexpected_keys:
        raise ValueError(f"weights do not fit: {missing}")
    model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


class Clock:
    """A streamer: when how many tokens were there. The first call brings the prompt."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def put(self, ids: torch.Tensor) -> None:
        before = self.marks[-1][1] if self.marks else 0
        self.marks.append((time.perf_counter(), before + ids.numel()))

    def end(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
