# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How long run_generation.py's model takes for one row at a time: percentiles, tokens a second, peak memory.

    python benchmarks/latency.py --model_name_or_path out/t5-small --input_file data/validation.csv --num_rows 200

All other flags are run_generation.py's. One process, on the GPU where there is one.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from generation_speed import load_rows, script
from tqdm.auto import tqdm


def measure(generator, ids: list[list[int]]) -> dict[str, float]:
    """Generate for prompts one at a time: milliseconds at the 50th, 95th, 99th percentile, tokens/s, peak memory."""
    script.generate_batch(generator, ids[:1], [0])  # the first one pays for start-up
    times, tokens = [], 0
    for row, prompt in enumerate(tqdm(ids, desc="One at a time", unit="row")):
        start = time.perf_counter()
        tokens += len(script.generate_batch(generator, [prompt], [row])[0])  # as a list: a GPU has finished by then
        times.append(1000 * (time.perf_counter() - start))
    on_gpu = generator.model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = {f"p{q}_ms": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)}
    results |= {"rows": len(times), "tokens_per_second": round(1000 * tokens / sum(times), 1)}
    return results | {"peak_memory_gb": round(peak / 1e9, 3)}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], allow_abbrev=False)
    parser.add_argument("--num_rows", type=int, default=100, help="So many rows, from the front.")
    parser.add_argument("--json", help="File for the figures, too.")
    args, words = parser.parse_known_args(argv)
    words += ["--output_file", "never-written.csv", "--max_samples", str(args.num_rows)]
    try:
        generator, ids = load_rows(words)
    except script.UsageError as error:
        raise SystemExit(f"error: {error}") from None
    results = measure(generator, ids)
    script.print_counts(results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
