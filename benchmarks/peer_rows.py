"""Rows that lie in another GPU's memory: bytes a second by size of a row, beside copies over the same link and rows of host memory.

    python benchmarks/peer_rows.py

Needs two GPUs that reach one another. Each figure is a median, rows scattered and other ones at each call. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from statistics import median

import torch
from _figures import known_versions

from rowcast.kernels.gpu.host_rows import Fetch, gather
from rowcast.offload import gpu_rates
from rowcast.offload.host_memory import pinned_bank
from rowcast.offload.peer_memory import peer_tensor

BANK_BYTES = 2 << 30
MOVED_BYTES = 64 << 20
REPEAT = 20


def main() -> int:
    if torch.cuda.device_count() < 2:
        print("needs two GPUs", file=sys.stderr)
        return 2
    device, holder = torch.device("cuda", 0), torch.device("cuda", 1)
    name = torch.cuda.get_device_name(device)
    bank = peer_tensor((BANK_BYTES,), torch.uint8, holder, device)
    bank.tensor.copy_(torch.randint(0, 255, (BANK_BYTES,), dtype=torch.uint8, device=holder))
    copied = gpu_rates.peer_rate(holder, device, 512 << 20, REPEAT)
    print(f"2 x {name}: copies from card to card {copied / 1e9:.1f} GB/s")
    rows = []
    with pinned_bank((BANK_BYTES,), torch.uint8, device) as host:
        to_device, _ = gpu_rates.bus_rates(host, 512 << 20, REPEAT)
        print(f"copies from pinned memory {to_device / 1e9:.1f} GB/s")
        for row_bytes in gpu_rates.ROW_BYTES:
            found = {programs: _rate(bank.address, bank.tensor, row_bytes, programs) for programs in (24, 64, 128, 256)}
            best = max(found, key=lambda programs: found[programs])
            from_host = gpu_rates.row_rate(host, row_bytes, REPEAT).rate
            told = {f"peer GB/s, {programs} programs": rate / 1e9 for programs, rate in found.items()}
            rows.append(
                {"row KiB": row_bytes / 1024, **told, "share of the copy": found[best] / copied, "host GB/s": from_host / 1e9}
            )
            by_programs = ", ".join(f"{programs}: {rate / 1e9:.0f}" for programs, rate in found.items())
            print(
                f"{row_bytes >> 10:4d} KiB: peer {found[best] / 1e9:.1f} GB/s, {found[best] / copied:.2f} of the copy "
                f"(by programs {by_programs}); host {from_host / 1e9:.1f} GB/s; {found[best] / from_host:.1f}x"
            )
    rates = {"copy_gb_s": copied / 1e9, "bus_gb_s": to_device / 1e9}
    print(json.dumps({"benchmark": "peer_rows", "device": name, "versions": known_versions(), **rates, "rows": rows}))
    return 0


def _rate(address: int, bank: torch.Tensor, row_bytes: int, programs: int) -> float:
    count = MOVED_BYTES // row_bytes
    order = torch.randperm(BANK_BYTES // row_bytes, generator=torch.Generator().manual_seed(row_bytes))
    device = torch.device("cuda", 0)
    calls = [ids.int().to(device) for ids in order[: len(order) // count * count].view(-1, count)]
    out = torch.empty(count, row_bytes, dtype=torch.uint8, device=device)
    wanted = torch.full((1,), count, dtype=torch.int32, device=device)
    taken = []
    for turn in range(REPEAT + 2):
        ids = calls[turn % len(calls)]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        gather(address, row_bytes, ids, wanted, out, Fetch(programs=programs))
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) * 1e-3)
    check = bank.view(-1, row_bytes)[ids.to(bank.device).long()].to(device)
    assert torch.equal(out, check), "rows came wrong"
    return float(count * row_bytes / median(taken[2:]))


if __name__ == "__main__":
    sys.exit(main())
