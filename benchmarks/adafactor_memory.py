#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "deepspeed"]
# ///
"""
What Adafactor costs under ZeRO, and whether it is still Adafactor.

The table of the README (CPU or GPUs; about five minutes on two cores):
    python benchmarks/adafactor_memory.py --ranks 1 2 4

Which optimizer trains the t5-11b shape with full parameters on one large GPU, without offload:
    python benchmarks/adafactor_memory.py --fit t5-11b
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = {  # as published; `small` and `tiny` are ours
    "tiny": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "small": {"d_model": 256, "d_kv": 32, "d_ff": 1024, "num_layers": 4, "num_heads": 8, "vocab_size": 8000},
    "t5-large": {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128},
    "t5-11b": {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24, "num_heads": 128, "vocab_size": 32128},
}
OPTIMIZERS = ("Adafactor", "AdamW", "ZeroAdafactor")
FITS = (("ZeroAdafactor", 3), ("AdamW", 3), ("ZeroAdafactor, pure bf16", None))


def make_model(shape: str, dtype: torch.dtype = torch.float32):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        return T5ForConditionalGeneration(T5Config(dropout_rate=0.0, decoder_start_token_id=0, **SHAPES[shape]))
    finally:
        torch.set_default_dtype(torch.float32)


def make_optimizer(name: str, parameters, **options) -> torch.optim.Optimizer:
    from transformers import Adafactor

    from zero_adafactor import ZeroAdafactor

    if name == "AdamW":
        return torch.optim.AdamW(parameters, lr=1e-3)
    chosen = ZeroAdafactor if name.startswith("ZeroAdafactor") else Adafactor
    return chosen(parameters, lr=1e-3, scale_parameter=False, relative_step=False, **options)


def make_batch(step: int, rows: int, source: int, target: int, words: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, words, (rows, source), generator=generator)
    return {"input_ids": ids, "labels": ids[:, :target].contiguous()}


def draw_gradients(model, clock: list[int]) -> None:
    """
    From now on every gradient is drawn from the number of the parameter and the step in clock[0].

    The same on all ranks, so that the deviation is the optimizer's own. With T5's real gradients it would not be: its
    softmax ignores a shift of the position bias, whose gradient is rounding noise, and Adafactor and AdamW alike turn
    that into steps as large as any (3e-4 for AdamW between stage 0 and stage 3 after eight steps).
    """

    def drawn(grad: torch.Tensor, i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(clock[0] * 100_003 + i)
        return torch.randn(grad.shape, generator=generator).mul_(1e-3).to(grad)

    for i, parameter in enumerate(model.parameters()):
        parameter.register_hook(lambda grad, i=i: drawn(grad, i))


class Memory:
    """Peak memory in bytes since reset(): of the GPU's allocator, else of this process (Linux)."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def watch_steps(optimizer) -> tuple[list[float], list[int]]:
    """Seconds and peak extra bytes of every optimizer.step from now on."""
    seconds, extra, memory, step = [], [], Memory(), optimizer.step

    def watched(*args, **kwargs):
        memory.reset()
        before, start = memory.now(), time.perf_counter()
        result = step(*args, **kwargs)
        if memory.cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        extra.append(memory.peak() - before)
        return result

    optimizer.step = watched
    return seconds, extra


