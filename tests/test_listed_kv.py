"""The view that lists chunks shows what the one that copies them shows."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_interpreting import take_arrays_as_bounds

from rowcast.kernels import gpu
from rowcast.kernels.retrieval_sizes import layer_bytes
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.kv import ListedKV, PagedKV, Retrieval, SelectedKV, listed_bytes, selection
from rowcast.runtime.kv.sizes import LIST_WORK_BYTES, WORK_BYTES, ListWork, most_chunks, rounded_chunks
from rowcast.runtime.shard import Shard
from rowcast.runtime.step import SeqStep

take_arrays_as_bounds()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LLAMA = {
    "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 97, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SPECS = {
    "llama": spec_from_config(LLAMA),
    "bloom": spec_from_config({"model_type": "bloom", "vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "window": replace(spec_from_config(LLAMA), windows=(None, 30)),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", not torch.cuda.is_available())


class Twins:
    """A store, and two views of it that choose by the same queries."""

    def __init__(self, spec_name: str, refresh: int) -> None:
        self.spec = spec = SPECS[spec_name]
        policy = Retrieval("bounds", 4)
        by_torch = Retrieval("bounds", 4)
        by_torch._by_kernels = lambda *args: by_torch._by_torch(*args[:-1])  # type: ignore[method-assign]
        self.store = PagedKV(
            spec,
            Shard(),
            num_blocks=40,
            block_size=4,
            dtype=torch.float32,
            device=DEVICE,
            keep_queries=4,
            summaries=[policy.summary],
        )
        how = {"budget": 24, "sinks": 4, "recent": 7, "refresh": refresh, "slots": 2}
        self.listed = ListedKV(self.store, policy, **how, rows=4, context=160)
        self.copied = SelectedKV(self.store, by_torch, **how, room=6)
        self.generator = torch.Generator().manual_seed(4)
        self.blocks = torch.randperm(40, generator=self.generator).tolist()
        assert self.listed.admit(0) and self.copied.admit(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def step(self, start: int, tokens: int) -> SeqStep:
        return SeqStep(0, [1] * tokens, start, self.blocks[: -(-(start + tokens) // 4)], 1, sample=True)

    def grow(self, tokens: int) -> None:
        """Committed tokens, run by the store's own rung."""
        start = self.store.length(0)
        self.store.bind([self.step(start, tokens)])
        for layer in range(self.spec.num_layers):
            heads = self.random(tokens, self.store.num_kv_heads, self.spec.head_dim)
            self.store.append(layer, heads, self.random(*heads.shape))
            self.store.attend(layer, self.random(tokens, self.spec.num_heads, self.spec.head_dim))
        self.store.commit(0, tokens)

    def propose(self, behind: int, tokens: int) -> None:
        """Both run the same proposals and see the same."""
        step = self.step(self.store.length(0) + behind, tokens)
        drawn = [
            [
                self.random(tokens, n, self.spec.head_dim)
                for n in (self.spec.num_heads, self.store.num_kv_heads, self.store.num_kv_heads)
            ]
            for _ in range(self.spec.num_layers)
        ]
        seen: list[list[Tensor]] = []
        for view in (self.copied, self.listed):
            view.bind([step])
            seen.append([])
            for layer, (q, k, v) in enumerate(drawn):
                view.append(layer, k, v)
                seen[-1].append(view.attend(layer, q))
        for copied, listed in zip(*seen, strict=True):
            torch.testing.assert_close(listed, copied, rtol=1e-5, atol=1e-5)
        assert self.listed.refreshes(0) == self.copied.refreshes(0)
        assert self.listed.end(0) == self.copied.end(0)


@pytest.mark.parametrize(("spec", "refresh"), [("llama", 1), ("bloom", 2)])
def test_it_shows_what_the_copying_view_shows(spec: str, refresh: int) -> None:
    twins = Twins(spec, refresh)
    for tokens in (14, 19, 2):  # short of the budget, then beyond it, in the middle of chunks
        twins.grow(tokens)
        twins.propose(0, 2)
        twins.propose(1, 3)  # the last one was rejected
    twins.store.rollback(0, 18)
    twins.propose(0, 2)
    for view in (twins.listed, twins.copied):
        view.free(0)
        assert not view.seq_ids


