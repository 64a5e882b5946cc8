# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How long run_generation.py's model takes for a row, or a batch, at a time: percentiles, tokens a second, peak memory.

    python benchmarks/latency.py --model_name_or_path out/t5-small --input_file data/validation.csv --num_rows 200

All other flags are run_generation.py's. One process, on the GPU where there is one.
"""

import argparse
import itertools
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
from generation_speed import load_rows, script
from tqdm.auto import tqdm


def measure(generator, ids: list[list[int]], batch_size: int = 1) -> dict[str, float]:
    """Generate batch by batch: milliseconds at the 50th, 95th, 99th percentile, rows and tokens/s, peak memory."""
    batches = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    script.generate_batch(generator, batches[0], list(range(len(batches[0]))))  # the first one pays for start-up
    times, tokens, row = [], 0, 0
    for batch in tqdm(batches, desc=f"In batches of {batch_size}", unit="batch"):
        start = time.perf_counter()
        outputs = script.generate_batch(generator, batch, list(range(row, row + len(batch))))  # lists: a GPU has ended
        times.append(1000 * (time.perf_counter() - start))
        tokens, row = tokens + sum(map(len, outputs)), row + len(batch)
    on_gpu = generator.model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = {f"p{q}_ms": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)}
    results |= {"rows": row, "rows_per_second": round(1000 * row / sum(times), 2)}
    return results | {
        "tokens_per_second": round(1000 * tokens / sum(times), 1),
        "peak_memory_gb": round(peak / 1e9, 3),
    }


def describe_model(model) -> dict:
    """Its size, and on what it runs."""
    device = f"CPU, threads: {torch.get_num_threads()}"
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else device
    return {"parameters": sum(p.numel() for p in model.parameters()), "dtype": str(model.dtype)[6:], "device": device}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], allow_abbrev=False)
    parser.add_argument("--num_rows", type=int, default=100, help="Rows, from the front; a shorter table is repeated.")
    parser.add_argument("--batch_size", type=int, default=1, help="Rows that are generated for together.")
    parser.add_argument("--json", help="File for the figures, too.")
    args, words = parser.parse_known_args(argv)
    words += ["--output_file", "never-written.csv", "--max_samples", str(args.num_rows)]
    try:
        generator, ids = load_rows(words)
    except script.UsageError as error:
        raise SystemExit(f"error: {error}") from None
    if not ids or min(args.num_rows, args.batch_size) < 1:
        raise SystemExit("error: --num_rows and --batch_size must be 1 or more, and --input_file must have texts")
    rows = list(itertools.islice(itertools.cycle(ids), args.num_rows))
    results = measure(generator, rows, args.batch_size) | describe_model(generator.model)
    script.print_counts(results)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
