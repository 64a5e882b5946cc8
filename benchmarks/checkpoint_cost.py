# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What checkpoints.py costs: at each checkpoint, and at the start of a run.

    python benchmarks/checkpoint_cost.py run_clm_instruct.py --model_name_or_path ... --max_steps 4 --save_steps 1 ...

The script runs as given. Timed are the trainer's own saving of a checkpoint, what checkpoints.py adds to it (checksums
of all files, the marker, the removal of the oldest), and what it does at the start (checksums of model and data, the
search for a checkpoint, run.json). The ratio is (saving + added) / saving, summed over the checkpoints.
"""

import importlib
import sys
import time
from pathlib import Path


def time_calls(owner, name: str, times: list[float]) -> None:
    """Have each call of owner.name add its seconds to times."""
    stock = getattr(owner, name)

    def timed(*args, **kwargs):
        started = time.perf_counter()
        try:
            return stock(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - started)

    setattr(owner, name, timed)


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("error: the first argument must be a training script, the rest its arguments")
    path = Path(sys.argv[1])
    sys.path.insert(0, str(path.resolve().parent))
    from transformers import Trainer

    import checkpoints

    # transformers' Trainer calls on_save after its own saving, and rotates what is too old inside of it; with
    # checkpoints.py beside the script it is on_save that rotates.
    calls = {"save": [], "added": [], "start": []}
    time_calls(Trainer, "_save_checkpoint", calls["save"])
    time_calls(checkpoints.RunFolder, "on_save", calls["added"])
    time_calls(checkpoints, "choose_checkpoint", calls["start"])
    time_calls(checkpoints.RunFolder, "on_train_begin", calls["start"])
    importlib.import_module(path.stem).main(sys.argv[2:])
    print_table({name: sum(times) for name, times in calls.items()}, len(calls["save"]))


def print_table(seconds: dict[str, float], count: int) -> None:
    if not count:
        sys.exit("error: no checkpoint was saved; give --save_steps and --max_steps")
    print(f"{'checkpoints':<44}{count:>8}")
    print(f"{'the trainer saves one':<44}{seconds['save'] / count:>8.3f} s")
    print(f"{'checkpoints.py adds':<44}{seconds['added'] / count:>8.3f} s")
    print(f"{'ratio':<44}{1 + seconds['added'] / seconds['save']:>8.3f}")
    print(f"{'at the start checkpoints.py takes':<44}{seconds['start']:>8.3f} s")


if __name__ == "__main__":
    main()
