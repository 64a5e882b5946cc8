# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "safetensors"]
# ///
"""
Lets a run go on from a checkpoint of any number of ranks, any ZeRO stage or none, and runs no code from its files.

Optional beside guards.py and checkpoints.py, which call explain_unsafe and follow. On a checkpoint's own ranks and
stage transformers and DeepSpeed load it. On others DeepSpeed refuses (0.19.8), transformers drops its state in
silence (5.23): here weights and state are put together a parameter at a time, and cut as the new ranks hold them.
"""

import copy
import json
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors import safe_open
from transformers import set_seed, trainer_pt_utils
from transformers.integrations.deepspeed import deepspeed_load_checkpoint


class MoveError(ValueError):
    """Why a run cannot go on from a checkpoint; follow() raises its caller's own error in its place."""


def list_safe_globals() -> list:
    """What DeepSpeed's files hold beside tensors and plain values (0.19.8): classes of data, no function."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_safely(path, map_location="cpu", mmap=True):
    """torch.load of tensors and plain values. Raises MoveError at anything else."""
    try:  # transformers' own list is for NumPy's random state
        known = list_safe_globals() if str(path).endswith("_states.pt") else []
        with trainer_pt_utils.safe_globals(), torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, ImportError) as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {named[1]}, which may run code" if named else f"cannot be read ({type(error).__name__})"
        raise MoveError(f"{path} {what}; it is not loaded") from None


def explain_unsafe(folder: Path) -> str | None:
    """Why a checkpoint's files are not loaded, or None: one holds more than tensors and plain values."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".pt", ".pth", ".bin")]
    try:
        [load_safely(path) for path in files if path.name != "training_args.bin"]  # which nobody loads
    except MoveError as error:
        return str(error).removeprefix(f"{folder}/")
    return None


def find_saved(folder: Path, ending: str) -> list[Path]:
    """The files of DeepSpeed's checkpoint in the folder, by rank; none where it is not DeepSpeed's."""
    if not (folder / "latest").is_file():
        return []
    files = (folder / (folder / "latest").read_text(encoding="utf-8").strip()).glob(f"*{ending}")
    return sorted(files, key=lambda path: int(re.search(r"rank_(\d+)", path.name)[1]))  # zero_pp_rank_10_mp_rank_00_


def find_layout(folder: Path) -> tuple[int, bool] | None:
    """(ranks, whether the weights were partitioned, as in stage 3) of a ZeRO checkpoint; None of any other."""
    ranks = len(find_saved(folder, "_optim_states.pt"))
    return (ranks, "zero_pp_rank" in find_saved(folder, "_model_states.pt")[0].name) if ranks else None


