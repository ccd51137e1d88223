"""Flash-decoding, and rotation with append, against torch references: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from rowcast.kernels.attention import attend, attend_entries  # noqa: E402
from rowcast.kernels.gpu import decoding, products  # noqa: E402
from rowcast.kernels.gpu.decoding import Chunks, Tiles, decode, splits_for, tiles_for, tiles_for_list  # noqa: E402
from rowcast.kernels.gpu.heads import head_rows  # noqa: E402
from rowcast.kernels.gpu.rotate import apart, rotate_append  # noqa: E402
from rowcast.kernels.gpu.select import Chosen  # noqa: E402
from rowcast.runtime.rope import apply_rope  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]
SMALL = Tiles(32, 32, 64, 2, 2, 4)
"""Short splits and tiles, so that short contexts cross their boundaries."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter makes Python integers of arrays of one element, which NumPy 2.4 refuses."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    monkeypatch.setattr(decoding, "_COMBINED", 128)  # fewer programs, which the interpreter runs one by one
    patch = interpreter._patch_lang_tensor

    def repaired(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", repaired)


class Store(NamedTuple):
    """Sequences in a paged store; what they do not own is NaN."""

    keys: Tensor
    values: Tensor
    tables: Tensor
    ends: list[int]

    def entries(self, sequence: int) -> tuple[Tensor, Tensor]:  # [L, K, d] float64 each
        blocks, end = self.tables[sequence].long(), self.ends[sequence]
        return (self.keys[blocks].flatten(0, 1)[:end].double(), self.values[blocks].flatten(0, 1)[:end].double())


def make_store(
    ends: list[int], kv_heads: int, size: int, dtype: torch.dtype, *, block_size: int = 16, head_major: bool = False
) -> Store:
    """Room for sequences of `ends` entries, each in blocks anywhere."""
    each = -(-max(ends) // block_size)
    blocks = each * len(ends) + 2
    shape = (2, blocks, kv_heads, block_size, size) if head_major else (2, blocks, block_size, kv_heads, size)
    store = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    if head_major:
        store = store.transpose(2, 3)
    tables = torch.randperm(blocks, device=DEVICE)[: each * len(ends)].view(len(ends), each)
    for blocks_of, end in zip(tables, ends, strict=True):
        for position in range(0, end, block_size):
            some = min(block_size, end - position)
            store[:, blocks_of[position // block_size], :some] = torch.randn(2, some, kv_heads, size, device=DEVICE).to(dtype)
    return Store(store[0], store[1], tables.int(), ends)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def run(store: Store, q: Tensor, tokens: int, **options: Any) -> Tensor:
    """`decode` of the last tokens of each sequence."""
    starts = ints([end - tokens for end in store.ends])
    options.setdefault("most_entries", max(store.ends))
    options.setdefault("tiles", None if ON_GPU else SMALL)
    return decode(q, store.keys, store.values, store.tables, starts, scale=q.shape[2] ** -0.5, **options)


def expected(store: Store, q: Tensor, tokens: int, **options: Any) -> Tensor:
    parts = []
    for i in range(len(store.ends)):
        k, v = store.entries(i)
        parts.append(attend(q[i * tokens :][:tokens].double(), k, v, scale=q.shape[2] ** -0.5, **options))
    return torch.cat(parts)


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=TOLERANCE[found.dtype], atol=TOLERANCE[found.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "tokens", "ends"),
    [
        (2, 2, 64, 1, [1]),
        (4, 2, 64, 3, [70, 3]),
        (3, 1, 80, 5, [161]),
        (2, 2, 96, 2, [33, 100]),
        (4, 2, 128, 3, [200]),
        (2, 1, 256, 1, [65]),
        (37, 1, 64, 1, [80]),
    ],
)
def test_decode_is_attention(dtype: torch.dtype, heads: int, kv_heads: int, size: int, tokens: int, ends: list[int]) -> None:
    torch.manual_seed(1)
    store = make_store(ends, kv_heads, size, dtype, head_major=size == 96)
    q = torch.randn(tokens * len(ends), heads, size, device=DEVICE).to(dtype)
    assert_close(run(store, q, tokens), expected(store, q, tokens))


@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 50},
        {"window": 1},
        {"slopes": [0.5, 0.25, 0.125, 0.0625]},
        {"slopes": [0.5, 0.25, 0.125, 0.0625], "absolute_bias_scale": 0.125},
        {"slopes": [0.5, 0.25, 0.125, 0.0625], "window": 70},
    ],
    ids=str,
)
def test_windows_and_slopes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    options = {name: torch.tensor(value, device=DEVICE) if name == "slopes" else value for name, value in options.items()}
    store = make_store([210, 60], 2, 64, dtype)
    q = torch.randn(4, 4, 64, device=DEVICE).to(dtype)
    assert_close(run(store, q, 2, **options), expected(store, q, 2, **options))


