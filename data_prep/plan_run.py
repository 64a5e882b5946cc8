# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17"]
# ///
"""Will it fit, how long, what will it cost: memory per GPU and host of a training run before anything is downloaded.

Every way to train t5-large on four GPUs of 24 GB, and the fastest that fits:

    python data_prep/plan_run.py --model t5-large --num_gpus 4 --gpu_memory 24 --host_memory 200 \
        --optimizer zero_adafactor --per_device_train_batch_size 20 --max_source_length 256 --max_target_length 64

The same with time and price of an epoch, and the DeepSpeed file written:

    python data_prep/plan_run.py --model llama2-7b --num_gpus 4 --gpu_memory 80 --host_memory 400 --optimizer adamw \
        --max_seq_length 1024 --num_examples 14246 --gpu_tflops 312 --mfu 0.4 --price_per_hour 2.5 --output_file z.json

Predicted against measured, two real steps on this machine:

    python data_prep/plan_run.py --model t5-small --per_device_train_batch_size 8 --max_source_length 128 --probe

--model is a preset of init_model.py (beside this script), a model folder, or a name on the hub, of which only the
configuration is read. Activations are not a formula: the training step runs on fake tensors, which have shapes but no
storage, under torch's MemTracker.
"""

import argparse
import json
import logging
import os
import resource
import sys
import time
import warnings
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

