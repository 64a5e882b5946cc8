# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Seconds from the command to the end of the first step of a training script, and what they go to.

    python benchmarks/start_up.py run_summarization.py --model_name_or_path t5-small --train_file data/train.csv ...

The script runs as given and ends after its first step. The libraries are imported one after the other in the order in
which each needs the one before it, so that every one has its own seconds; then each function that main() calls.
"""

import functools
import importlib
import inspect
import sys
import time
from pathlib import Path

# What each needs of those before it is not counted again.
LIBRARIES = ("torch", "datasets", "transformers.modeling_utils", "transformers.trainer", "deepspeed")


def time_since_start() -> float:
    """Seconds since this process was started."""
    boot = float(Path("/proc/uptime").read_text().split()[0])
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return boot - ticks / 100  # USER_HZ is 100 on Linux


def import_libraries(wanted: tuple[str, ...]) -> list[tuple[str, float]]:
    """Import them, and return the seconds of each."""
    times = []
    for name in wanted:
        started = time.perf_counter()
        importlib.import_module(name)
        times.append((f"import {name}", time.perf_counter() - started))
    return times


def time_calls(module, times: dict[str, float]) -> None:
    """Add to `times` the seconds of each function of the module that its main() names; inner calls count once."""
    running = []

    def timed(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            started = time.perf_counter()
            running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                running.pop()
                if not running:
                    times[name] = times.get(name, 0.0) + time.perf_counter() - started

        return call

    for name in module.main.__code__.co_names:
        function = getattr(module, name, None)
        if inspect.isfunction(function) and function.__module__ == module.__name__:
            setattr(module, name, timed(function, name))


def main() -> None:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("error: the first argument must be a training script, the rest its arguments")
    path = Path(sys.argv[1])
    sys.path.insert(0, str(path.resolve().parent))
    times = [("start of Python", time_since_start())]
    times += import_libraries(LIBRARIES if "--deepspeed" in sys.argv else LIBRARIES[:-1])
    from transformers import TrainerCallback, trainer

    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.train_begins = time.perf_counter()

        def on_step_begin(self, args, state, control, **kwargs):
            self.step_begins = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            calls["to the first batch"] = self.step_begins - self.train_begins
            calls["first step"] = now - self.step_begins
            print_table([*times, *calls.items()], time_since_start())
            sys.exit(0)

    trainer.DEFAULT_CALLBACKS.append(Stop)
    calls, started = {}, time.perf_counter()
    module = importlib.import_module(path.stem)
    times.append((f"import {path.stem}", time.perf_counter() - started))
    time_calls(module, calls)
    module.main(sys.argv[2:])


def print_table(times: list[tuple[str, float]], total: float) -> None:
    rest = total - sum(seconds for _, seconds in times)
    for name, seconds in [*times, ("the rest", rest), ("all", total)]:
        print(f"{name:<40}{seconds:>8.2f} s{seconds / total:>8.1%}")


if __name__ == "__main__":
    main()
