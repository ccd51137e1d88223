"""Chunk summaries, scores and choices against torch references: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from rowcast.kernels.gpu import retrieval  # noqa: E402
from rowcast.kernels.gpu.retrieval import choose_chunks, chunk_scores, summarise  # noqa: E402
from rowcast.runtime.kv.sizes import Summary  # noqa: E402
from rowcast.runtime.kv.summaries import Summaries  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes Python integers of arrays of one element, which NumPy 2.4 refuses."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def repaired(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", repaired)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["bounds", "mean"])
@pytest.mark.parametrize(("kv_heads", "size", "chunk", "head_major"), [(3, 64, 8, False), (5, 80, 16, True), (1, 128, 4, True)])
def test_summaries_of_new_chunks(
    dtype: torch.dtype, score: Literal["bounds", "mean"], kv_heads: int, size: int, chunk: int, head_major: bool
) -> None:
    """As `Summaries.update`, whatever the number of programs; nothing else is written."""
    torch.manual_seed(0)
    shape = (2, 9, kv_heads, 16, size) if head_major else (2, 9, 16, kv_heads, size)
    keys = torch.randn(shape, device=DEVICE).to(dtype)
    if head_major:
        keys = keys.transpose(2, 3)
    tables, old, new = torch.randperm(9, device=DEVICE)[:8].view(2, 4).int(), [13, 5], [50, 7]
    reference = Summaries(Summary(score, chunk), [(slice(None), keys.contiguous())], keys.device)
    reference.kept.fill_(7.0)
    kept = reference.kept.clone()
    for i in range(2):
        reference.update(tables[i].tolist(), old[i], new[i])
    assert not torch.equal(kept, reference.kept)
    summarise(keys, tables, ints(old), ints(new), kept, chunk=chunk, score=score, programs=2)
    torch.testing.assert_close(kept, reference.kept, rtol=0 if score == "bounds" else 1e-2, atol=0 if score == "bounds" else 1e-2)


def reference_scores(
    queries: Tensor, summaries: list[Tensor], span: range, chunk: int, length: int, options: dict[str, Any]
) -> Tensor:
    """As `Retrieval.select`, in float64: queries [n, H, d], summaries [K, chunks, d] each -> [K, chunks in the span]."""
    tokens, heads, size = queries.shape
    kv_heads = summaries[0].shape[0]
    rows = queries.double().view(tokens, kv_heads, -1, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)
    keys = [part.double()[:, span.start : span.stop].transpose(1, 2) for part in summaries]
    scores = rows @ keys[0] if len(keys) == 1 else rows.clamp(max=0) @ keys[0] + rows.clamp(min=0) @ keys[1]
    scores = scores * size**-0.5
    ends = torch.arange(span.start, span.stop, device=DEVICE) * chunk + chunk - 1
    if "slopes" in options:
        slopes = options["slopes"].double().view(kv_heads, -1).repeat_interleave(tokens, 1)
        scores += slopes[..., None] * ends * options.get("absolute_bias_scale", 1.0)
    if "windows" in options:
        positions = torch.arange(length - tokens, length, device=DEVICE).repeat(heads // kv_heads)
        scores = scores.masked_fill(ends <= positions[:, None] - int(options["windows"][0]), -1e30)
    averaged: Tensor = scores.softmax(-1).mean(1)
    return averaged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "parts", "options"),
    [
        (4, 2, 64, 2, {}),
        (2, 2, 80, 1, {}),
        (20, 1, 64, 2, {}),
        (4, 2, 64, 2, {"slopes": [0.03, 0.01, 0.003, 0.001]}),
        (4, 2, 64, 2, {"slopes": [0.03, 0.01, 0.003, 0.001], "absolute_bias_scale": 0.125}),
        (2, 1, 64, 1, {"windows": [300, 300]}),
    ],
    ids=str,
)
def test_scores(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, parts: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, one at a time, two sequences with different numbers of tokens and spans; over several splits."""
    monkeypatch.setattr(retrieval, "_SPLIT", 64)
    monkeypatch.setattr(retrieval, "WORK_BYTES", 1)
    torch.manual_seed(1)
    options = {
        name: torch.tensor(value, device=DEVICE, dtype=torch.int32 if name == "windows" else torch.float32)
        if isinstance(value, list)
        else value
        for name, value in options.items()
    }
    tokens, chunk, per_block, blocks = 3, 8, 2, 90
    kept = torch.randn(parts, 2, kv_heads, blocks, per_block, size, device=DEVICE).sort(0).values.to(dtype)
    tables = torch.randperm(blocks, device=DEVICE)[:80].view(2, 40).int()
    queries = torch.randn(2, 2, tokens, heads, size, device=DEVICE).to(dtype)
    spans, counts, lengths = [range(3, 71), range(2, 9)], [2, 3], [580, 99]
    if "windows" in options:
        options["lengths"] = ints(lengths)
    found = chunk_scores(
        queries,
        kept,
        tables,
        ints([span.start for span in spans]),
        ints([span.stop for span in spans]),
        scale=size**-0.5,
        chunk=chunk,
        most_chunks=75,
        counts=ints(counts),
        **options,
    )
    for i, span in enumerate(spans):
        for layer in range(2):
            own = [part[layer][:, tables[i].long()].flatten(1, 2) for part in kept]
            wanted = reference_scores(queries[layer, i, : counts[i]], own, span, chunk, lengths[i], options)
            bits = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(found[i, layer, :, span.start : span.stop].double(), wanted, rtol=bits, atol=1e-6)