@pytest.mark.parametrize("spec", SPECS)
def test_kernels_choose_what_torch_chooses(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For views that copy; also some layers at a time."""
    twins, policy = Twins(spec, 1), Retrieval("bounds", 4)
    twins.grow(67)
    queries = twins.store.queries(0, 4)
    assert queries is not None
    count, span = 5, range(4, 60)
    wanted = policy._by_torch(twins.store, 0, queries, span.start // 4, span.stop // 4, count)[..., None] * 4
    for together in (WORK_BYTES, 5_000):
        monkeypatch.setattr(selection, "WORK_BYTES", together)
        found = policy.select(twins.store, 0, queries, span, count)
        assert found is not None and torch.equal(found.positions, (wanted + torch.arange(4, device=DEVICE)).flatten(2))
        parts, layers, heads, chunks, size = 2, 2, twins.store.num_kv_heads, 14, 16
        assert found.bytes_read == parts * layers * heads * chunks * size * 4
    assert not torch.equal(wanted[0], wanted[1])


def test_a_slot_s_next_owner_has_lists_of_its_own() -> None:
    twins = Twins("llama", 1)
    twins.grow(37)
    twins.propose(0, 1)  # beyond the budget: chunks are listed
    for view in (twins.listed, twins.copied, twins.store):
        view.free(0)
    assert twins.listed.admit(0) and twins.copied.admit(0)
    twins.grow(14)
    twins.propose(0, 2)


def test_it_takes_the_bytes_that_were_planned() -> None:
    twins = Twins("llama", 1)
    each, most = ListWork.of(twins.spec, 4, 4).bytes(most_chunks(160, 4, 4))
    assert twins.listed.bytes <= (2 + 4) * listed_bytes(twins.spec, 24, 4) + min(4 * each, most) <= 1.05 * twins.listed.bytes


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that calls make in memory of their own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.bytes += each.untyped_storage().nbytes()
        return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's kernels are not interpreted")
def test_choices_for_several_sequences_allocate_nothing_beside_their_work_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one after another, nor together, nor for a context that has grown: what graphs capture holds no memory of its own."""
    twins = Twins("llama", 1)
    twins.grow(40)
    queries, tables = twins.random(2, 4, 3, 4, 16), torch.tensor([twins.blocks] * 4, dtype=torch.int32)
    slots = torch.tensor([0, -1, 1, -1], dtype=torch.int32)
    for together, lengths in ((4, [40] * 4), (1, [40] * 4), (2, [40, 12, 160, 0])):
        monkeypatch.setattr(ListWork, "together", lambda *_, most=together: most)
        with Allocated() as allocated:
            twins.listed.choose(queries, tables, torch.tensor(lengths, dtype=torch.int32), slots, most_chunks=256)
        assert 0 < allocated.bytes < 1000


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("rows", [4, 40, 68])
def test_work_space_holds_any_choice_of_a_round(rows: int, width: int) -> None:
    """Of contexts up to 128Ki entries, for as many sequences as are chosen for at once; by rows of queries as the host's and a round's
    choices have them. It is no larger than twice `LIST_WORK_BYTES`, unless a single sequence takes more."""
    sizes = [ListWork(layers, heads, rows, width) for layers in (1, 2, 30, 80) for heads in (1, 8, 32)]
    for work, context, sequences in product(sizes, (100, 9000, 1 << 17), (1, 4, 64)):
        longest = most_chunks(context, 17, 8)
        each, most = work.bytes(longest)
        held = min(sequences * each, most)
        assert held <= max(2 * LIST_WORK_BYTES, 4 * longest * work.kv_heads * (work.layers + rows + 32) * 1.01 + LIST_WORK_BYTES)
        for chunks in {rounded_chunks(n) for n in range(1, (context + 17) // 8 + 1, 61)}:
            for own in {1, rows}:
                here = work._replace(rows=own)
                some = min(sequences, here.together(chunks))
                scores = 4 * some * work.layers * work.kv_heads * chunks
                each_layer = some * layer_bytes(work.kv_heads, own, chunks, width)
                at_a_time = max(1, min(work.layers, LIST_WORK_BYTES // each_layer))  # as without anybody's work space
                assert scores + at_a_time * each_layer <= held
