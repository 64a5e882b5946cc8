# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23"]
# ///
"""
Adafactor that stays Adafactor under DeepSpeed's ZeRO, and that trains pure bf16 weights.

    optimizer = ZeroAdafactor(model.parameters(), lr=1e-3, scale_parameter=False, relative_step=False)
    trainer = Trainer(model, training_args, optimizer_cls_and_kwargs=choose(training_args))

A drop-in for transformers.Adafactor: same constructor, same defaults, same update (Shazeer and Stern 2018,
https://arxiv.org/abs/1804.04235, algorithm 4). ZeRO hands an optimizer flat 1-D partitions; the stock Adafactor then
no longer factors, keeps 4 bytes of state a parameter, and clips and scales by the RMS of whatever happens to lie on a
rank (transformers 5.23, deepspeed 0.19). This one finds out which piece of which parameter every rank holds, sums
squares along the rows and columns of the pieces, and exchanges only those sums: two small all-reduces a step and
parameter group (stage 3: sub-group). Its state belongs to parameters, not to partitions.

Stages 0 to 3, CPU offload; not NVMe offload of the optimizer. Tested with deepspeed 0.19.8.
"""

import argparse
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import Adafactor

# Elements worked on at once: 16 MB of fp32. Small enough for a CPU's cache, large enough to fill a GPU.
CHUNK = 1 << 22


