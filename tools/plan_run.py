# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23"]
# ///
"""Will it fit, how long, what will it cost: memory per GPU and host of a training run before anything is downloaded.

Every way to train t5-large on four GPUs of 24 GB, and the fastest that fits:

    python tools/plan_run.py --model t5-large --num_gpus 4 --gpu_memory 24 --host_memory 200 \
        --optimizer zero_adafactor --per_device_train_batch_size 20 --max_source_length 256 --max_target_length 64

The same with time and price of an epoch, and the DeepSpeed file written:

    python tools/plan_run.py --model llama2-7b --num_gpus 4 --gpu_memory 80 --host_memory 400 --optimizer adamw \
        --max_seq_length 1024 --num_examples 14246 --gpu_tflops 312 --mfu 0.4 --price_per_hour 2.5 --output_file z.json

Predicted against measured, two real steps on this machine, in seconds:

    python tools/plan_run.py --model t5-small --per_device_train_batch_size 8 --max_source_length 128 --probe

--model is a preset of init_model.py (beside this script), a model folder, or a name on the hub, of which only the
configuration is read. Activations are not a formula: the training step runs on fake tensors, which have shapes but no
storage, and every allocation is counted. What DeepSpeed adds was read in its source (0.19.8) and compared with the
tensors it held on two CPU ranks, not measured on GPUs.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Adafactor, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
try:
    from zero_adafactor import ZeroAdafactor
except ModuleNotFoundError:  # copied alone: --optimizer zero_adafactor says so
    ZeroAdafactor = None

GB = 1e9
OPTIMIZERS = ("adamw", "adafactor", "zero_adafactor")
# Name, ZeRO stage or kind of run without DeepSpeed, what waits in host memory. The fastest first: each moves more.
SETTINGS = (
    ("fp32 weights, bf16 autocast, no DeepSpeed", "autocast", ""),
    ("pure bf16, no DeepSpeed", "pure", ""),
    ("pure bf16, stepping in the backward pass", "in_backward", ""),
    ("ZeRO-1", 1, ""),
    ("ZeRO-2", 2, ""),
    ("ZeRO-3", 3, ""),
    ("ZeRO-2, optimizer in host memory", 2, "optimizer"),
    ("ZeRO-3, optimizer in host memory", 3, "optimizer"),
    ("ZeRO-3, optimizer and weights in host memory", 3, "all"),
)
PURE = ("pure", "in_backward")
DTYPES = (torch.float32, torch.bfloat16)  # of the weights the passes run on: autocast; pure or DeepSpeed's
BUCKET = 2e8  # elements; reduce_bucket_size and allgather_bucket_size of ds_configs/zero2*.json
LIVE = 1e9  # elements; stage3_max_live_parameters of ds_configs/zero3*.json
SUB_GROUP = 1e9  # elements of a rank stepped at a time under ZeRO-3; sub_group_size there
CONTEXT = 0.6e9  # bytes of a GPU that the CUDA context, cuBLAS and NCCL take; a guess, 0.4 to 0.8 are usual
RESERVED = 1.05  # what the caching allocator holds over what is in use; a guess
PROCESS = 2e9  # bytes of host memory of a process with torch, CUDA and transformers, before data; a guess

# glibc raises its threshold for mmap when large blocks are freed, and from then on keeps freed tensors in a heap with
# holes: the resident size would be the allocator's history. Fixed, every tensor of 64 KB or more goes back when freed.
PROBE_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="Preset of init_model.py, model folder, or name on the hub.")
    add("--num_gpus", type=int, default=1, help="GPUs in all, on one host.")
    add("--gpu_memory", type=float, default=24, help="GB of each GPU (1e9 bytes).")
    add("--host_memory", type=float, default=64, help="GB of the host.")
    add("--optimizer", choices=OPTIMIZERS, default="zero_adafactor", help="adafactor: the one of transformers.")
    add("--per_device_train_batch_size", type=int, default=8, help="Rows a GPU and pass.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Passes a step.")
    add("--max_source_length", type=int, default=256, help="Source tokens of an encoder-decoder.")
    add("--max_target_length", type=int, default=64, help="Target tokens of an encoder-decoder.")
    add("--max_seq_length", type=int, default=1024, help="Tokens of a causal model's row.")
    add(
        "--activation_checkpointing",
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        help="Keep only the layers' inputs and compute the rest again. Not given: planned both ways. "
        "transformers before 5.23 calls it by the second name.",
    )
    add("--num_examples", type=int, default=None, help="Rows of an epoch, for its time and price.")
    add("--gpu_tflops", type=float, default=None, help="The GPU's bf16 peak, dense: A100 312, H100/H200 989, L4 121.")
    add("--mfu", type=float, default=0.35, help="Share of that peak reached: guessed, or measured with --probe.")
    add("--price_per_hour", type=float, default=None, help="Price of one GPU for an hour, in your money.")
    add("--output_file", default=None, help="Where the DeepSpeed file of the fastest setting that fits goes.")
    add("--probe", action="store_true", help="Run two real steps in a process here: predicted and measured.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = []
    counts = ("num_gpus", "per_device_train_batch_size", "gradient_accumulation_steps", "num_examples")
    for flag in (*counts, "max_source_length", "max_target_length", "max_seq_length"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    for flag in ("gpu_memory", "host_memory", "mfu", "gpu_tflops"):
        value = getattr(args, flag)
        if value is not None and not (value > 0 and math.isfinite(value)):
            problems.append(f"--{flag} {value}: must be a number above 0")
    if args.mfu > 1:
        problems.append(f"--mfu {args.mfu}: is a share of the peak, at most 1")
    if args.price_per_hour is not None and not (args.price_per_hour >= 0 and math.isfinite(args.price_per_hour)):
        problems.append(f"--price_per_hour {args.price_per_hour}: must be a number, 0 or more")
    if args.num_examples is not None and args.gpu_tflops is None:
        problems.append("--num_examples: the time of an epoch needs --gpu_tflops, too")
    if args.price_per_hour is not None and args.num_examples is None:
        problems.append("--price_per_hour: the price of an epoch needs --num_examples, too")
    if args.optimizer == "zero_adafactor" and ZeroAdafactor is None:
        problems.append("--optimizer zero_adafactor: needs zero_adafactor.py in the folder above; copy it there")
    if args.output_file is not None:
        if not Path(args.output_file).resolve().parent.is_dir():
            problems.append(f"--output_file {args.output_file}: its folder does not exist; make it first")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_config(name):
    """Return the configuration of a preset, folder or hub model; raises ValueError with the way out."""
    presets = {}
    if not Path(name).exists():
        with contextlib.suppress(ModuleNotFoundError):
            import init_model

            presets = {preset: family for family, shapes in init_model.PRESETS.items() for preset in shapes}
            if name in presets:
                family = next(family for family, shapes in init_model.PRESETS.items() if name in shapes)
                return init_model.make_config(family, name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"--model {name}: no preset ({', '.join(presets)}) and no configuration: {reason}") from None
    known = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in known._model_mapping:
        raise ValueError(f"--model {name}: {config.model_type} is no causal or encoder-decoder language model")
    if not hasattr(config, "num_attention_heads") or not hasattr(config, "hidden_size"):
        raise ValueError(f"--model {name}: {config.model_type} is of two configurations; plan the larger one alone")
    return config


def check_lengths(config, args):
    """Return the problems of rows longer than the model has positions for; T5 has no such limit."""
    limit = getattr(config, "max_position_embeddings", None)
    flags = ("max_source_length", "max_target_length") if config.is_encoder_decoder else ("max_seq_length",)
    return [
        f"--{flag} {getattr(args, flag)}: {args.model} has {limit} positions; give at most that"
        for flag in flags
        if limit is not None and getattr(args, flag) > limit
    ]


def build_model(config, dtype, checkpointing=False):
    """Return a model with random weights of the dtype; under FakeTensorMode it takes no memory."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, dtype=dtype).train()
    if checkpointing:
        with warnings.catch_warnings():  # transformers 5.23 has a new name for it, 5.17 does not know that one
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    return model