def reference_choice(scores: Tensor, count: int, span: range) -> Tensor:  # [..., chunks] -> [..., count]
    best = scores[..., span.start : span.stop].sort(dim=-1, descending=True, stable=True).indices[..., :count] + span.start
    best = best.sort(-1).values
    padded: Tensor = torch.nn.functional.pad(best, (0, count - best.shape[-1]), value=-1)
    return padded.int()


@pytest.mark.parametrize(
    "chunks", [1, 40, 300, pytest.param(15_616, marks=pytest.mark.gpu), pytest.param(50_000, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("count", [0, 7, 33])
@pytest.mark.parametrize("kind", ["any", "ties", "equal", "small"])
def test_choice(chunks: int, count: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties at the edge, negative numbers, fewer chunks than wanted; over several tiles too."""
    if chunks == 300:
        monkeypatch.setattr(retrieval, "_MOST_HELD", 128)
    torch.manual_seed(2)
    scores = torch.randn(2, 1, 2, chunks, device=DEVICE)
    if kind == "ties":
        scores = scores.round()
    if kind == "equal":
        scores = torch.zeros_like(scores)
    if kind == "small":
        scores = (scores * 9).softmax(-1)
    spans = [range(chunks), range(min(2, chunks), max(min(2, chunks), chunks - 30))]
    found = choose_chunks(scores, count, ints([span.start for span in spans]), ints([span.stop for span in spans]))
    for i, span in enumerate(spans):
        assert torch.equal(found[i], reference_choice(scores[i], count, span)), i


def test_choices_go_to_slots_and_some_lists_stay() -> None:
    """Of three sequences the second has its last chunk before its first: its list stays. The others go to the rows of their slots."""
    torch.manual_seed(3)
    scores = torch.randn(3, 2, 2, 40, device=DEVICE)
    out = torch.full((4, 2, 2, 5), 7, dtype=torch.int32, device=DEVICE)
    choose_chunks(scores, 5, ints([2, 2, 0]), ints([40, -1, 3]), out=out, slots=ints([3, -1, 0]))
    assert torch.equal(out[3], reference_choice(scores[0], 5, range(2, 40)))
    assert torch.equal(out[0], reference_choice(scores[2], 5, range(3)))
    assert (out[1:3] == 7).all()