class SavedShards:
    """A ZeRO checkpoint: the flat tensors of its ranks, seen as whole parameters by name."""

    def __init__(self, folder: Path):
        self.shards = [load_safely(path)["optimizer_state_dict"] for path in find_saved(folder, "_optim_states.pt")]
        self.common, first = load_safely(find_saved(folder, "_model_states.pt")[0]), self.shards[0]
        partitioned = "fp32_flat_groups" in first  # stage 3
        self.flats = "fp32_flat_groups" if partitioned else "single_partition_of_fp32_groups"
        self.bases = [s["optimizer_state_dict" if partitioned else "base_optimizer_state"] for s in self.shards]
        if not isinstance(self.bases[0], dict) or any(map(any, first.get("param_alignment_paddings", ()))):
            raise MoveError("was saved with DeepSpeed's elastic_checkpoint or parameter_alignment, and stays there")
        self.groups = self.bases[0]["param_groups"]  # DeepSpeed has dropped empty ones
        shapes = self.common["param_shapes"]  # a dict for each flat tensor
        self.shapes = {name: torch.Size(shape) for group in shapes for name, shape in group.items()}
        self.pieces = {name: [] for name in self.shapes}  # by name: (rank, flat tensor, offset, elements)
        for rank, shard in enumerate(self.shards):
            for i, group in enumerate(shapes):
                for name, place in () if partitioned else shard["param_slice_mappings"][i].items():
                    self.pieces[name].append((rank, i, place.start, place.numel))
                offset = 0
                for name in group if partitioned else ():  # one of equal pieces of each, the last ones padded
                    numel = self.shapes[name].numel()
                    size = -(-numel // len(self.shards))
                    self.pieces[name].append((rank, i, offset, max(0, min(size, numel - rank * size))))
                    offset += size

    def join(self, name: str, flats: list[torch.Tensor]) -> torch.Tensor:
        parts = [f[offset : offset + n] for f, (_, _, offset, n) in zip(flats, self.pieces[name], strict=True)]
        return torch.cat(parts).view(self.shapes[name])

    def get_weight(self, name: str) -> torch.Tensor:
        return self.join(name, [self.shards[rank][self.flats][i] for rank, i, _, _ in self.pieces[name]])

    def get_state(self, name: str) -> dict:
        states = [self.bases[rank]["state"].get(i, {}) for rank, i, _, _ in self.pieces[name]]
        large = [key for key, value in states[0].items() if getattr(value, "ndim", 0)]
        small = {key: copy.deepcopy(states[0][key]) for key in states[0].keys() - large}  # torch counts steps in place
        return small | {key: self.join(name, [state[key] for state in states]) for key in large}

    def get_by_parameter(self) -> dict:
        """ZeroAdafactor's state_dict: exp_avg put together, the rest is alike on all ranks."""
        for i, state in self.bases[0]["state"].items():
            if "exp_avg" in state:
                held = sorted((base["state"][i] for base in self.bases), key=lambda part: part["exp_avg_start"])
                state["exp_avg"] = torch.cat([part["exp_avg"].flatten() for part in held])
        return self.bases[0]


class SavedWhole:
    """A checkpoint without DeepSpeed, seen alike. names: of the trained parameters in the optimizer's order."""

    def __init__(self, folder: Path, names: list[str], model):
        if not (folder / "optimizer.pt").is_file():
            raise MoveError("was saved at ZeRO stage 0, and stays there")
        self.base = load_safely(folder / "optimizer.pt")
        self.groups = [group for group in self.base["param_groups"] if group["params"]]
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self.common, self.files, self.tied, aliases = {"global_steps": state["global_step"]}, {}, {}, {}
        for path in folder.glob("*model*.safetensors"):  # of a model or of adapters, in one file or several
            weights = safe_open(path, "pt")
            self.files |= dict.fromkeys(weights.keys(), weights)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.tied[name] = aliases.setdefault(parameter, [])
            self.tied[name].append(name)
        order = (i for group in self.groups for i in group["params"])
        self.shapes = self.indices = dict(zip(names, order, strict=True))

    def get_weight(self, name: str) -> torch.Tensor:
        # peft writes an adapter's weights without the adapter's name
        names = [n for tied in self.tied[name] for n in (tied, re.sub(r"\.modules_to_save|\.default\b", "", tied))]
        found = next((n for n in names if n in self.files), name)
        return self.files[found].get_tensor(found)

    def get_state(self, name: str) -> dict:
        return self.base["state"].get(self.indices[name], {})

    def get_by_parameter(self) -> dict:
        return self.base


def check_move(optimizer, saved: set[str], names: list[str]) -> bool:
    """Whether the optimizer's state is by parameter, as ZeroAdafactor's; raises MoveError where it cannot move."""
    if type(optimizer) is transformers.Adafactor:
        raise MoveError("the library's Adafactor is another under ZeRO; put zero_adafactor.py beside the script")
    if {*saved} != {*names}:
        raise MoveError("has other parameters than this run trains")
    return getattr(optimizer, "state_by_parameter", False)


@torch.no_grad()
def load_into_plain(model, optimizer, folder: Path) -> None:
    """Load a ZeRO checkpoint into a model and its optimizer without DeepSpeed."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    saved, names = SavedShards(folder), {parameter: name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_parameter = check_move(optimizer, saved.shapes, [names[parameter] for parameter in order])
    for parameter in order:
        parameter.copy_(saved.get_weight(names[parameter]))
    if by_parameter:
        return optimizer.load_state_dict(saved.get_by_parameter())
    groups, old = optimizer.state_dict()["param_groups"], iter(saved.groups)
    groups = [{**new, **next(old), "params": new["params"]} if new["params"] else new for new in groups]
    state = {i: saved.get_state(names[parameter]) for i, parameter in enumerate(order)}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def find_flats(zero) -> Iterator[tuple[torch.Tensor, list[tuple]]]:
    """A rank's flat fp32 tensors, each with (parameter, first element in it, offset in the tensor, elements)."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            rank, pieces, offset = torch.distributed.get_rank(zero._get_sub_group_process_group(i)), [], 0
            for parameter in zero.fp16_groups[i]:
                size = parameter.partition_numel()
                start = min(rank * size, parameter.ds_numel)
                pieces.append((parameter, start, offset, min(size, parameter.ds_numel - start)))
                offset += size
            yield flat, pieces
        return
    for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        found, nothing = [p._hp_mapping for p in group], SimpleNamespace(start=0, numel=0)  # None: not on this rank
        places = [(m.lp_fragment_address.start, m.hp_fragment_address) if m else (0, nothing) for m in found]
        yield flat, [(p, first, at.start, at.numel) for p, (first, at) in zip(group, places, strict=True)]


@torch.no_grad()
def load_into_engine(engine, folder: Path) -> None:
    """Load a checkpoint of other ranks, another stage or no DeepSpeed into a DeepSpeed engine of stage 1, 2 or 3."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    zero, optimizer, names = engine.optimizer, engine.basic_optimizer, engine.param_names
    if not engine.zero_optimization() or getattr(zero, "swap_optimizer", False):
        raise MoveError("moves to ZeRO stages 1 to 3 only, and not to an optimizer on nvme")
    order = [names[parameter] for _, pieces in find_flats(zero) for parameter, *_ in pieces]
    saved = SavedShards(folder) if find_layout(folder) else SavedWhole(folder, order, engine.module)
    by_parameter = check_move(optimizer, saved.shapes, order)
    for flat, pieces in find_flats(zero):
        state = defaultdict(partial(torch.zeros_like, flat))
        for parameter, start, offset, numel in pieces:
            weight = saved.get_weight(names[parameter])
            with GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
                parameter.data.copy_(weight)
            flat.narrow(0, offset, numel).copy_(weight.flatten()[start : start + numel])
            for key, value in {} if by_parameter else saved.get_state(names[parameter]).items():
                if not getattr(value, "ndim", 0):
                    state[key] = copy.deepcopy(value)
                    continue
                if value.shape != weight.shape:
                    raise MoveError(f"was saved with another optimizer: {key} is not of its parameter's shape")
                state[key].narrow(0, offset, numel).copy_(value.flatten()[start : start + numel])
        optimizer.state[flat] = dict(state)
    if by_parameter:
        optimizer.load_state_dict(saved.get_by_parameter())
    for group, old in zip(optimizer.param_groups, saved.groups, strict=True):
        group.update({key: value for key, value in old.items() if key in ("lr", "initial_lr", "step")})
    if isinstance(saved, SavedShards):
        zero.loss_scaler = saved.shards[0]["loss_scaler"]
    engine.global_steps, engine.skipped_steps = saved.common["global_steps"], saved.common.get("skipped_steps", 0)
    engine.global_samples = saved.common.get("global_samples", engine.global_steps * engine.train_batch_size())
    if engine.lr_scheduler is not None and saved.common.get("lr_scheduler") is not None:
        engine.lr_scheduler.load_state_dict(saved.common["lr_scheduler"])


def follow(trainer, refusal: type[Exception]) -> None:
    """Let a trainer go on from checkpoints of other ranks and stages; raises `refusal` where it cannot."""
    # No argument says how the Trainer loads (5.23): two methods of this one, and a function of its module, go.
    load_state, load_random, args = trainer._load_optimizer_and_scheduler, trainer._load_rng_state, trainer.args

    def load_state_from(checkpoint):
        folder, deepspeed = Path(checkpoint or ""), trainer.is_deepspeed_enabled
        schedule, moves = folder / "scheduler.pt", checkpoint and not deepspeed and (folder / "latest").is_file()
        with refusing(checkpoint, refusal):
            if not moves and not (deepspeed and schedule.is_file()):
                return load_state(checkpoint)
            if moves:
                load_into_plain(trainer.model, trainer.optimizer, folder)
            saved, now = load_safely(schedule), trainer.lr_scheduler.state_dict()
            for key in {"base_lrs", "lr_lambdas", "_last_lr"} & now.keys():  # one a group, alike; of empty ones, too
                saved[key] = (saved[key] * len(now[key]))[: len(now[key])]
            trainer.lr_scheduler.load_state_dict(saved)
        if moves and args.process_index == 0:
            print(f"{checkpoint} was saved under ZeRO; going on with {args.world_size} without", flush=True)

    def load_random_from(checkpoint):
        rank = args.process_index
        name = f"rng_state_{rank}.pth" if args.world_size > 1 else "rng_state.pth"
        if checkpoint is None or (Path(checkpoint) / name).is_file():
            return load_random(checkpoint)
        print(f"{checkpoint}: no random state of rank {rank}: begun from --seed + step + rank; dropout draws others")
        set_seed(args.seed + trainer.state.global_step + rank)

    trainer._load_optimizer_and_scheduler, trainer._load_rng_state = load_state_from, load_random_from
    if args.deepspeed:
        transformers.trainer.deepspeed_load_checkpoint = partial(load_deepspeed_checkpoint, refusal=refusal)


@contextmanager
def refusing(checkpoint: str, refusal: type[Exception]):
    """Say in one sentence why a checkpoint cannot be gone on with here."""
    try:
        yield
    except MoveError as error:
        raise refusal(f"{checkpoint}: {str(error).removeprefix(f'{checkpoint}/')}") from None
    except (LookupError, ValueError, OSError) as error:
        why = f"is not of this run's model and optimizer, name another --output_dir ({type(error).__name__}: {error})"
        raise refusal(f"{checkpoint}: {why}") from error


def load_deepspeed_checkpoint(engine, checkpoint_path: str, load_module_strict: bool = True, refusal=ValueError):
    """In the place of the trainer's function of that name: no code is run, and other ranks and stages are moved to."""
    folder, stage = Path(checkpoint_path), int(engine.zero_optimization_stage())
    # DeepSpeed's own runs what a pickle says (0.19.8).
    engine.checkpoint_engine.load = partial(load_safely, mmap=False)
    with refusing(checkpoint_path, refusal):
        own, found = (engine.dp_world_size, stage == 3) if stage else None, find_layout(folder)
        if found == own and (folder / "latest").is_file():
            return deepspeed_load_checkpoint(engine, checkpoint_path, load_module_strict)
        if engine.global_rank == 0:
            before = f"on {found[0]} processes of ZeRO-{'3' if found[1] else '1 or 2'}" if found else "without ZeRO"
            print(f"{folder} was saved {before}; going on with {engine.dp_world_size} at stage {stage}", flush=True)
        return load_into_engine(engine, folder)