def state_bytes(optimizer) -> int:
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train_plain(name: str, args) -> dict[str, torch.Tensor]:
    """The reference: one process without DeepSpeed; its fp32 weights by name."""
    model = make_model(args.shape)
    optimizer, clock = make_optimizer(name, model.parameters()), [0]
    draw_gradients(model, clock)
    for clock[0] in range(args.steps):
        model(**make_batch(0, 1, 8, 8, SHAPES[args.shape]["vocab_size"])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def train_zero(name: str, stage: int, args) -> dict:
    """One cell of the table, on every rank; figures of a rank are summed or taken from the worst."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    ranks, clock = torch.distributed.get_world_size(), [0]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    model = make_model(args.shape)
    count = sum(p.numel() for p in model.parameters())
    if stage == 3:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    draw_gradients(model, clock)
    optimizer = make_optimizer(name, model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    seconds, extra = watch_steps(optimizer)
    batch = make_batch(0, 1, 8, 8, SHAPES[args.shape]["vocab_size"])
    for clock[0] in range(args.steps):
        engine.backward(engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss)
        engine.step()
    weights = {}
    for key, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)
        if whole is None:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                whole = parameter.detach().clone()
        weights[key] = whole.cpu()
    calls = len(seconds) // args.steps
    per_step = [sum(seconds[i : i + calls]) for i in range(0, len(seconds), calls)]
    figures = [state_bytes(optimizer), max(extra), statistics.median(per_step[1:])]
    gathered = [None] * ranks
    torch.distributed.all_gather_object(gathered, figures)
    engine.destroy()
    return {
        "state bytes/parameter": sum(g[0] for g in gathered) / count,
        "step MB": max(g[1] for g in gathered) / 1e6,
        "step ms": max(g[2] for g in gathered) * 1e3,
        "weights": weights,
    }


def deviation(expected: dict, found: dict) -> float:
    """The largest relative difference of any one tensor, in the 2-norm."""
    return max(((a - found[key]).norm() / a.norm()).item() for key, a in expected.items())


def work(args) -> None:
    """One rank: every optimizer at every stage; the first rank writes the rows."""
    import deepspeed

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    references = torch.load(args.work, weights_only=True)
    rows = []
    for stage in args.stages:
        for name in OPTIMIZERS:
            cell = train_zero(name, stage, args)
            kind = "AdamW" if name == "AdamW" else "Adafactor"
            cell["deviation"] = deviation(references[kind], cell.pop("weights"))
            rows.append({"optimizer": name, "stage": stage, "ranks": torch.distributed.get_world_size(), **cell})
    if torch.distributed.get_rank() == 0:
        Path(args.work).with_suffix(".json").write_text(json.dumps(rows))
    torch.distributed.barrier()
    os._exit(0)


def print_table(rows: list[dict]) -> None:
    """A Markdown table; of a step: peak memory beyond what stood before it, median time, both of the slowest rank."""
    print("| optimizer | stage | ranks | state, bytes a parameter | step, extra MB | step, ms | deviation |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda r: (r["stage"], r["ranks"], r["optimizer"])):
        print(
            f"| {row['optimizer']} | {row['stage']} | {row['ranks']} | {row['state bytes/parameter']:.3f} "
            f"| {row['step MB']:.0f} | {row['step ms']:.0f} | {row['deviation']:.0e} |"
        )


def compare(args) -> None:
    """The table: every number of ranks in turn; all ranks of the run share this machine."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "references.pt"
        torch.save({name: train_plain(name, args) for name in ("Adafactor", "AdamW")}, path)
        for ranks in args.ranks:
            print(f"{ranks} ranks ...", file=sys.stderr, flush=True)
            start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), __file__]
            shared = ["--shape", args.shape, "--steps", str(args.steps)]
            stages = ["--stages", *map(str, args.stages)]
            done = subprocess.run([*start, "--work", str(path), *shared, *stages], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            rows += json.loads(path.with_suffix(".json").read_text())
    print_table(rows)


def measure_peak() -> float:
    """The matrix product's best rate in bf16 on this device, FLOP/s."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def fit_one(name: str, stage: int | None, args) -> None:
    """Train a few steps of this shape in bf16 on one device; prints one JSON line."""
    import deepspeed
    from transformers import T5ForConditionalGeneration  # noqa: F401  before zero.Init patches torch's constructors

    device, memory = "cuda" if torch.cuda.is_available() else "cpu", Memory()
    peak_rate = measure_peak()
    batch = make_batch(0, args.rows, 512, 128, SHAPES[args.shape]["vocab_size"])
    tokens = args.rows * (512 + 128)
    memory.reset()
    if stage is None:
        with torch.device(device):
            model = make_model(args.shape, torch.bfloat16)
        model.gradient_checkpointing_enable()
        make_optimizer(name, model.parameters(), step_in_backward=True)  # kept alive by its hooks on them
        count = sum(p.numel() for p in model.parameters())
        forward, backward, step = model, torch.Tensor.backward, lambda: None
    else:
        if device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29511}.items():
            os.environ.setdefault(key, str(value))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        deepspeed.init_distributed("nccl" if device == "cuda" else "gloo")
        config = {
            "train_micro_batch_size_per_gpu": args.rows,
            "bf16": {"enabled": True},
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "sub_group_size": 100_000_000},
            "steps_per_print": 10**9,
        }
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = make_model(args.shape)
        model.gradient_checkpointing_enable()
        count = sum(p.ds_numel for p in model.parameters())
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(name, model.parameters()), config=config
        )
        forward, backward, step = engine, engine.backward, engine.step
    batch = {key: value.to(device) for key, value in batch.items()}
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        backward(forward(**batch).loss)
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    best = statistics.median(seconds[1:])
    # Each of a row's tokens meets its half of the weights: 6 FLOP a weight and token, 8 with checkpointing.
    rate = 8 * tokens / 2 * count / best
    figures = {"parameters": count, "peak GB": memory.peak() / 1e9, "step s": best, "tokens/s": tokens / best}
    print("RESULT " + json.dumps({**figures, "TFLOP/s": rate / 1e12, "share of matrix peak": rate / peak_rate}))


def fit(args) -> None:
    """Each optimizer in a process of its own, those that run out of memory included."""
    for name, stage in FITS:
        command = [sys.executable, __file__, "--fit", args.fit, "--only", name, "--steps", str(args.steps)]
        done = subprocess.run([*command, "--rows", str(args.rows)], capture_output=True, text=True)
        found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            out_of_memory = "out of memory" in (done.stdout + done.stderr).lower() or done.returncode == -9
            found = ["out of memory" if out_of_memory else f"failed:\n{done.stderr[-2000:]}"]
        print(f"{name}, {'no DeepSpeed' if stage is None else f'ZeRO-{stage}'}: {found[0]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small", help="T5's shape in the table.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="Numbers of processes.")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO stages.")
    parser.add_argument("--steps", type=int, default=8, help="Steps of each cell.")
    parser.add_argument("--rows", type=int, default=8, help="Rows of a batch with --fit.")
    parser.add_argument("--fit", choices=SHAPES, help="Train this shape on one device with each optimizer instead.")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
    elif args.only:
        args.shape = args.fit
        fit_one(args.only, dict(FITS)[args.only], args)
    elif args.fit:
        fit(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