def make_optimizer(name, parameters):
    """Return the optimizer with the Trainer's settings; AdamW fused, its default: no temporaries."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    chosen = Adafactor if name == "adafactor" else ZeroAdafactor
    return chosen(parameters, lr=1e-4, scale_parameter=False, relative_step=False)


def make_batch(config, args, device="cpu"):
    """Return (inputs, labels) of full length."""
    rows, text = args.per_device_train_batch_size, config.is_encoder_decoder
    ids = torch.ones(rows, args.max_source_length if text else args.max_seq_length, dtype=torch.long, device=device)
    labels = torch.ones(rows, args.max_target_length, dtype=torch.long, device=device) if text else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": labels} if text else {}), labels


def run_step(model, batch, labels, autocast, mark=lambda name: None):
    """One forward and backward pass with the loss of the training scripts: cross-entropy in fp32."""
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=autocast):
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
    del logits
    mark("forward")
    loss.backward()
    mark("backward")


def train_two_steps(config, args, meter, device="cpu", autocast=False):
    """Two steps from nothing, for real or on fake tensors; the meter's mark() is called after every part of them."""
    with torch.device(device):
        model = build_model(config, torch.float32, args.activation_checkpointing)
    optimizer = make_optimizer(args.optimizer, model.parameters())
    batch, labels = make_batch(config, args, device)
    meter.mark("weights")
    for _ in range(2):
        run_step(model, batch, labels, autocast, meter.mark)
        optimizer.step()
        meter.mark("optimizer step")
        optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Counting what would be allocated


