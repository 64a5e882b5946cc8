# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
One rank of the ZeroAdafactor tests: trains a small model under the cases named and writes what came out.

    torchrun --nproc_per_node 2 adafactor_worker.py OUT_DIR CASE [CASE ...]

A case is a JSON object: name, stage, steps, and any of zero (more of zero_optimization), dtype (bf16, fp16), clip,
accumulation, save and load (checkpoint folders; load_same: by DeepSpeed's own loader), optimizer (constructor
arguments). The first rank writes OUT_DIR/NAME.pt: the fp32 weights by name, the losses, the bytes of optimizer state
and the number of all-reduces in the optimizer.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ROWS, WIDTH, WORDS = 24, 24, 50
STOCK = {"lr": 3e-3, "scale_parameter": False, "relative_step": False}


class Model(torch.nn.Module):
    """Parameters of one to four dimensions and odd sizes, one frozen, one tied, one larger than the rest."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, WIDTH)
        self.first = torch.nn.Linear(WIDTH, 37)
        self.norm = torch.nn.LayerNorm(37)
        self.table = torch.nn.Parameter(torch.randn(2, 3, 5, 37) / 2)
        self.experts = torch.nn.Parameter(torch.randn(3, 37, 7) / 6)
        self.frozen = torch.nn.Linear(7, 7)
        self.last = torch.nn.Linear(7, WIDTH)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.output = torch.nn.Linear(WIDTH, WORDS, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids, labels):
        x = self.embedding(ids)  # (rows, tokens, width)
        x = self.norm(self.first(x))
        x = x + self.table[ids % 2, ids % 3, ids % 5]
        x = torch.einsum("btw,ewd->btd", torch.tanh(x), self.experts)
        x = self.last(torch.relu(self.frozen(x))) * self.scale
        return torch.nn.functional.cross_entropy(self.output(x).flatten(0, 1).float(), labels.flatten())


def make_batch(step: int):
    """ids and labels of the global batch of this step, (ROWS, 6) each."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, WORDS, (ROWS, 6), generator=generator)
    return ids, (ids * 7 + 3) % WORDS


def make_groups(model) -> list[dict]:
    """Matrices with weight decay, vectors without; under stage 3 a parameter's own shape is that of its piece."""
    trained = [(p, len(getattr(p, "ds_shape", p.shape))) for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p, dims in trained if dims > 1], [p for p, dims in trained if dims < 2]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]


def make_model(dtype=torch.float32):
    torch.manual_seed(3)
    return Model().to(dtype)


def state_bytes(optimizer) -> int:
    tensors = (v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    return sum(t.numel() * t.element_size() for t in tensors)


def run_plain(case: dict, optimizer_class) -> dict:
    """
    One process, without DeepSpeed, the whole batch at once; the reference if the class is transformers' own.

    dtype float64 computes all in it; bf16 computes gradients in bf16 for fp32 weights.
    """
    weights_dtype = torch.float64 if case.get("dtype") == "float64" else torch.float32
    model = make_model(weights_dtype)
    computing = make_model(torch.bfloat16) if case.get("dtype") == "bf16" else model
    optimizer = optimizer_class(make_groups(model), **{**STOCK, **case.get("optimizer", {})})
    losses = []
    for step in range(case["steps"]):
        loss = computing(*make_batch(step))
        loss.backward()
        if computing is not model:
            for parameter, copy in zip(model.parameters(), computing.parameters(), strict=True):
                parameter.grad = None if copy.grad is None else copy.grad.float()
        if case.get("clip"):
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], case["clip"])
        optimizer.step()
        model.zero_grad()
        computing.zero_grad()
        if computing is not model:
            computing.load_state_dict(model.state_dict())
        losses.append(loss.item())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "losses": losses, "state_bytes": state_bytes(optimizer)}


def make_config(case: dict, ranks: int) -> dict:
    zero = {"stage": case["stage"], "reduce_bucket_size": 500, "allgather_bucket_size": 500, **case.get("zero", {})}
    accumulation = case.get("accumulation", 1)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // ranks // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": case.get("clip", 0.0),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if case.get("dtype"):
        config[case["dtype"]] = {"enabled": True}
        if case["dtype"] == "fp16":
            config["fp16"]["initial_scale_power"] = 10
    return config


def get_full_weights(engine) -> dict:
    """The fp32 weights by name, the same on every rank."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is None:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                whole = parameter.detach().clone()
        weights[name] = whole.detach().float().cpu().clone()
    return weights


def run_zero(case: dict) -> dict:
    """Under DeepSpeed, the global batch divided between the ranks and the accumulation steps."""
    import deepspeed

    import portable_checkpoints
    import zero_adafactor

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = make_config(case, ranks)
    model = make_model()
    if case["stage"] == 3:
        model.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.get("dtype")))
        model = deepspeed.zero.Init(module=model, config_dict_or_path=config) and model
    optimizer = zero_adafactor.ZeroAdafactor(make_groups(model), **{**STOCK, **case.get("optimizer", {})})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if case.get("load"):
        portable_checkpoints.load_into_engine(engine, Path(case["load"]))
    if case.get("load_same"):
        engine.load_checkpoint(case["load_same"])
    first = engine.global_steps
    calls, all_reduce = [], zero_adafactor.all_reduce
    zero_adafactor.all_reduce = lambda *args: calls.append(1) or all_reduce(*args)
    size = config["train_micro_batch_size_per_gpu"]
    losses = []
    for step in range(first, case["steps"]):
        ids, labels = make_batch(step)
        total = torch.zeros(())
        for i in range(config["gradient_accumulation_steps"]):
            taken = slice((i * ranks + rank) * size, (i * ranks + rank + 1) * size)
            loss = engine(ids[taken], labels[taken])
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / config["gradient_accumulation_steps"] / ranks
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    weights = get_full_weights(engine)
    if case.get("save"):
        engine.save_checkpoint(case["save"])
    zero_adafactor.all_reduce = all_reduce
    result = {"weights": weights, "losses": losses, "state_bytes": state_bytes(optimizer), "calls": len(calls)}
    engine.destroy()
    return result


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed asks the CPU for fast fp16; slow will do for its loss scaling.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    for case in map(json.loads, sys.argv[2:]):
        result = run_zero(case)
        if torch.distributed.get_rank() == 0:
            torch.save(result, folder / f"{case['name']}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