@dataclass
class Fragment:
    """
    What one process updates of one parameter: elements [start, start + numel) of the flattened parameter.

    data: (numel,) the weights, written in place; grad: (numel,) their gradient; either may be empty. owned: the
    gradient is ours to overwrite. shape: of the whole parameter, seen here as a matrix of `height` x `width` rows
    and columns for every index of the leading dimensions, and a vector as one column.
    """

    parameter: torch.nn.Parameter
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor
    grad: torch.Tensor
    owned: bool

    def __post_init__(self):
        self.factored, self.numel = len(self.shape) > 1, math.prod(self.shape)
        self.width = self.shape[-1] if self.factored else 1
        self.height = self.shape[-2] if self.factored else self.numel

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """
        Cut the fragment into rectangles of about CHUNK elements: (elements of the fragment, rows, columns).

        Rows are counted through all leading dimensions. A fragment may begin and end in the middle of a row.
        """
        position, end = self.start, self.start + self.data.numel()
        while position < end:
            row, column = divmod(position, self.width)
            if column or end - position < self.width:
                rows, columns = 1, min(self.width - column, end - position)
            else:
                rows, columns = min(max(1, CHUNK // self.width), (end - position) // self.width), self.width
            taken = slice(position - self.start, position - self.start + rows * columns)
            yield taken, slice(row, row + rows), slice(column, column + columns)
            position += rows * columns

    def matrix_of(self, rows: slice) -> torch.Tensor | None:
        """Which matrix each of these rows is in, (rows,) of int64; None where there is only one."""
        if self.numel == self.height * self.width:
            return None
        return torch.arange(rows.start, rows.stop, device=self.data.device) // self.height


def add_squares(fragment: Fragment, row_sums: torch.Tensor, column_sums: torch.Tensor) -> None:
    """Add the squared gradient's sums: row_sums (rows,), column_sums (matrices, width; empty for a vector)."""
    for taken, rows, columns in fragment.blocks():
        square = fragment.grad[taken].view(rows.stop - rows.start, -1).float().square()
        row_sums[rows] += square.sum(1)
        if fragment.factored:
            matrix = fragment.matrix_of(rows)
            if matrix is None:
                column_sums[0, columns] += square.sum(0)
            else:
                column_sums[:, columns].index_add_(0, matrix, square)


def precondition(fragment: Fragment, block: tuple[slice, slice, slice], row_factor, column_factor) -> torch.Tensor:
    """The gradient of one block divided by the root of its second moment, (rows, columns) in fp32."""
    taken, rows, columns = block
    grad = fragment.grad[taken].view(rows.stop - rows.start, -1)
    update = grad.mul_(row_factor[rows, None]) if fragment.owned else grad * row_factor[rows, None]
    if column_factor is not None:
        matrix = fragment.matrix_of(rows)
        update.mul_(column_factor[0 if matrix is None else matrix, columns])
    return update


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    fp32 values to bf16, up or down with the probability of their distance, so that the mean is kept.

    bf16 is the upper half of fp32: noise below the cut carries over just as often as the cut part asks for. An
    update smaller than half a step of bf16 (2^-9 of the weight) is always lost by rounding to nearest.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def all_reduce(tensor: torch.Tensor, process_group) -> None:
    """Sum in place over the group's ranks; through the accelerator where the group knows no CPU tensors (offload)."""
    if process_group is None or torch.distributed.get_world_size(process_group) == 1:
        return
    if tensor.device.type == "cpu" and "gloo" not in torch.distributed.get_backend(process_group):
        moved = tensor.to(torch.accelerator.current_accelerator())
        torch.distributed.all_reduce(moved, group=process_group)
        tensor.copy_(moved)
    else:
        torch.distributed.all_reduce(tensor, group=process_group)


class ZeroAdafactor(Adafactor):
    """
    transformers.Adafactor whose update is the same on plain parameters and on ZeRO's partitions.

    Further arguments: stochastic_rounding, write bf16 parameters back with stochastic rounding (an update of fp32,
    a chunk at a time, without fp32 copies of the weights); seed, of that rounding, which depends on nothing but seed,
    parameter and step, so that every rank rounds alike and a resumed run goes on as it would have; step_in_backward,
    step each parameter inside the backward pass and free its gradient, near 2 bytes a parameter in all. It excludes
    what needs all gradients or several passes: clipping by a global norm, accumulation, several processes, ZeRO.

    State of a parameter, always for the whole of it and equal on all ranks: step; exp_avg_sq_row (shape[:-1]) and
    exp_avg_sq_col (shape[:-2] + shape[-1:]), or exp_avg_sq (shape) below two dimensions, in fp32; RMS, of the weights
    before the step, kept where scale_parameter asks for it. With beta1 also exp_avg, the one that is as large as the
    weights: of this rank's fragment only.
    """

    state_by_parameter = True  # for portable_checkpoints.py

    def __init__(self, params, *args, stochastic_rounding=True, seed=0, step_in_backward=False, **kwargs):
        self._members: list[list[torch.nn.Parameter]] = []  # a group's parameters as the model holds them
        self._index: dict[torch.nn.Parameter, int] = {}
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        super().__init__(params, *args, **kwargs)
        for group in self.param_groups if step_in_backward else ():
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p, group=group: self._step_one(p, group))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["members"] = len(self._members)  # DeepSpeed replaces group["params"], this stays
        self._members.append(list(group["params"]))
        for parameter in group["params"]:
            self._index[parameter] = len(self._index)

    @torch.no_grad()
    def step(self, closure=None):
        """
        One step. Under ZeRO DeepSpeed calls it once a parameter group (stages 1, 2) or sub-group (stage 3).

        Raises RuntimeError under NVMe offload of the optimizer and under wrappers other than DeepSpeed's.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for fragments, process_group in self._fragments(group):
                self._update(group, fragments, process_group)
        return loss

    @torch.no_grad()
    def _step_one(self, parameter: torch.nn.Parameter, group: dict) -> None:
        """The step of one parameter inside the backward pass; its gradient is freed."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise RuntimeError("step_in_backward: the gradients of several processes are not summed by then")
        for fragment in self._plain_fragment(parameter, parameter):
            self._update(group, [fragment], None)
        parameter.grad = None

    def _update(self, group: dict, fragments: list[Fragment], process_group) -> None:
        """Adafactor's update of these fragments; all ranks of the process group come with the same parameters."""
        states = [self._get_state(group, fragment) for fragment in fragments]
        sizes = [s for f in fragments for s in (f.numel // f.width, f.numel // f.height * f.factored, 1)]
        sums = torch.zeros(sum(sizes), device=fragments[0].data.device)
        parts = iter(sums.split(sizes))
        parts = [(next(parts), next(parts).view(-1, f.width), next(parts)) for f in fragments]
        for fragment, (row_sums, column_sums, weight_square) in zip(fragments, parts, strict=True):
            add_squares(fragment, row_sums, column_sums)
            if group["scale_parameter"]:
                for taken, _, _ in fragment.blocks():
                    weight_square += fragment.data[taken].float().square().sum()
        all_reduce(sums, process_group)

        factors, squares = [], torch.zeros(len(fragments), device=sums.device)
        for i, (fragment, state) in enumerate(zip(fragments, states, strict=True)):
            factors.append(self._advance(group, fragment, state, *parts[i]))
            for block in fragment.blocks():
                squares[i] += precondition(fragment, block, *factors[i]).square().sum()
        all_reduce(squares, process_group)

        for fragment, state, factor, square in zip(fragments, states, factors, squares, strict=True):
            # The relative or given step size, times the RMS of the weights; kept on the device, without a wait.
            lr = self._get_lr({**group, "scale_parameter": False}, state)
            if group["scale_parameter"]:
                lr = state["RMS"].clamp(min=group["eps"][1]) * lr
            rms = (square / fragment.numel).sqrt()
            self._write(group, fragment, state, factor, lr, lr / (rms / group["clip_threshold"]).clamp(min=1.0))

    def _get_state(self, group: dict, fragment: Fragment) -> dict:
        """The parameter's state on the fragment's device, made at the first step."""
        state, shape, device = self.state[fragment.parameter], fragment.shape, fragment.data.device
        if not state:
            state["step"], state["RMS"] = 0, 0
            if fragment.factored:
                state["exp_avg_sq_row"] = torch.zeros(shape[:-1], device=device)
                state["exp_avg_sq_col"] = torch.zeros(shape[:-2] + shape[-1:], device=device)
            else:
                state["exp_avg_sq"] = torch.zeros(shape, device=device)
            if group["beta1"] is not None:
                whole = fragment.data.numel() == fragment.numel
                state["exp_avg"] = torch.zeros(shape if whole else fragment.data.shape, device=device)
        for key, value in state.items():
            if torch.is_tensor(value) and value.device != device:
                state[key] = value.to(device)
        if group["beta1"] is not None:
            if state["exp_avg"].numel() != fragment.data.numel():  # of the whole parameter: of a checkpoint that moved
                end = fragment.start + fragment.data.numel()
                state["exp_avg"] = state["exp_avg"].flatten()[fragment.start : end].clone()
            state["exp_avg_start"] = fragment.start
        return state

    def _advance(self, group: dict, fragment: Fragment, state: dict, row_sums, column_sums, weight_square):
        """Take the sums into the second moments; returns what rows (n,) and columns (m, width) are multiplied by."""
        state["step"] += 1
        if group["scale_parameter"]:
            state["RMS"] = (weight_square[0] / fragment.numel).sqrt()
        beta2, eps = 1.0 - math.pow(state["step"], group["decay_rate"]), group["eps"][0]
        if not fragment.factored:
            moment = state["exp_avg_sq"]
            moment.mul_(beta2).add_(row_sums.view(fragment.shape).add_(eps), alpha=1.0 - beta2)
            return moment.rsqrt().flatten(), None
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        row.mul_(beta2).add_(row_sums.view(row.shape).div_(fragment.width).add_(eps), alpha=1.0 - beta2)
        column.mul_(beta2).add_(column_sums.view(column.shape).div_(fragment.height).add_(eps), alpha=1.0 - beta2)
        row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().flatten()
        return row_factor, column.rsqrt().view(-1, fragment.width)

    def _write(self, group: dict, fragment: Fragment, state: dict, factor, lr, scale) -> None:
        """Subtract `scale` times the update from the fragment's weights, in fp32, block by block."""
        rounding = self.stochastic_rounding and fragment.data.dtype == torch.bfloat16
        if rounding:
            key = (self.seed * 1_000_003 + self._index[fragment.parameter]) * 1_000_003 + state["step"]
            generator = torch.Generator(fragment.data.device).manual_seed(key % (1 << 63))
        for block in fragment.blocks():
            taken = block[0]
            if fragment.owned:  # preconditioned in place already
                update = fragment.grad[taken].mul_(scale)
            else:
                update = precondition(fragment, block, *factor).mul_(scale).flatten()
            if group["beta1"] is not None:
                update = state["exp_avg"].view(-1)[taken].lerp_(update, 1 - group["beta1"])
            weights = fragment.data[taken]
            exact = weights.float()  # the same memory where the weights are fp32
            if group["weight_decay"]:
                exact.sub_(exact * (group["weight_decay"] * lr))  # times 1 - 3e-5 would round alike at every step
            exact.sub_(update)
            if weights.dtype != torch.float32:
                weights.copy_(round_stochastically(exact, generator) if rounding else exact)

    # -------------------------------------------------------------------------------------------- who holds what

    def _fragments(self, group: dict) -> Iterator[tuple[list[Fragment], object]]:
        """Yield (fragments, process group that shares their parameters) for all the group's tensors."""
        members, tensors = self._members[group["members"]], group["params"]
        partitioned = [p for p in members if hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping")]
        if not tensors:  # stage 3 hands over one sub-group at a time
            return
        if tensors[0] is members[0] or not partitioned:
            # The parameters themselves, or their fp32 copies one by one (DeepSpeed's stage 0 in fp16).
            if [t.shape for t in tensors] != [p.shape for p in members]:
                raise RuntimeError("ZeroAdafactor: a wrapper other than DeepSpeed's flattened these parameters")
            for tensor, parameter in zip(tensors, members, strict=True):
                for fragment in self._plain_fragment(tensor, parameter):
                    yield [fragment], None
        elif hasattr(partitioned[0], "_z3_optimizer"):
            for flat in tensors:
                yield self._stage3_fragments(flat, partitioned[0]._z3_optimizer)
        else:
            yield self._stage12_fragments(tensors[0], partitioned), partitioned[0]._dp_group

    def _plain_fragment(self, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> Iterator[Fragment]:
        """The whole of one tensor that has a gradient; what is not contiguous is copied back after the update."""
        if tensor.grad is None:
            return
        if tensor.grad.is_sparse:
            raise RuntimeError("Adafactor does not support sparse gradients.")
        data = tensor.detach().contiguous()
        yield Fragment(parameter, tuple(tensor.shape), 0, data.view(-1), tensor.grad.reshape(-1), False)
        if not tensor.is_contiguous():
            tensor.copy_(data)

    def _stage12_fragments(self, flat: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[Fragment]:
        """Stages 1 and 2, and stage 0 in bf16: one rank's partition of the group's parameters laid end to end."""
        fragments = []
        for parameter in parameters:
            start = offset = numel = 0
            if parameter._hp_mapping is not None:  # None: this rank holds nothing of it, but joins its sums
                inside, outside = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                start, offset, numel = inside.start, outside.start, outside.numel
            views = (part.detach().narrow(0, offset, numel) for part in (flat, flat.grad))
            fragments.append(Fragment(parameter, tuple(parameter.shape), start, *views, True))
        return fragments

    def _stage3_fragments(self, flat: torch.Tensor, zero) -> tuple[list[Fragment], object]:
        """Stage 3: every parameter is cut into as many equal pieces as there are ranks, the last one padded."""
        if zero.swap_optimizer:
            raise RuntimeError(
                "ZeroAdafactor cannot run with offload_optimizer on nvme: DeepSpeed swaps optimizer state in tensors "
                "as large as the weights, which factors are not. There is next to no state: offload to cpu instead"
            )
        sub_group = next(i for i, t in enumerate(zero.fp32_partitioned_groups_flat) if t is flat)
        process_group = zero._get_sub_group_process_group(sub_group)
        fragments, offset = [], 0
        for parameter in zero.fp16_groups[sub_group]:
            size = parameter.partition_numel()
            start = torch.distributed.get_rank(process_group) * size
            numel = max(0, min(size, parameter.ds_numel - start))
            views = (part.detach().narrow(0, offset, numel) for part in (flat, flat.grad))
            first = min(start, parameter.ds_numel)
            fragments.append(Fragment(parameter, tuple(parameter.ds_shape), first, *views, True))
            offset += size
        return fragments, process_group

    # -------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """The state by the parameters' order in the constructor, as torch has it, also under ZeRO."""
        groups = []
        for group in self.param_groups:
            kept = {key: value for key, value in group.items() if key not in ("params", "members")}
            groups.append({**kept, "params": [self._index[p] for p in self._members[group["members"]]]})
        state = {i: dict(self.state[p]) for p, i in self._index.items() if self.state.get(p)}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes transformers.Adafactor's state of plain parameters, too. Raises ValueError if it does not fit."""
        saved_groups = [group for group in state_dict["param_groups"] if group["params"]]  # DeepSpeed drops empty ones
        groups = [group for group in self.param_groups if self._members[group["members"]]]
        members = [len(self._members[group["members"]]) for group in groups]
        if [len(group["params"]) for group in saved_groups] != members:
            raise ValueError("the saved optimizer state has other parameter groups than this optimizer")
        for group, saved in zip(groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "members")})
        order = [i for group in saved_groups for i in group["params"]]
        for parameter, i in zip(self._index, order, strict=True):
            state = state_dict["state"].get(i, {})
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            moment = state.get("exp_avg_sq_row", state.get("exp_avg_sq"))
            if moment is not None and tuple(moment.shape) != (shape[:-1] if len(shape) > 1 else shape):
                raise ValueError(f"the saved state of parameter {i} has shape {tuple(moment.shape)}, not of {shape}")
            self.state[parameter] = {k: v.float().clone() if torch.is_tensor(v) else v for k, v in state.items()}


# ------------------------------------------------------------------------------------------- in a Trainer's run


def find_problems(args: argparse.Namespace) -> list[str]:
    """What --pure_bf16 and `--optim_args step_in_backward=true` exclude. args: flags of script and Trainer."""
    in_backward, ranks = steps_in_backward(args.optim_args), int(os.environ.get("WORLD_SIZE", 1))
    if not (args.pure_bf16 or in_backward):
        return []
    steps, norm = args.gradient_accumulation_steps, args.max_grad_norm
    excluded = [
        (args.optim != "adafactor", f"only --optim adafactor rounds and steps so, not --optim {args.optim}"),
        (args.deepspeed, "not under --deepspeed, which keeps fp32 weights; use torchrun or one process"),
        (args.fp16, "not with --fp16; leave it out"),
        (
            in_backward and steps > 1,
            f"--gradient_accumulation_steps {steps} needs the gradients of several passes; use a larger "
            "--per_device_train_batch_size or leave one out",
        ),
        (
            in_backward and norm > 0,
            f"--max_grad_norm {norm} needs all gradients at once; give 0: Adafactor clips itself",
        ),
        (in_backward and ranks > 1, "works in one process only; start it with `python`"),
    ]
    flag = "--optim_args step_in_backward" if in_backward else "--pure_bf16"
    return [f"{flag}: {said}" for wrong, said in excluded if wrong]


def steps_in_backward(optim_args: str | None) -> bool:
    return "step_in_backward=true" in (optim_args or "").lower().replace(" ", "")


def choose(training_args) -> tuple[type, dict] | None:
    """Trainer's optimizer_cls_and_kwargs (5.23's Seq2SeqTrainer has the attribute only), or None for the stock one."""
    from transformers import trainer

    if training_args.optim != "adafactor":
        return None
    kwargs = trainer.Trainer.get_optimizer_cls_and_kwargs(training_args)[1]
    return ZeroAdafactor, {**kwargs, "step_in_backward": steps_in_backward(training_args.optim_args)}


def describe(training_args, model) -> str:
    """The optimizer in a line."""
    if training_args.optim != "adafactor":
        return f"optimizer: {training_args.optim.value}"
    rounded = ", bf16 weights rounded stochastically" if model.dtype == torch.bfloat16 else ""
    return f"optimizer: ZeroAdafactor of zero_adafactor.py: factored and the same on any number of ranks{rounded}"