def test_one_block_holds_a_sequence() -> None:
    torch.manual_seed(3)
    store = make_store([77, 90], 2, 64, torch.float32, block_size=101, head_major=True)
    q = torch.randn(4, 2, 64, device=DEVICE)
    assert store.tables.shape == (2, 1)
    assert_close(run(store, q, 2), expected(store, q, 2))


def test_tokens_that_are_not_real() -> None:
    torch.manual_seed(4)
    tokens, counts = 3, [0, 1, 3]
    store = make_store([20, 40, 60], 1, 64, torch.float32)
    q = torch.randn(9, 20, 64, device=DEVICE)
    wanted = expected(store, q, tokens)
    for i, count in enumerate(counts):
        store.keys[store.tables[i].long()].flatten(0, 1)[store.ends[i] - tokens + count :] = float("nan")
        wanted[i * tokens + count : (i + 1) * tokens] = 0
    out = torch.full((9, 24, 64), float("nan"), device=DEVICE)[:, :20]
    found = run(store, q, tokens, counts=ints(counts), out=out)
    assert found is out
    assert_close(found, wanted)


# NumPy's products of float16 depend on the number of columns.
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
def test_a_token_alone_has_the_same_bits(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """For any number of tokens, other sequences and bound on the context; at boundaries of tiles and splits too."""
    torch.manual_seed(5)
    cut = tiles_for(kv_heads, 64, dtype) if ON_GPU else SMALL
    edges = [cut.entries, cut.fine, cut.knee, 2 * cut.knee + 4 * cut.fine] if ON_GPU else [cut.knee, 2 * cut.knee]
    for edge in edges:
        for window in (None, 37):
            end = edge + 5
            store = make_store([end, 9], kv_heads, 64, dtype)
            q = torch.randn(2, 7, heads, 64, device=DEVICE).to(dtype)
            several = run(store, q.flatten(0, 1), 7, tiles=cut, window=window)
            for i in range(7) if ON_GPU else (0, 4):
                first = end - 7 + i
                alone = decode(
                    q[:1, i],
                    store.keys,
                    store.values,
                    store.tables[:1],
                    ints([first]),
                    scale=64**-0.5,
                    most_entries=first + 1 + 300 * (i == 4),
                    window=window,
                    tiles=cut,
                )
                assert torch.equal(alone[0], several[i]), (edge, window, i)


@pytest.mark.parametrize(
    ("dtype", "size", "heads", "kv_heads"),
    [
        (torch.bfloat16, 64, 71, 1),
        (torch.bfloat16, 80, 4, 2),
        (torch.bfloat16, 96, 3, 3),
        (torch.bfloat16, 128, 2, 2),
        (torch.bfloat16, 128, 8, 2),
        (torch.bfloat16, 128, 8, 1),
        (torch.bfloat16, 256, 8, 2),
        (torch.float16, 128, 8, 2),
        (torch.float32, 128, 8, 2),
    ],
    ids=str,
)
@pytest.mark.gpu
def test_bits_on_a_gpu(dtype: torch.dtype, size: int, heads: int, kv_heads: int) -> None:
    """Of 1, 7 and 16 tokens, whatever the bound on the context."""
    torch.manual_seed(6)
    for end in (30, 1000, 2055, 4500):
        store = make_store([end, end - 3], kv_heads, size, dtype)
        q = torch.randn(2, 16, heads, size, device=DEVICE).to(dtype)
        several = run(store, q.flatten(0, 1), 16, overlap=False).view(2, 16, heads, size)
        assert torch.equal(run(store, q.flatten(0, 1), 16, most_entries=5000).view(2, 16, heads, size), several)
        assert_close(several.flatten(0, 1), expected(store, q.flatten(0, 1), 16))
        cut = store._replace(ends=[e - 9 for e in store.ends])
        assert torch.equal(run(cut, q[:, :7].flatten(0, 1), 7).view(2, 7, heads, size), several[:, :7])
        for i in (0, 3, 15):
            one = store._replace(ends=[e - 15 + i for e in store.ends])
            assert torch.equal(run(one, q[:, i], 1), several[:, i]), (end, i)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("kv_heads", "listed", "count"),
    [(6, [4, 1, 5], 2), (6, [0, 3], 0), (2, [5, 0, 3], 3), (2, [2, 1, 5], 2), (2, [1, 3, 1], 3), (2, [-1, 4, -1], 3)],
)
def test_chosen_heads(dtype: torch.dtype, kv_heads: int, listed: list[int], count: int) -> None:
    torch.manual_seed(7)
    store = make_store([45, 70], kv_heads, 64, torch.float32)
    q = torch.randn(4, 6, 64, device=DEVICE)
    wanted = expected(store, q, 2)[:, listed]
    wanted[:, count:] = 0
    wanted[:, [h < 0 for h in listed]] = 0
    chosen = [h for h in listed[:count] if h >= 0]
    for head in range(kv_heads):
        if not any(h // (6 // kv_heads) == head for h in chosen):
            store.keys[:, :, head] = float("nan")  # not even read
            store.values[:, :, head] = float("nan")
    ids = torch.tensor(listed, dtype=dtype, device=DEVICE)
    assert_close(run(store, q, 2, heads=ids, head_count=ints([count])), wanted)


def make_chunks(ends: list[int], tokens: int, kv_heads: int, count: int, size: int, sinks: int) -> Chunks:
    """Different chunks for each head, ascending, between sinks and recent entries."""
    recent = [end - tokens - 9 - 4 * i for i, end in enumerate(ends)]
    ids = [
        [(torch.randperm(limit // size - sinks // size)[:count] + sinks // size).sort().values for _ in range(kv_heads)]
        for limit in recent
    ]
    return Chunks(torch.stack([torch.stack(of) for of in ids]).int().to(DEVICE), size, sinks, ints(recent))


def expected_of_chunks(store: Store, q: Tensor, tokens: int, chunks: Chunks, **options: Any) -> Tensor:
    parts = []
    for i, end in enumerate(store.ends):
        k, v = store.entries(i)
        at = (chunks.ids[i].long()[:, :, None] * chunks.size + torch.arange(chunks.size, device=DEVICE)).flatten(1)
        sinks = torch.arange(chunks.sinks, device=DEVICE).expand(len(at), -1)
        recent = torch.arange(int(chunks.recent[i]), end, device=DEVICE).expand(len(at), -1)
        at = torch.cat((sinks, at, recent), 1)  # [K, n]
        parts.append(
            attend_entries(
                q[i * tokens :][:tokens].double(),
                k.transpose(0, 1).gather(1, at[..., None].expand(-1, -1, k.shape[2])),
                v.transpose(0, 1).gather(1, at[..., None].expand(-1, -1, k.shape[2])),
                scale=q.shape[2] ** -0.5,
                key_positions=at,
                query_positions=torch.arange(end - tokens, end, device=DEVICE),
                **options,
            )
        )
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("size", "sinks", "block_size", "options"),
    [(8, 16, 16, {}), (16, 0, 32, {"window": 90}), (8, 8, 300, {"slopes": [0.5, 0.25, 0.125, 0.0625]})],
)
def test_chosen_chunks(size: int, sinks: int, block_size: int, options: dict[str, Any]) -> None:
    torch.manual_seed(8)
    options = {name: torch.tensor(value, device=DEVICE) if name == "slopes" else value for name, value in options.items()}
    tokens, ends = 2, [200, 150]
    store = make_store(ends, 2, 64, torch.float32, block_size=block_size)
    chunks = make_chunks(ends, tokens, 2, 5, size, sinks)
    q = torch.randn(4, 4, 64, device=DEVICE)
    found = run(store, q, tokens, chunks=chunks, **options)
    assert_close(found, expected_of_chunks(store, q, tokens, chunks, **options))
    for i in range(tokens) if ON_GPU else [0]:
        one = store._replace(ends=[end - tokens + 1 + i for end in ends])
        assert torch.equal(run(one, q[i::tokens], 1, chunks=chunks, most_shown=130, **options), found[i::tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 8, 32])
def test_long_lists_in_16_bits(kv_heads: int) -> None:
    """Over splits of all lengths; a token alone has the same bits."""
    torch.manual_seed(18)
    store = make_store([7000], kv_heads, 128, torch.bfloat16)
    chunks = make_chunks([7000], 7, kv_heads, 500, 8, 16)
    q = torch.randn(7, kv_heads, 128, device=DEVICE, dtype=torch.bfloat16)
    found = run(store, q, 7, chunks=chunks)
    assert_close(found, expected_of_chunks(store, q, 7, chunks))
    for i in range(7):
        assert torch.equal(run(store._replace(ends=[7000 - 6 + i]), q[i : i + 1], 1, chunks=chunks), found[i : i + 1])


def test_lists_over_splits_of_several_lengths() -> None:
    torch.manual_seed(19)
    store = make_store([300], 2, 64, torch.float32)
    chunks = make_chunks([300], 2, 2, 30, 8, 16)
    q = torch.randn(2, 2, 64, device=DEVICE)
    cut = Tiles(32, 32, 128, 2, 2, 4)
    assert_close(run(store, q, 2, chunks=chunks, tiles=cut), expected_of_chunks(store, q, 2, chunks))


def test_chunks_that_are_missing_are_not_read() -> None:
    """Nor do they count: the list may have more places than the sequence has entries."""
    torch.manual_seed(9)
    store = make_store([200, 60], 2, 64, torch.float32)
    q = torch.randn(4, 2, 64, device=DEVICE)
    chunks = make_chunks([200], 2, 2, 3, 8, 8)
    ids = torch.full((2, 2, 40), -1, dtype=torch.int32, device=DEVICE)
    ids[0, :, 5:8] = chunks.ids[0]
    first = store._replace(tables=store.tables[:1], ends=[200])
    wanted = torch.cat((expected_of_chunks(first, q[:2], 2, chunks), expected(store, q, 2)[2:]))
    assert_close(run(store, q, 2, chunks=Chunks(ids, 8, 8, ints([int(chunks.recent[0]), 8]))), wanted)


@pytest.mark.parametrize("end", [5, 8, 9, 3])
def test_listed_chunks_of_a_sequence_shorter_than_the_sinks(end: int) -> None:
    """No token sees places among the sinks that later tokens, or nobody, will fill."""
    torch.manual_seed(15)
    store = make_store([end], 2, 64, torch.float32)
    q = torch.randn(2, 4, 64, device=DEVICE)
    ids = torch.full((1, 2, 10), -1, dtype=torch.int32, device=DEVICE)
    assert_close(run(store, q, 2, chunks=Chunks(ids, 8, 8, ints([8]))), expected(store, q, 2))


@pytest.mark.skipif(ON_GPU, reason="looks into the interpreter")
@pytest.mark.parametrize(
    ("ends", "bound", "counts", "heads"),
    [([40, 60], 70, None, None), ([40, 60], 60, None, None), ([40, 130], 130, None, [1, 5]), ([200, 9], 200, [0, 0], None)],
    ids=["short below a long bound", "all in use", "some heads", "no tokens"],
)
def test_every_program_waits_before_it_touches_entries(
    monkeypatch: pytest.MonkeyPatch, ends: list[int], bound: int, counts: list[int] | None, heads: list[int] | None
) -> None:
    """Where launches overlap, the end of a kernel tells the next one that those before it have ended, if it has waited for them.

    Integers say where entries lie, whose they are and how many: they were written long before.
    """
    from triton.language.extra import cuda
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    programs: list[int] = []  # of each launch
    waited: list[set[tuple[int, int, int]]] = []

    def start(*grid: int) -> None:
        programs.append(math.prod(grid))
        waited.append(set())
        type(builder).set_grid_dim(builder, *grid)

    def touch(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            where = name == "create_masked_load" and args[0].get_element_ty().is_int()
            assert where or builder.grid_idx in waited[-1]
            return getattr(type(builder), name)(builder, *args, **kwargs)

        return call

    monkeypatch.setattr(builder, "set_grid_dim", start)
    for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
        monkeypatch.setattr(builder, name, touch(name))
    monkeypatch.setattr(cuda, "gdc_wait", lambda: waited[-1].add(builder.grid_idx))
    monkeypatch.setattr(cuda, "gdc_launch_dependents", lambda: None)
    torch.manual_seed(16)
    store = make_store(ends, 2, 64, torch.float32)
    q = torch.randn(4, 6, 64, device=DEVICE)
    options = {"counts": None if counts is None else ints(counts), "heads": None if heads is None else ints(heads)}
    found = run(store, q, 2, most_entries=bound, overlap=True, **options)
    assert len(programs) == 2
    assert [len(each) for each in waited] == programs
    wanted = expected(store, q, 2) if counts is None else torch.zeros(4, 6, 64)
    assert_close(found, wanted if heads is None else wanted[:, heads])


def test_splits_of_a_context() -> None:
    cut = Tiles(64, 64, 2048, 4, 3, 4)
    assert [splits_for(cut, n) for n in (0, 1, 64, 65, 2048, 2049, 4096, 4097, 8192, 16_384)] == [
        1,
        1,
        1,
        2,
        32,
        33,
        48,
        49,
        64,
        80,
    ]
    assert splits_for(cut, 124_928) == 80 + 106
    assert splits_for(cut._replace(levels=1), 4097) == 32 + 17


def test_all_programs_of_a_list_run_at_once() -> None:
    """On 132 multiprocessors, two on each; short lists have short splits."""
    for kv_heads, listed in ((1, 4096), (8, 4096), (16, 4096), (32, 1024), (32, 4096), (40, 8192), (32, 50), (8, 1)):
        cut = tiles_for_list(kv_heads, 128, torch.bfloat16, listed)
        assert cut.fine % cut.entries == 0 and cut.knee % (2 * cut.fine) == 0 and cut.levels >= 1
        first, ends = 0, []
        while first < listed:  # as the kernel cuts
            level = max(0, (first // cut.knee).bit_length()) if first >= cut.knee else 0
            first += cut.fine << min(level, cut.levels)
            ends.append(first)
        assert len(ends) == splits_for(cut, listed) and ends[0] <= 256
        if 128 * 64 <= kv_heads * listed <= 256 * 1024:
            assert 128 <= kv_heads * len(ends) <= 2 * 264, (kv_heads, listed, len(ends))
    assert tiles_for_list(8, 64, torch.float32, 4096) == tiles_for(8, 64, torch.float32)


@pytest.mark.gpu
def test_what_follows_waits_for_attention() -> None:
    """Also where contexts are short below a long bound, so that most programs have nothing to do but to wait."""
    torch.manual_seed(17)
    ends = [2000] * 32
    store = make_store(ends, 8, 128, torch.bfloat16)
    q, weight = torch.randn(32, 32, 128, device=DEVICE).bfloat16(), torch.randn(64, 4096, device=DEVICE).bfloat16()
    out, starts = torch.empty_like(q), ints([end - 1 for end in ends])

    def call(bound: int) -> Tensor:
        out.fill_(torch.nan)
        decode(q, store.keys, store.values, store.tables, starts, scale=128**-0.5, most_entries=bound, out=out)
        return products.rows_in(weight, out.flatten(1)[:16])

    wanted = call(ends[0])
    assert torch.equal(call(4096), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(4096)
    for _ in range(50):
        graph.replay()
        assert torch.equal(found, wanted)


def test_heads_beyond_the_count_are_none() -> None:
    """Else attention would write the same head for each of them."""
    own = torch.tensor([[True, False, True, True], [False, True, True, True]], device=DEVICE)
    found = head_rows(Chosen(ints([2, 5, 1, 7]), ints([2]), own), 4)
    assert found.own is not None and found.count is not None
    assert found.heads.tolist() == [2, 5, -1, -1] and found.count.tolist() == [8] and found.own[:, 2:].sum() == 0
    assert found.rows[:8].tolist() == [*range(8, 12), *range(20, 24)] and 0 <= found.rows.min() <= found.rows.max() < 32


@pytest.mark.gpu
def test_replays_follow_lengths() -> None:
    """A captured call reads starts, counts and tables when it is replayed."""
    torch.manual_seed(10)
    store = make_store([5000, 700], 2, 128, torch.bfloat16)
    q = torch.randn(14, 8, 128, device=DEVICE).bfloat16()
    starts, counts = ints([0, 0]), ints([7, 7])

    def call() -> Tensor:
        return decode(q, store.keys, store.values, store.tables, starts, counts, scale=128**-0.5, most_entries=5120)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for ends in ([7, 600], [4990, 9], [2000, 700], [5000, 130]):
        starts.copy_(ints([end - 7 for end in ends]))
        graph.replay()
        assert_close(out, expected(store._replace(ends=ends), q, 7))


def reference_rotation(
    parts: list[Tensor], rotation: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None, clip: float | None
) -> list[Tensor]:
    """q, k and v [N, n, d] as the decoder's torch operations make them, in float64 but for the roundings that these do."""
    dtype = parts[0].dtype
    if clip is not None:
        parts = [part.clamp(-clip, clip) for part in parts]
    if norms is not None:
        pairs = zip(parts, norms, strict=False)
        normed = [torch.nn.functional.rms_norm(x.double(), x.shape[-1:], w.double(), 1e-5) for x, w in pairs]
        parts = [*(x.to(dtype) for x in normed), parts[2]]
    if rotation is not None:
        cos, sin = (angle.double() for angle in rotation)
        parts = [*(apply_rope(x.double(), cos, sin) for x in parts[:2]), parts[2]]
    return parts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotates", "norms", "clip"),
    [
        (4, 2, 64, True, False, None),
        (5, 1, 80, True, True, None),
        (3, 3, 96, False, False, 0.7),
        (9, 3, 128, True, True, 0.7),
        (2, 2, 256, True, False, None),
    ],
)
def test_rotate_append(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, rotates: bool, norms: bool, clip: float | None
) -> None:
    torch.manual_seed(11)
    tokens = 5
    fused = torch.randn(tokens, (heads + 2 * kv_heads) * size + 16, device=DEVICE).to(dtype)[:, 16:]
    parts = list(apart(fused, heads, kv_heads))
    if kv_heads == heads:  # separate tensors
        parts = [part.clone() for part in parts]
    angles = torch.randn(tokens, 1, size // 2, device=DEVICE)
    rotation = (
        (torch.cat((angles.cos(),) * 2, -1).to(dtype), torch.cat((-angles.sin(), angles.sin()), -1).to(dtype))
        if rotates
        else None
    )
    weights = (torch.rand(size, device=DEVICE).to(dtype), torch.rand(size, device=DEVICE).to(dtype)) if norms else None
    wanted = reference_rotation(parts, rotation, weights, clip)
    shape = (4, kv_heads, 16, size)
    keys, values = (torch.full(shape, 9.0, dtype=dtype, device=DEVICE).transpose(1, 2) for _ in range(2))
    slots = torch.tensor([17, 3, -1, 63, 16], device=DEVICE)
    cos, sin = rotation or (None, None)
    q_norm, k_norm = weights or (None, None)
    q, k, v = parts
    found = rotate_append(q, k, v, keys, values, slots, cos, sin, q_norm=q_norm, k_norm=k_norm, eps=1e-5, clip=clip)
    assert_close(found, wanted[0])
    for store, entries in zip((keys, values), wanted[1:], strict=True):
        filled = torch.full((64, kv_heads, size), 9.0, dtype=torch.float64, device=DEVICE)
        filled[slots[slots >= 0]] = entries.double()[slots >= 0]
        assert_close(store.flatten(0, 1), filled)