GB = 1e9
OPTIMIZERS = ("adamw", "adafactor", "zero_adafactor")
# Name, ZeRO stage (None: no DeepSpeed), what waits in host memory. The fastest first: each further one moves more.
SETTINGS = (
    ("one process a GPU, no DeepSpeed", None, ""),
    ("pure bf16, no DeepSpeed", "pure", ""),
    ("ZeRO-1", 1, ""),
    ("ZeRO-2", 2, ""),
    ("ZeRO-3", 3, ""),
    ("ZeRO-2, optimizer in host memory", 2, "optimizer"),
    ("ZeRO-3, optimizer in host memory", 3, "optimizer"),
    ("ZeRO-3, optimizer and weights in host memory", 3, "all"),
)
BUCKET = 2e8  # elements; reduce_bucket_size and allgather_bucket_size of ds_configs/zero2*.json
LIVE = 1e9  # elements; stage3_max_live_parameters of ds_configs/zero3*.json
SUB_GROUP = 1e9  # elements stepped at a time under ZeRO-3
CONTEXT = 0.6e9  # bytes a CUDA context, cuBLAS and NCCL take; seen between 0.4 and 0.8
RESERVED = 1.05  # what the caching allocator holds over what is in use


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
    add("--max_source_length", type=int, default=256, help="Source tokens of an encoder-decoder.")
    add("--max_target_length", type=int, default=64, help="Target tokens of an encoder-decoder.")
    add("--max_seq_length", type=int, default=1024, help="Tokens of a causal model's row.")
    add("--gradient_checkpointing", action="store_true", help="Keep only the layers' inputs and compute again.")
    add("--num_examples", type=int, default=None, help="Rows of an epoch, for its time and price.")
    add("--gpu_tflops", type=float, default=None, help="The GPU's bf16 peak, dense: A100 312, H100/H200 989, L4 121.")
    add("--mfu", type=float, default=0.35, help="Share of that peak reached, measured or guessed.")
    add("--price_per_hour", type=float, default=None, help="Price of one GPU for an hour, in your money.")
    add("--output_file", default=None, help="Where the DeepSpeed file of the fastest setting that fits goes.")
    add("--probe", action="store_true", help="Run two real steps in this process and print predicted and measured.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = []
    for flag in (
        "num_gpus",
        "per_device_train_batch_size",
        "max_source_length",
        "max_target_length",
        "max_seq_length",
    ):
        if getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    for flag in ("gpu_memory", "host_memory", "mfu"):
        if getattr(args, flag) <= 0:
            problems.append(f"--{flag} {getattr(args, flag)}: must be above 0")
    if args.mfu > 1:
        problems.append(f"--mfu {args.mfu}: is a share of the peak, at most 1")
    if args.num_examples is not None and args.gpu_tflops is None:
        problems.append("--num_examples: the time of an epoch needs --gpu_tflops, too")
    if args.price_per_hour is not None and args.num_examples is None:
        problems.append("--price_per_hour: the price of an epoch needs --num_examples, too")
    if args.output_file is not None and Path(args.output_file).exists():
        problems.append(f"--output_file {args.output_file}: exists and is kept; remove it or name another")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# The model


def load_config(name):
    """Return the configuration of a preset, folder or hub model; raises ValueError with the way out."""
    if not Path(name).exists():
        try:
            import init_model
        except ModuleNotFoundError:
            init_model = None
        if init_model is not None:
            for architecture, presets in init_model.PRESETS.items():
                if name in presets:
                    return init_model.make_config(architecture, name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: no preset, and no configuration can be read: {str(error)[:200]}") from None


def build_model(config, dtype):
    """Return a model with random weights of the dtype; under FakeTensorMode it takes no memory."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype).train()


def make_batch(config, args):
    """Return input_ids, attention_mask and labels (and decoder_input_ids) of full length."""
    rows = args.per_device_train_batch_size
    length = args.max_source_length if config.is_encoder_decoder else args.max_seq_length
    ids = torch.ones(rows, length, dtype=torch.long)
    labels = torch.ones(rows, args.max_target_length, dtype=torch.long) if config.is_encoder_decoder else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": labels} if config.is_encoder_decoder else {}), labels


def run_step(model, batch, labels, autocast):
    """One forward and backward pass with the loss of the training scripts: cross-entropy in fp32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
    loss.backward()


def count_parameters(config):
    """Return parameters in all, the largest one, and bytes of Adafactor's factors (fp32 rows and columns)."""
    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in build_model(config, torch.bfloat16).parameters()]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    factors = 0
    for shape, size in zip(shapes, sizes, strict=True):
        factors += 4 * (size // shape[-1] + size // shape[-2]) if len(shape) > 1 else 4 * size
    return sum(sizes), max(sizes), factors


def measure_activations(config, args, dtype, autocast):
    """
    Return bytes beyond weights and gradients at the peak of a forward and backward pass.

    Every layer keeps the same, so two and three layers tell what all of them keep.
    """
    layers = config.num_hidden_layers
    if layers <= 3:
        return track_activations(config, args, dtype, autocast)
    two, three = (track_activations(set_layers(config, n), args, dtype, autocast) for n in (2, 3))
    return two + (three - two) * (layers - 2)


def set_layers(config, count):
    """Return the configuration with `count` layers (in encoder and decoder)."""
    values = {
        name: count for name in ("num_layers", "num_decoder_layers", "num_hidden_layers") if name in config.to_dict()
    }
    values |= {"layer_types": config.layer_types[:count]} if getattr(config, "layer_types", None) else {}
    return type(config)(**{**config.to_dict(), **values})


def track_activations(config, args, dtype, autocast):
    """The same for a model as it is, on fake tensors under MemTracker."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(config, dtype)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        tracker = MemTracker()
        tracker.track_external(model)
        batch, labels = make_batch(config, args)
        with tracker:
            run_step(model, batch, labels, autocast)
        peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    return sum(size for kind, size in peak.items() if getattr(kind, "name", "") in ("ACT", "TEMP", "OTH"))


def count_flops(config, args):
    """Return floating-point operations of one row's forward and backward pass, without those computed again."""
    with torch.device("meta"):
        model = build_model(config, torch.bfloat16)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        head = model.get_output_embeddings().weight.numel()
        inner = {
            n: p.numel() for n, p in model.named_parameters() if id(p) not in tables and not n.startswith("lm_head")
        }
    heads = config.num_attention_heads
    size = heads * (getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // heads)
    if not config.is_encoder_decoder:
        tokens = args.max_seq_length
        attention = 12 * config.num_hidden_layers * size * tokens * tokens / 2
        return 6 * tokens * (sum(inner.values()) + head) + attention
    source, target = args.max_source_length, args.max_target_length
    encoder = sum(count for name, count in inner.items() if name.startswith("encoder"))
    decoder = sum(inner.values()) - encoder
    cross = sum(c for n, c in inner.items() if "EncDecAttention" in n or "encoder_attn" in n)
    matrix = 6 * (source * encoder + target * (decoder - cross + head) + (source + target) / 2 * cross)
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    pairs = config.num_hidden_layers * source**2 + layers * (target**2 / 2 + source * target)
    return matrix + 12 * size * pairs


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def plan(setting, numbers, args):
    """
    Return bytes by part for one setting: weights, master, gradients, state, step, buffers, activations, gpu, host.

    numbers: parameters, largest, factors, activations by dtype, from measure().
    """
    _, stage, offload = setting
    count, gpus = numbers["parameters"], args.num_gpus
    state = {"adamw": 8 * count, "adafactor": 4 * count, "zero_adafactor": numbers["factors"]}[args.optimizer]
    if stage in (None, "pure"):
        width = 4 if stage is None else 2
        factored = min(state, numbers["factors"]) if args.optimizer == "adafactor" else state
        parts = {"weights": width * count, "master": 0, "gradients": width * count, "state": factored}
        parts |= {"step": 0, "buffers": 2 * count if stage is None else 0}  # autocast keeps bf16 copies of matrices
        if gpus > 1:
            parts["buffers"] += 2 * 25e6  # the buckets of DistributedDataParallel
        parts["activations"] = numbers["activations fp32" if stage is None else "activations bf16"]
        host = 0
    else:
        share = count / gpus
        own_state = state if args.optimizer == "zero_adafactor" else state / gpus
        parts = {"weights": 2 * count if stage < 3 else 2 * share, "master": 4 * share}
        parts |= {"gradients": 2 * count if stage < 2 else 2 * share, "state": own_state}
        parts["step"] = 4 * (min(share, SUB_GROUP) if stage == 3 else share)  # this rank's gradients in fp32
        parts["buffers"] = 2 * 3 * min(BUCKET, count) if stage < 3 else 2 * min(LIVE, count) + 4 * numbers["largest"]
        parts["activations"] = numbers["activations bf16"]
        host = 0
        if offload:
            host = gpus * (parts["master"] + own_state + 4 * share + parts["gradients"] / (1 if stage > 1 else gpus))
            parts |= {"master": 0, "state": 0, "step": 0, "gradients": 0}
        if offload == "all":
            host += gpus * parts["weights"]
            parts["weights"] = 0
    parts["gpu"] = sum(parts.values()) * RESERVED + CONTEXT
    return parts | {"host": host}


def measure(config, args):
    """Return what plan() needs to know of the model: counts, and activations for bf16 and for autocast weights."""
    count, largest, factors = count_parameters(config)
    return {
        "parameters": count,
        "largest": largest,
        "factors": factors,
        "activations bf16": measure_activations(config, args, torch.bfloat16, False),
        "activations fp32": measure_activations(config, args, torch.float32, True),
    }


def plan_all(numbers, args):
    """Return [(setting, parts, whether it fits)] for every setting that this optimizer and number of GPUs allow."""
    plans = []
    for setting in SETTINGS:
        if setting[1] == "pure" and args.optimizer != "zero_adafactor":
            continue  # --pure_bf16 is ZeroAdafactor's
        parts = plan(setting, numbers, args)
        plans.append((setting, parts, parts["gpu"] <= args.gpu_memory * GB and parts["host"] <= args.host_memory * GB))
    return plans


def format_plans(plans, args):
    """Return the table, in GB, with what is left or lacking on the GPU (and on the host)."""
    names = ("weights", "master", "gradients", "state", "step", "buffers", "activations", "gpu", "host")
    lines = [f"{'GB a GPU':<46}" + "".join(f"{name:>12}" for name in names) + "  fits"]
    for (title, _, _), parts, fits in plans:
        room = args.gpu_memory - parts["gpu"] / GB
        host = args.host_memory - parts["host"] / GB
        verdict = f"yes, {room:.1f} GB left" if fits else "no"
        if room < 0:
            verdict += f", {-room:.1f} GB too much a GPU"
        if host < 0:
            verdict += f", {-host:.1f} GB too much on the host"
        lines.append(f"{title:<46}" + "".join(f"{parts[name] / GB:>12.2f}" for name in names) + f"  {verdict}")
    return "\n".join(lines)


def make_ds_config(setting):
    """Return the DeepSpeed settings of a plan, as in ds_configs/, or None where DeepSpeed is not needed."""
    _, stage, offload = setting
    if stage in (None, "pure"):
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
    config = {"bf16": {"enabled": "auto"}, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if offload:
        config["zero_force_ds_cpu_optimizer"] = False
    autos = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
    return config | dict.fromkeys(autos, "auto")


def describe_choice(setting, config, args):
    """Return the command of the fastest setting that fits."""
    script = "run_summarization.py" if config.is_encoder_decoder else "run_clm_instruct.py"
    words = ["deepspeed" if setting[1] not in (None, "pure") else "torchrun --nproc_per_node " + str(args.num_gpus)]
    words = ["python"] if args.num_gpus == 1 and setting[1] in (None, "pure") else words
    words += [script] + ([f"--deepspeed {args.output_file or 'FILE.json'}"] if words == ["deepspeed"] else [])
    words += [f"--model_name_or_path {args.model}", "--pure_bf16" if setting[1] == "pure" else "--bf16"]
    words += [f"--optim {'adafactor' if 'adafactor' in args.optimizer else 'adamw_torch'}"]
    words += [f"--per_device_train_batch_size {args.per_device_train_batch_size}"]
    words += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
    lengths = ("max_source_length", "max_target_length") if config.is_encoder_decoder else ("max_seq_length",)
    return " ".join([*words, *(f"--{name} {getattr(args, name)}" for name in lengths), "..."])


def describe_time(config, args):
    """Return seconds a step, and hours and price an epoch, at the given share of the given peak."""
    again = 4 / 3 if args.gradient_checkpointing else 1  # the forward pass a second time
    speed = args.gpu_tflops * 1e12 * args.mfu
    row = count_flops(config, args)
    step = again * row * args.per_device_train_batch_size / speed
    text = f"{row / 1e12:.3f} TFLOP a row; {step:.3f} s a pass at {args.mfu:.0%} of {args.gpu_tflops:g} TFLOP/s"
    if args.num_examples is not None:
        hours = again * row * args.num_examples / speed / args.num_gpus / 3600
        text += f"; {hours:.2f} hours an epoch of {args.num_examples} rows of full length"
        if args.price_per_hour is not None:
            text += f", {hours * args.num_gpus * args.price_per_hour:.2f} at {args.price_per_hour:g} a GPU and hour"
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Probe


def probe(config, args):
    """Return predicted and measured peak bytes of two fp32 steps with AdamW here, over the memory before."""
    count = count_parameters(config)[0]
    predicted = (4 + 4 + 8) * count + measure_activations(config, args, torch.float32, False)
    before = reset_peak()
    model = build_model(config, torch.float32)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    batch, labels = make_batch(config, args)
    for _ in range(2):
        run_step(model, batch, labels, False)
        optimizer.step()
        optimizer.zero_grad()
    return predicted, read_peak() - before


def reset_peak():
    """Reset the process's peak of resident memory (Linux) and return the present size in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def read_peak():
    """Return the peak of resident memory in bytes since reset_peak()."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main(argv=None):
    args = parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    problems = check_args(args)
    try:
        config = load_config(args.model)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    if args.probe:
        predicted, measured = probe(config, args)
        print(
            f"two steps, fp32, AdamW, on the CPU: predicted {predicted / GB:.3f} GB, measured {measured / GB:.3f} GB"
        )
        print(f"predicted / measured: {predicted / measured:.3f}")
        return 0
    started = time.perf_counter()
    numbers = measure(config, args)
    plans = plan_all(numbers, args)
    rows = f"{args.per_device_train_batch_size} rows of "
    rows += (
        f"{args.max_source_length} + {args.max_target_length}"
        if config.is_encoder_decoder
        else str(args.max_seq_length)
    )
    print(
        f"{args.model}: {numbers['parameters']:,} parameters; {args.num_gpus} x {args.gpu_memory:g} GB, host "
        f"{args.host_memory:g} GB; {args.optimizer}; {rows} tokens a GPU"
        f"{', gradient checkpointing' if args.gradient_checkpointing else ''} ({time.perf_counter() - started:.0f} s)"
    )
    print(format_plans(plans, args))
    if args.gpu_tflops is not None:
        print(describe_time(config, args))
    chosen = next((setting for setting, _, fits in plans if fits), None)
    if chosen is None:
        print("nothing fits: more GPUs, --gradient_checkpointing, fewer rows or tokens, or --optimizer zero_adafactor")
        return 1
    print(f"fastest that fits: {chosen[0]}\n{describe_choice(chosen, config, args)}")
    if args.output_file is not None and make_ds_config(chosen) is not None:
        Path(args.output_file).write_text(json.dumps(make_ds_config(chosen), indent=2) + "\n", encoding="utf-8")
        print(f"written: {args.output_file}")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # fake tensors can hold up the interpreter's own shutdown