class MemoryMeter(TorchDispatchMode):
    """
    Bytes of all storages that operations make while it is entered, and their peak.

    live: now; grads: of them, gradients of parameters that watch() was given; peak, peak_without_grads: since the
    last mark(); marks: {name: largest peak}.
    """

    def __init__(self):
        super().__init__()
        self.live = self.grads = self.peak = self.peak_without_grads = 0
        self.marks, self.storages = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        """Count a storage until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def forget(_):
            self.live -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_without_grads = max(self.peak_without_grads, self.live - self.grads)

    def watch(self, model):
        """Tell the parameters' gradients from the rest from now on."""

        def count(parameter):
            self.grads += parameter.grad.untyped_storage().nbytes()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(count)

    def mark(self, name):
        self.marks[name] = max(self.marks.get(name, 0), self.peak)
        self.peak = self.peak_without_grads = self.live


class FusedAttention(torch.autograd.Function):
    """
    What the fused attention kernels of a GPU allocate, without computing anything: no scores are kept.

    The kernels of a CPU do keep them where there is dropout or a bias that learns, as in T5, and a build of torch
    for CPUs has no fake GPU.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias):
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, bias, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx, grad):
        query, key, value, bias, *_ = ctx.saved_tensors
        wanted = bias is not None and ctx.needs_input_grad[3]
        return *map(torch.empty_like, (query, key, value)), torch.empty_like(bias) if wanted else None


def fused_attention(query, key, value, attn_mask=None, *args, **kwargs):
    """Stands in for scaled_dot_product_attention while the memory of a GPU is counted."""
    if attn_mask is not None and attn_mask.dtype != query.dtype:
        attn_mask = attn_mask.to(query.dtype)  # the kernels add it, a boolean one is made a bias
    return FusedAttention.apply(query, key, value, attn_mask)


def track_pass(config, args, dtype, checkpointing):
    """
    Return bytes that a forward and backward pass on a GPU takes beyond the weights: (grads kept, grads not counted).

    dtype: of the weights; the fp32 ones run under bf16 autocast, whose copies of the weights are counted, too.
    """
    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with FakeTensorMode(), MemoryMeter() as meter, attention:
        model = build_model(config, dtype, checkpointing)
        batch, labels = make_batch(config, args)
        meter.mark("weights")
        weights = meter.live
        meter.watch(model)
        run_step(model, batch, labels, dtype == torch.float32)
    return meter.peak - weights, meter.peak_without_grads - weights


def track_optimizer(name, shapes, dtype):
    """Return bytes of the optimizer's (state, temporaries of a step) for parameters of these shapes."""
    with FakeTensorMode(), MemoryMeter() as meter:
        parameters = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = make_optimizer(name, parameters)
        before = meter.live
        optimizer.step()
        meter.mark("first step")
        state = meter.live - before
        optimizer.step()
    return state, meter.peak - before - state


