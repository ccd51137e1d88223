"""How fast ranks read a checkpoint, beside what the disk and the page cache give by themselves.

    python benchmarks/loading.py --folder /data/loading                        # a Llama-2-13B shape, 26 GB, two ranks
    python benchmarks/loading.py --folder /tmp/loading --model llama-68m --ranks 2

Random weights are written to the folder as safetensors files, if they are not there yet; they stay. Each figure is bytes of the
checkpoint a second: all ranks together, from the call of `LLM` until it could generate, less what the same gang takes to start with a
tiny model. Cold means that nothing is in the page cache, for the tiny model neither, as the libraries are read again, too; it takes
root to see to. One line of JSON ends the output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _figures import known_versions
from safetensors.torch import save_file

from rowcast import LLM, SamplingParams
from rowcast.bench.shapes import open_shape

FILE_BYTES = 4 << 30
BLOCK_BYTES = 16 << 20
TINY = "llama-68m"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are, or will be written")
    parser.add_argument(
        "--model", default="llama-2-13b", help="a well-known model's name or a config.json; its weights are random"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--readers", type=int, default=8, help="threads that read the files by themselves")
    parser.add_argument("--repeat", type=int, default=2, help="warm loads of each, the fastest of which counts")
    options = parser.parse_args()
    folder, tiny = (write(name, options.folder) for name in (options.model, TINY))
    files = sorted(folder.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    found: dict[str, Any] = {
        "benchmark": "loading",
        "versions": known_versions(),
        "model": options.model,
        "bytes": total,
        "ranks": options.ranks,
    }
    if drop_caches():
        found["disk_bytes_per_s"] = total / read_all(files, options.readers)
    else:
        print("the page cache cannot be dropped here: no cold figures", file=sys.stderr)
        read_all(files, options.readers)
    found["page_cache_bytes_per_s"] = total / read_all(files, options.readers)
    # The fastest: what is compiled and cached once is no matter.
    found["warm_start_s"] = min(load(tiny, options.ranks) for _ in range(options.repeat))
    found["warm_s"] = min(load(folder, options.ranks) for _ in range(options.repeat))
    if "disk_bytes_per_s" in found:
        for name, which in (("cold_start_s", tiny), ("cold_s", folder)):
            drop_caches()
            found[name] = load(which, options.ranks)
    print(f"{options.model}, {total / 1e9:.1f} GB, {options.ranks} ranks")
    for name, peer in (("cold", "disk"), ("warm", "page_cache")):
        if f"{name}_s" in found:
            took, start, theirs = (found[key] for key in (f"{name}_s", f"{name}_start_s", f"{peer}_bytes_per_s"))
            found[f"{name}_bytes_per_s"] = ours = total / (took - start)
            told = f"{ours / 1e9:.2f} GB/s; {peer.replace('_', ' ')} alone {theirs / 1e9:.2f} GB/s, share {ours / theirs:.2f}"
            print(f"{name}: {took:.1f} s, of which {start:.1f} s are the start without it, {told}")
    print(json.dumps(found))
    return 0


def write(model: str, folder: Path) -> Path:
    """A checkpoint of this shape with random weights in bfloat16, in files of some GiB."""
    checkpoint = open_shape(model, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    place = folder / Path(model).name
    if (place / "config.json").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    where: dict[str, str] = {}
    for number, tensors in enumerate(_files(checkpoint.source)):
        name = f"model-{number:05}.safetensors"
        save_file(tensors, place / name, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    os.sync()
    (place / "config.json").write_text(json.dumps({**checkpoint.config, "torch_dtype": "bfloat16"}))
    print(f"{place} written in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return place


def _files(source: Any) -> Iterator[dict[str, torch.Tensor]]:
    held: dict[str, torch.Tensor] = {}
    for name in source.names():
        shape = source.shape(name)
        out = torch.empty(shape, dtype=torch.bfloat16, device=source.device)
        held[name] = source.read(name, out=out).cpu()
        if sum(tensor.nbytes for tensor in held.values()) >= FILE_BYTES:
            yield held
            held = {}
    if held:
        yield held


def drop_caches() -> bool:
    """Whether the next read is the disk's."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def read_all(files: list[Path], readers: int) -> float:
    """Seconds to read all bytes, in blocks by so many threads."""
    blocks = [(file, start) for file in files for start in range(0, file.stat().st_size, BLOCK_BYTES)]

    def run(part: list[tuple[Path, int]]) -> None:
        buffer = bytearray(BLOCK_BYTES)
        for file, start in part:
            with file.open("rb", buffering=0) as opened:
                opened.seek(start)
                opened.readinto(buffer)

    start = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(run, (blocks[i::readers] for i in range(readers))))
    return time.perf_counter() - start


def load(folder: Path, ranks: int) -> float:
    """Seconds until it could generate."""
    start = time.perf_counter()
    with LLM(
        str(folder),
        tensor_parallel_size=ranks,
        ladder="plain",
        dtype="bfloat16",
        max_model_len=1024,
        launcher="local",
        progress=False,
    ) as llm:
        took = time.perf_counter() - start
        (output,) = llm.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False))
        assert len(output.outputs[0].token_ids) == 2
    return took


if __name__ == "__main__":
    sys.exit(main())
