"""GPTQ-class rounding against round-to-nearest: perplexity and acceptance as a draft on a text that neither has seen.

    python benchmarks/quantized.py SmolLM2-135M-Instruct --text a.txt --held-out b.txt --bits 4 --bits 3 --group 64

Both use the same groups, zero points and search for a group's range: what differs is what the columns behind make good. Prints a table,
then one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _figures import device_name

from rowcast.calibration.quantising.run import METHODS, Settings, quantise
from rowcast.runtime.device import choose_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="SmolLM2-135M-Instruct")
    parser.add_argument("--text", action="append", required=True, help="what is calibrated on")
    parser.add_argument("--held-out", action="append", required=True, help="what is judged on")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--group", type=int, action="append")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--judged", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    found = []
    print(
        f"{'bits':>4} {'group':>5} {'method':>8} {'bits/weight':>11} {'perplexity':>10} {'original':>8} {'T=1':>6} {'T=0':>6} {'KL':>6}"
    )
    for bits in args.bits or [4, 3]:
        for group in args.group or [64]:
            for method in METHODS:
                settings = Settings(bits, group, method, args.tokens, args.window, args.judged)
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "copy"
                    made = quantise(
                        args.model, args.text, out, settings, held_out=args.held_out, device=args.device, progress=False
                    )
                quality, accepted = made["quality"], made["quality"]["acceptance"]
                found.append(
                    {
                        "bits": bits,
                        "group": group,
                        "method": method,
                        "bits a weight": made["bits_per_weight"],
                        "perplexity": quality["perplexity"],
                        "the original's": quality["original_perplexity"],
                        "KL": quality["kl"],
                        "acceptance, T = 1": accepted["1"]["maximal"],
                        "T = 0.8": accepted["0.8"]["maximal"],
                        "greedy": accepted["0"],
                    }
                )
                print(
                    f"{bits:4} {group:5} {method:>8} {made['bits_per_weight']:11.2f} {quality['perplexity']:10.2f} "
                    f"{quality['original_perplexity']:8.2f} {accepted['1']['maximal']:6.3f} {accepted['0']:6.3f} {quality['kl']:6.3f}",
                    flush=True,
                )
    print(
        json.dumps(
            {"benchmark": "quantized", "model": args.model, "device": device_name(choose_device(args.device)[0]), "copies": found}
        )
    )


if __name__ == "__main__":
    main()