def list_shapes(config):
    """Return the shapes of all parameters, largest first."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in build_model(config, torch.bfloat16).parameters()]
    return sorted(shapes, key=math.prod, reverse=True)


def count_factors(shapes):
    """Return bytes of Adafactor's state: sums over rows and columns in fp32, and whole vectors."""
    return sum(4 * math.prod(s[:-1]) + 4 * math.prod(s[:-2] + s[-1:]) if len(s) > 1 else 4 * s[0] for s in shapes)


def count_flops(config, args):
    """Return floating-point operations of one row's forward and backward pass, without those computed again."""
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings().weight
    inner = {n: p.numel() for n, p in model.named_parameters() if id(p) not in tables and p is not head}
    heads = config.num_attention_heads
    size = heads * (getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads)
    if not config.is_encoder_decoder:
        tokens = args.max_seq_length
        attention = 12 * config.num_hidden_layers * size * tokens * tokens / 2  # half of the pairs: causal
        return 6 * tokens * (sum(inner.values()) + head.numel()) + attention
    source, target = args.max_source_length, args.max_target_length
    encoder = sum(count for name, count in inner.items() if ".encoder." in f".{name}")
    decoder = sum(inner.values()) - encoder
    # Cross-attention: queries and output for target tokens, keys and values for source tokens.
    cross = sum(c for n, c in inner.items() if "EncDecAttention" in n or "encoder_attn." in n)
    matrix = 6 * (source * encoder + target * (decoder - cross + head.numel()) + (source + target) / 2 * cross)
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    pairs = config.num_hidden_layers * source**2 + layers * (target**2 / 2 + source * target)
    return matrix + 12 * size * pairs


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def measure(config, args):
    """Return what plan() needs to know: shapes, factors, and for each way of checkpointing what a pass takes."""
    shapes = list_shapes(config)
    ways = (False, True) if args.activation_checkpointing is None else (args.activation_checkpointing,)
    passes = {(dtype, way): track_pass(config, args, dtype, way) for way in ways for dtype in DTYPES}
    return {
        "parameters": sum(map(math.prod, shapes)),
        "largest": shapes[0],
        "hidden": config.hidden_size,
        "factors": count_factors(shapes),
        "ways": ways,
        "passes": passes,
    }


