"""Trains a small OPT (ReLU) whose FFNs need few neurons for any one token, and reports how few on text that it has not seen.

    python benchmarks/relu_opt.py --text FILE [--text FILE]... -o DIR [--report FILE] [--steps 2000] [--device auto] [--seed 0]

The loss is cross-entropy plus `--sparsity` times the *tail share*: the part of a layer's contributions (activation times norm of the
neuron's output weights) that lies outside a token's own largest `--target` of the neurons. It is L1 on what should be silent and
leaves alone what carries the token, so FFNs keep their weight, and each token may have another set. It sets in once a quarter of the
steps has been trained without it: from the first step on, all tokens would get the same few neurons. The last 5% of each text is held
out; the checkpoint kept is the one with the lowest held-out loss at 10% of the neurons, of those trained with the full penalty. DIR
becomes an ordinary Hugging Face checkpoint with a byte-level BPE of `--vocab` entries.

Printed: perplexity of all neurons, of each token's best 10% and 5% (oracle), of the same 10% for every token (those that contribute
most on held-out text), and without FFNs; by layer the share of neurons above zero for a token (mean, 99th percentile), for any of
1,000 tokens in a row, and for any token at all. On --report FILE, else on the held-out text. The last line is JSON.

The defaults are for a GPU. On two cores: --hidden 128 --layers 3 --ffn 1536 --vocab 2048 --context 128 --batch 8 --steps 800 --lr 2e-3.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from rowcast.calibration.text import read_text
from rowcast.errors import UserError
from rowcast.runtime.device import choose_device

HEAD_DIM = 64
HELD_OUT = 0.05
BEST, FEWER = 0.10, 0.05
UNION_TOKENS = 1000
CHECKS = 20
"""How many times held-out loss is measured while training."""
CHECK_WINDOWS = 64
"""At most, spread over the held-out text."""
EVAL_TOKENS = 8192
EOS, PAD = "</s>", "<pad>"

Act = Callable[[int, Tensor, Tensor], "Tensor | None"]
"""(layer, activations after ReLU [T, N], norms of the neurons' output weights [N]) -> activations to use instead, or None."""


@contextmanager
def at_neurons(model: Any, act: Act) -> Iterator[None]:
    """While open, `act` sees the neurons of each layer between FC1's ReLU and FC2."""

    def hook(layer: int) -> Callable[[nn.Linear, tuple[Tensor]], Tensor | None]:
        return lambda fc2, inputs: act(layer, inputs[0], fc2.weight.detach().norm(dim=0))

    handles = [each.fc2.register_forward_pre_hook(hook(i)) for i, each in enumerate(model.model.decoder.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_ffns(model: Any) -> Iterator[None]:
    """While open, FFNs add nothing, not even their bias."""
    handles = [each.fc2.register_forward_hook(lambda _, __, y: torch.zeros_like(y)) for each in model.model.decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def neurons_in(share: float, count: int) -> int:
    return max(1, round(share * count))


def tail_share(h: Tensor, norms: Tensor, share: float) -> Tensor:  # [T, N], [N] -> []
    """Mean over tokens of the part of sum(h * norms) outside the token's `share` largest. Gradients reach that part alone."""
    scores = h.float() * norms
    least = scores.detach().topk(neurons_in(share, h.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
    tail = (scores * (scores < least)).sum(-1)
    return (tail / scores.detach().sum(-1).clamp(min=1e-6)).mean()


def best_share(share: float) -> Act:
    """Each token keeps the `share` of the neurons that contribute most to its own output."""

    def act(_: int, h: Tensor, norms: Tensor) -> Tensor:
        kept = (h * norms).topk(neurons_in(share, h.shape[-1])).indices
        return torch.zeros_like(h).scatter(-1, kept, h.gather(-1, kept))

    return act


@torch.inference_mode()
def loss_of(model: Any, windows: Tensor) -> float:  # [n, L]
    """Mean negative log-likelihood in nats, in float32, of all tokens but each window's first."""
    model.eval()
    total = 0.0
    for ids in torch.split(windows, max(1, EVAL_TOKENS // windows.shape[1])):
        logits = model(ids, use_cache=False).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@torch.inference_mode()
def static_share(model: Any, windows: Tensor, share: float) -> Act:
    """Every token keeps the same neurons: the `share` with the largest contributions over `windows` [n, L]."""
    sums = [torch.zeros(each.fc1.out_features, device=windows.device) for each in model.model.decoder.layers]

    def note(layer: int, h: Tensor, norms: Tensor) -> None:
        sums[layer] += (h * norms).sum(0)

    with at_neurons(model, note):
        loss_of(model, windows)
    masks = [each >= each.topk(neurons_in(share, len(each))).values[-1] for each in sums]
    return lambda layer, h, _: h * masks[layer]


@torch.inference_mode()
def activity(model: Any, windows: Tensor) -> list[dict[str, float]]:
    """By layer, shares of the neurons above zero: `mean` and `p99` over tokens, `union` of 1,000 tokens, `ever`."""
    seen: list[list[Tensor]] = [[] for _ in model.model.decoder.layers]

    def note(layer: int, h: Tensor, _: Tensor) -> None:
        seen[layer].append((h > 0).cpu())

    with at_neurons(model, note):
        loss_of(model, windows)
    report = []
    for masks in seen:
        active = torch.cat(masks)
        shares = active.float().mean(-1)
        unions = [rows.any(0).float().mean() for rows in torch.split(active, UNION_TOKENS) if len(rows) == UNION_TOKENS]
        report.append(
            {
                "mean": float(shares.mean()),
                "p99": float(shares.quantile(0.99)),
                "union": float(torch.stack(unions).mean()),
                "ever": float(active.any(0).float().mean()),
            }
        )
    return report


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE; no token is put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:  # -> [T]
    """All texts in a row, each with its end marked."""
    return torch.tensor([token for text in texts for token in tokenizer.encode(text + EOS).ids])


def windows_of(ids: Tensor, context: int, name: str) -> Tensor:  # [T] -> [n, context]
    """Neighbours without overlap; what is left of the last one is dropped."""
    count = len(ids) // context
    if count * context < UNION_TOKENS:
        raise UserError(
            f"{name} has {len(ids)} tokens in windows of {context}: at least {UNION_TOKENS} are needed, give more text"
        )
    return ids[: count * context].view(count, context)


def new_model(tokenizer: Tokenizer, args: argparse.Namespace) -> Any:
    if args.hidden % HEAD_DIM:
        raise UserError(f"--hidden {args.hidden} is not a multiple of {HEAD_DIM}: heads have that many dimensions")
    config = OPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        ffn_dim=args.ffn,
        num_attention_heads=args.hidden // HEAD_DIM,
        max_position_embeddings=args.context,
        dropout=args.dropout,
        attention_dropout=args.dropout,
        bos_token_id=tokenizer.token_to_id(EOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return OPTForCausalLM(config)


def train(model: Any, ids: Tensor, held_out: Tensor, args: argparse.Namespace) -> int:
    """Train on random windows of `ids` [T]; leaves the parameters of the best check in `model`, returns that check's step."""
    device = ids.device
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    warm, dense_steps, full_steps = max(1, args.steps // 30), args.steps // 4, args.steps // 2
    every = max(1, args.steps // CHECKS)
    tails: list[Tensor] = []
    best, kept, kept_step, start = math.inf, {}, 0, time.perf_counter()

    def note(_: int, h: Tensor, norms: Tensor) -> None:
        tails.append(tail_share(h, norms, args.target))

    for step in range(1, args.steps + 1):
        model.train()
        warmth, done = min(1.0, step / warm), step / args.steps
        for group in optimiser.param_groups:
            group["lr"] = args.lr * warmth * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        starts = torch.randint(len(ids) - args.context, (args.batch, 1), device=device)
        batch = ids[starts + torch.arange(args.context + 1, device=device)]
        tails.clear()
        with at_neurons(model, note), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        tail = torch.stack(tails).mean()
        weight = args.sparsity * min(1.0, max(0, step - dense_steps) / max(1, full_steps - dense_steps))
        (loss + weight * tail).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        if step % every and step != args.steps:
            continue
        dense = loss_of(model, held_out)
        with at_neurons(model, best_share(BEST)):
            sparse = loss_of(model, held_out)
        active = sum(layer["mean"] for layer in activity(model, held_out)) / args.layers
        print(
            f"step {step:5} {time.perf_counter() - start:5.0f} s  train {loss.item():.3f}  held out {dense:.3f}, "
            f"at {BEST:.0%} {sparse:.3f}  tail {tail.item():.3f}  active {active:.1%}",
            flush=True,
        )
        if step >= full_steps and sparse < best:
            best, kept_step = sparse, step
            kept = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return kept_step


def report(model: Any, windows: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Perplexities and activity on `windows` [n, L]; `held_out` chooses the static set. Prints a table."""
    choices: dict[str, Any] = {
        "dense": nullcontext(),
        "best 10%": at_neurons(model, best_share(BEST)),
        "best 5%": at_neurons(model, best_share(FEWER)),
        "static 10%": at_neurons(model, static_share(model, held_out, BEST)),
        "no FFNs": without_ffns(model),
    }
    perplexity = {}
    for name, choice in choices.items():
        with choice:
            perplexity[name] = math.exp(loss_of(model, windows))
        print(f"{name:12} perplexity {perplexity[name]:9.2f}  {perplexity[name] / perplexity['dense']:7.4f} of dense")
    layers = activity(model, windows)
    print(f"layer  active: mean    p99   of {UNION_TOKENS:,} tokens   ever")
    for i, layer in enumerate(layers):
        print(f"{i:5} {layer['mean']:13.1%} {layer['p99']:6.1%} {layer['union']:17.1%} {layer['ever']:6.1%}")
    return {"perplexity": perplexity, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", required=True, help="plain text to train on")
    parser.add_argument("--report", type=Path, help="plain text to report on")
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=512, help="tokens of a window, and of the model's context")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=2048, help="neurons of a layer")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--target", type=float, default=0.06, help="share of the neurons that is free of the penalty")
    parser.add_argument(
        "--sparsity", type=float, default=0.3, help="weight of the penalty, rising from a quarter to half of the steps"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device, _ = choose_device(args.device)
    torch.manual_seed(args.seed)
    texts = [read_text(path)[0] for path in args.text]
    cuts = [round(len(text) * (1 - HELD_OUT)) for text in texts]
    first, last = [t[:cut] for t, cut in zip(texts, cuts, strict=True)], [t[cut:] for t, cut in zip(texts, cuts, strict=True)]
    tokenizer = train_tokenizer(first, args.vocab)
    ids = encode(tokenizer, first).to(device)
    held_out = windows_of(encode(tokenizer, last).to(device), args.context, "the held-out text")
    windows = held_out
    if args.report:
        told = encode(tokenizer, [read_text(args.report)[0]]).to(device)
        windows = windows_of(told, args.context, str(args.report))
    model = new_model(tokenizer, args).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {len(ids):,} tokens to train on, {windows.numel():,} to report on, {device}")
    step = train(model, ids, held_out[:: -(-len(held_out) // CHECK_WINDOWS)], args)
    model.save_pretrained(args.out)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    wrapped.save_pretrained(args.out)
    found = report(model, windows, held_out)
    settings = {k: v for k, v in vars(args).items() if k not in ("text", "report", "out")}
    print(json.dumps({"settings": settings, "parameters": parameters, "step": step, "tokens": windows.numel(), **found}))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"relu_opt.py: {error}", file=sys.stderr)
        sys.exit(2)