def pinned(count, width, piece=math.inf):
    """Return bytes of page-locked memory for `count` elements in pieces: torch rounds each up to a power of two."""
    pieces = [piece] * int(count // piece) + [count % piece if piece < math.inf else count]
    return sum(2 ** math.ceil(math.log2(width * n)) for n in pieces if n >= 1)


def plan(setting, numbers, args, checkpointing):
    """
    Return bytes by part of one GPU (weights to activations, gpu: the peak) and of the host (host: the peak).

    step: what the optimizer's step takes beyond what stays; buffers and activations: what the backward pass takes.
    They take turns, so the peak is what stays plus the larger of the two.
    """
    kind = setting[1]
    if kind in (1, 2, 3):
        parts, host = plan_zero(kind, setting[2], numbers, args, checkpointing)
    else:
        parts, host = plan_plain(kind, numbers, args, checkpointing), 0
    stays = sum(parts[name] for name in ("weights", "master", "gradients", "state"))
    turns = max(parts["step"], parts["buffers"] + parts["activations"])
    # Before the run every process loads fp32 weights of its own; under ZeRO-3 only the first does.
    loading = 4 * numbers["parameters"] * (1 if kind == 3 else args.num_gpus) / (1 if kind not in PURE else 2)
    host = max(host, loading) + args.num_gpus * PROCESS
    return parts | {"gpu": (stays + turns) * RESERVED + CONTEXT, "host": host}


def plan_plain(kind, numbers, args, checkpointing):
    """The parts of a run without DeepSpeed; several GPUs are DistributedDataParallel's."""
    count, dtype = numbers["parameters"], torch.bfloat16 if kind in PURE else torch.float32
    kept, bare = numbers["passes"][dtype, checkpointing]
    width = dtype.itemsize
    parts = {"weights": width * count, "master": 0, "gradients": 0 if kind == "in_backward" else width * count}
    parts["state"] = 8 * count if args.optimizer == "adamw" else numbers["factors"]
    # Its buckets are a second copy of the gradients unless gradient_as_bucket_view is set, and it is not.
    parts["buffers"] = width * count if args.num_gpus > 1 else 0
    # A tensor's temporaries may live on while the next one's are made: two of the largest show that.
    step = track_optimizer(args.optimizer, [numbers["largest"]] * 2, dtype)[1]
    if kind == "in_backward":
        return parts | {"step": 0, "activations": bare + step}
    return parts | {"step": step + parts["buffers"], "activations": beside_gradients(kept, bare, parts, args)}


def beside_gradients(kept, bare, parts, args):
    """
    Return bytes of activations beside whole gradients.

    In a step's only pass the gradients come while the activations go; in a further pass they are there already.
    """
    return bare if args.gradient_accumulation_steps > 1 else max(0, kept - parts["gradients"])


def plan_zero(stage, offload, numbers, args, checkpointing):
    """The parts of a run under ZeRO, and its steady host memory without the processes themselves."""
    count, gpus, factors = numbers["parameters"], args.num_gpus, numbers["factors"]
    share, largest = count / gpus, math.prod(numbers["largest"])
    kept, bare = numbers["passes"][torch.bfloat16, checkpointing]
    state = {"adamw": 8 * share, "adafactor": 4 * share, "zero_adafactor": factors}[args.optimizer]
    stepped = min(share, SUB_GROUP + largest / gpus) if stage == 3 else share  # a sub-group ends behind its limit
    temporaries = step_temporaries(args.optimizer, stepped, factors, offload)
    parts = {"weights": 2 * (count if stage < 3 else share), "master": 4 * share}
    parts |= {"gradients": 2 * (count if stage < 2 else share), "state": state}
    # DeepSpeed copies the bf16 gradients of what it steps into one tensor, and that into an fp32 one; by then stage 1
    # has dropped what other ranks step. When the optimizer runs the fp32 ones are left, under stage 3 all bf16 ones.
    if stage == 3:
        parts["step"] = max(6 * stepped, 4 * stepped + temporaries)
    else:
        parts["step"] = max(0, max(8 * share, 4 * share + temporaries) - parts["gradients"])
    parts["activations"] = bare if stage > 1 else beside_gradients(kept, bare, parts, args)
    if stage < 3:
        parts["buffers"] = 2 * 2 * BUCKET  # two, because overlap_comm fills one while the other is on its way
    else:
        parts["buffers"] = 2 * min(LIVE, count) + 2 * 2 * numbers["hidden"] ** 2  # gathered weights, gradient bucket
    host = 0
    if offload:
        host = 4 * share + state + temporaries + pinned(share, 2)  # bf16 copies: weights (stage 2), gradients (3)
        host += pinned(share, 4, SUB_GROUP if stage == 3 else math.inf)
        host += pinned(largest, 2) if stage == 2 else 0
        host += pinned(share, 2) if stage == 2 and args.gradient_accumulation_steps > 1 else 0  # the passes' sum
        parts["buffers"] += 2 * largest if stage == 2 else 0
        parts |= {"master": 0, "gradients": 0, "state": 0, "step": 0}
    if offload == "all":
        host += pinned(share, 2)
        parts["weights"] = 0
    return parts, gpus * host


def step_temporaries(optimizer, elements, factors, offload):
    """Return bytes an optimizer's step takes for a rank's flat fp32 piece."""
    if optimizer == "adamw":
        return 0  # fused on the GPU, DeepSpeed's CPU Adam in host memory
    if optimizer == "adafactor":
        return track_optimizer("adafactor", [(int(elements),)], torch.float32)[1]
    return 2 * factors + 4 * 4 * min(2**22, elements)  # sums and their scaled copies; blocks of 16 MB


def plan_all(numbers, args):
    """Return [(setting, checkpointing, parts, whether it fits)] for all this optimizer and number of GPUs allow."""
    plans = []
    for way in numbers["ways"]:
        for setting in SETTINGS:
            if setting[1] in PURE and args.optimizer != "zero_adafactor":
                continue  # --pure_bf16 is ZeroAdafactor's
            if setting[1] == "in_backward" and (args.num_gpus > 1 or args.gradient_accumulation_steps > 1):
                continue
            parts = plan(setting, numbers, args, way)
            fits = parts["gpu"] <= args.gpu_memory * GB and parts["host"] <= args.host_memory * GB
            plans.append((setting, way, parts, fits))
    # Computing a third more is faster than waiting for the host's memory.
    return sorted(plans, key=lambda row: bool(row[0][2]))


def format_plans(plans, args):
    """Return the table, in GB, with what is left or lacking on the GPU and on the host."""
    names = ("weights", "master", "gradients", "state", "step", "buffers", "activations", "gpu", "host")
    lines = [f"{'GB a GPU; the host last':<64}" + "".join(f"{name:>12}" for name in names) + "  fits"]
    for (title, _, _), checkpointing, parts, fits in plans:
        room, host = args.gpu_memory - parts["gpu"] / GB, args.host_memory - parts["host"] / GB
        verdict = f"yes, {room:.1f} GB left" if fits else "no"
        if room < 0:
            verdict += f", {-room:.1f} GB too much a GPU"
        if host < 0:
            verdict += f", {-host:.1f} GB too much on the host"
        title += ", checkpointing" if checkpointing else ""
        lines.append(f"{title:<64}" + "".join(f"{parts[name] / GB:>12.2f}" for name in names) + f"  {verdict}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What to run, how long, what it costs


def make_ds_config(setting, optimizer):
    """Return the DeepSpeed settings of a plan, as in ds_configs/, or None where DeepSpeed is not needed."""
    _, stage, offload = setting
    if stage not in (1, 2, 3):
        return None
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage < 3:
        zero |= {"allgather_bucket_size": BUCKET, "reduce_bucket_size": BUCKET}
    else:
        zero |= {"sub_group_size": SUB_GROUP, "stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE}
        zero |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
        zero |= {"stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True}
    for name, wanted in (("offload_optimizer", ("optimizer", "all")), ("offload_param", ("all",))):
        if offload in wanted:
            zero[name] = {"device": "cpu", "pin_memory": True}
    config = {"bf16": {"enabled": "auto"}, "zero_optimization": zero}
    if offload and optimizer == "adamw":  # DeepSpeed's CPU Adam
        config["optimizer"] = {
            "type": "AdamW",
            "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
        }
    else:
        config["zero_allow_untested_optimizer"] = True
        config |= {"zero_force_ds_cpu_optimizer": False} if offload else {}
    autos = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    return config | dict.fromkeys(autos, "auto")


def make_command(setting, checkpointing, config, args):
    """Return the command of a setting; data and output folder are yours."""
    _, kind, _ = setting
    script = "run_summarization.py" if config.is_encoder_decoder else "run_clm_instruct.py"
    if kind in (1, 2, 3):
        words = [f"deepspeed --num_gpus {args.num_gpus} {script} --deepspeed {args.output_file or 'ZERO.json'}"]
    else:
        words = [f"torchrun --nproc_per_node {args.num_gpus} {script}" if args.num_gpus > 1 else f"python {script}"]
    # A preset's shape may be on the hub under a longer name.
    known = Path(args.model).exists() or "/" in args.model or args.model.startswith("t5-")
    words += [f"--model_name_or_path {args.model if known else 'MODEL'}", "--pure_bf16" if kind in PURE else "--bf16"]
    words += ["--optim_args step_in_backward=true --max_grad_norm 0"] if kind == "in_backward" else []
    words += ["--optim adafactor"] if args.optimizer != "adamw" else []  # the default is AdamW, fused
    words += [f"--per_device_train_batch_size {args.per_device_train_batch_size}"]
    steps = args.gradient_accumulation_steps
    words += [f"--gradient_accumulation_steps {steps}"] if steps > 1 else []
    words += ["--activation_checkpointing"] if checkpointing else []
    lengths = ("max_source_length", "max_target_length") if config.is_encoder_decoder else ("max_seq_length",)
    words += [f"--{name} {getattr(args, name)}" for name in lengths]
    return " ".join([*words, "--do_train --train_file TRAIN --output_dir OUT"])


def estimate_time(config, args, checkpointing):
    """Return (TFLOP a row, seconds a pass, hours an epoch, price of it); the last two None where not asked for."""
    row = count_flops(config, args) / 1e12
    again = 4 / 3 if checkpointing else 1  # the forward pass a second time
    seconds = again * row * args.per_device_train_batch_size / (args.gpu_tflops * args.mfu)
    if args.num_examples is None:
        return row, seconds, None, None
    passes = math.ceil(args.num_examples / args.per_device_train_batch_size / args.num_gpus)
    hours = seconds * passes / 3600
    price = None if args.price_per_hour is None else hours * args.num_gpus * args.price_per_hour
    return row, seconds, hours, price


def describe_time(config, args, checkpointing):
    """Return estimate_time() in words."""
    row, seconds, hours, price = estimate_time(config, args, checkpointing)
    text = f"{row:.3f} TFLOP a row; {seconds:.3f} s a pass at {args.mfu:.0%} of {args.gpu_tflops:g} TFLOP/s"
    if hours is not None:
        text += f"; {hours:.2f} hours an epoch of {args.num_examples} rows of full length"
    if price is not None:
        text += f", {price:.2f} at {args.price_per_hour:g} a GPU and hour"
    return text


def describe_rows(config, args):
    """Return 'N rows of L tokens' for the heads of the tables."""
    tokens = f"{args.max_source_length} + {args.max_target_length}"
    tokens = tokens if config.is_encoder_decoder else str(args.max_seq_length)
    return f"{args.per_device_train_batch_size} rows of {tokens} tokens"


# ---------------------------------------------------------------------------------------------------------------------
# Probe


class RealMeter:
    """Peak bytes between marks over those at the start: of the GPU's allocator, else resident (Linux)."""

    def __init__(self, cuda):
        self.cuda, self.marks, self.times = cuda, {}, []
        self.base = torch.cuda.memory_allocated() if cuda else read_status("VmRSS")
        self.reset()

    def reset(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size again

    def mark(self, name):
        if self.cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if self.cuda else read_status("VmHWM")
        self.marks[name] = max(self.marks.get(name, 0), peak - self.base)
        self.times.append(time.perf_counter())
        self.reset()


def read_status(key):
    """Return a size of this process in bytes, from /proc/self/status (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def predict_probe(config, args, cuda):
    """Return {part: peak bytes} of train_two_steps() on fake tensors, with the attention of the device."""
    attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention)
    with FakeTensorMode(), MemoryMeter() as meter, attention if cuda else contextlib.nullcontext():
        train_two_steps(config, args, meter, autocast=cuda)
    return meter.marks


def run_probe(config, args):
    """Train two steps for real and print {part: peak bytes} and the second step's seconds as JSON."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    square = torch.ones(512, 512, device=device)
    square @ square  # the libraries' own buffers belong to the baseline
    meter = RealMeter(cuda)
    train_two_steps(config, args, meter, device, autocast=cuda)
    print(json.dumps({"peaks": meter.marks, "seconds": meter.times[-1] - meter.times[-4]}))


def compare_probe(config, args, argv):
    """Print the table of the probe and return predicted / measured of the whole; raises ValueError where it dies."""
    cuda = torch.cuda.is_available()
    predicted = predict_probe(config, args, cuda)
    free = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if max(predicted.values()) > free:
        raise ValueError(
            f"--probe: needs {max(predicted.values()) / GB:.1f} GB and {free / GB:.1f} GB are free here; "
            "a smaller model, fewer rows or tokens"
        )
    command = [sys.executable, str(Path(__file__).resolve()), *(argv if argv is not None else sys.argv[1:])]
    environment = os.environ | PROBE_ENVIRONMENT | {"PLAN_RUN_PROBE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--probe: the two steps ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    kind = ["fp32, CPU", "bf16 autocast, GPU"][cuda] + f", {args.optimizer}"
    kind += ", activation checkpointing" if args.activation_checkpointing else ""
    print(f"{args.model}: {describe_rows(config, args)}, {kind}; two steps, peaks in MB")
    ratio = print_peaks(predicted, measured["peaks"])
    work = (4 / 3 if args.activation_checkpointing else 1) * count_flops(config, args)
    rate = work * args.per_device_train_batch_size / measured["seconds"] / 1e12
    share = f", so --mfu {rate / args.gpu_tflops:.3f}" if args.gpu_tflops else ""
    print(f"second step {measured['seconds']:.2f} s, {rate:.3f} TFLOP/s{share}")
    return ratio


def print_peaks(predicted, measured):
    """Print the peaks part by part and in all; returns predicted / measured in all."""
    print(f"{'':<16}{'predicted':>10}{'measured':>10}{'ratio':>8}")
    rows = [(name, predicted[name], measured[name]) for name in predicted]
    rows.append(("in all", max(predicted.values()), max(measured.values())))
    for name, ours, theirs in rows:
        print(f"{name:<16}{ours / 1e6:>10.0f}{theirs / 1e6:>10.0f}{ours / theirs:>8.3f}")
    return rows[-1][1] / rows[-1][2]


# ---------------------------------------------------------------------------------------------------------------------


def write_file(path, text):
    """Write a file aside and rename it; another one that is there is kept. Returns the exit code."""
    if path.exists() and (not path.is_file() or path.read_bytes() != text.encode("utf-8")):
        print(f"error: --output_file {path}: exists and is kept; remove it or name another", file=sys.stderr)
        return 2
    if not path.exists():
        aside = path.with_name(f".{path.name}.unfinished")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    print(f"written: {path}")
    return 0


def print_plan(config, args):
    """Print tables, choice, time and command; write the DeepSpeed file. Returns the exit code."""
    started = time.perf_counter()
    numbers = measure(config, args)
    plans = plan_all(numbers, args)
    print(
        f"{args.model}: {numbers['parameters']:,} parameters; {args.num_gpus} x {args.gpu_memory:g} GB, host "
        f"{args.host_memory:g} GB; {args.optimizer}; {describe_rows(config, args)} a GPU "
        f"({time.perf_counter() - started:.0f} s)"
    )
    print(format_plans(plans, args))
    chosen = next(((setting, way) for setting, way, _, fits in plans if fits), None)
    if chosen is None:
        print(
            "nothing fits: more GPUs, --activation_checkpointing, fewer rows or tokens, or --optimizer zero_adafactor"
        )
        return 1
    setting, checkpointing = chosen
    print(f"fastest that fits: {setting[0]}{', checkpointing' if checkpointing else ''}")
    if args.gpu_tflops is not None:
        print(describe_time(config, args, checkpointing))
    print(make_command(setting, checkpointing, config, args))
    ds_config = make_ds_config(setting, args.optimizer)
    if args.output_file is not None and ds_config is not None:
        return write_file(Path(args.output_file), json.dumps(ds_config, indent=2) + "\n")
    elif args.output_file is not None:
        print(f"not written: {args.output_file}: this setting runs without DeepSpeed")
    return 0


def main(argv=None):
    args = parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    problems = check_args(args)
    config = None
    try:
        config = load_config(args.model)
        problems += check_lengths(config, args)
        if args.probe and not problems and "PLAN_RUN_PROBE" not in os.environ:
            compare_probe(config, args, argv)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    if "PLAN_RUN_PROBE" in os.environ:
        run_probe(config, args)
        return 0
    return 0 if args.probe else print_plan(config, args)


if __name__ == "__main__":
    sys.exit(main())
