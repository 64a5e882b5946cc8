# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The inside of check_run.py: runs a training script with a tiny clone of its model and compares variants of its run.

check_run.py imports this and forks a process for each rank, which calls run_script() with a plan. The script is not
edited. Its from_pretrained() gives a clone, its Trainer.train() makes the checks of the plan's mode, one JSON line
each in the plan's file of events, and the process ends there. Modes: one (a process), again (resumes one's checkpoint
in a fresh process), two (ranks, gloo), zero (the same with the DeepSpeed file). Tested with transformers 5.23.
"""

import builtins
import contextlib
import copy
import ctypes
import gc
import inspect
import json
import math
import os
import runpy
import signal
import sys
import traceback
import zlib
from collections import Counter
from pathlib import Path

import safetensors
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

PLAN, FOLDER, MODE, RANK = {}, Path(), "", 0  # set by run_script() in the process of a rank
LOSS, NORM, WEIGHTS, LOGITS = 1e-4, 1e-3, 1e-2, 1e-3  # bounds; docs/check_run.md says why these
PIECES = {"rows": 64, "views": 3, "evaluated": 7}  # rows whose labels are read, shown token by token, evaluated
SEEN = {"trainers": 0, "clones": [], "flash": False}  # what the script did so far

# ------------------------------------------------------------------------------------------------ the clone

LAYERS = ("num_layers", "num_decoder_layers", "num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer")
SMALL = dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), 64)
SMALL |= dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 4)
SMALL |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
SMALL |= dict.fromkeys(("head_dim", "d_kv"), 16)
SMALL |= dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_dim"), 128)
SMALL |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64)
SMALL |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4)


def shrink(values: dict, narrow: bool = True) -> dict:
    """A configuration's values with few narrow layers, one of each special kind; vocabulary and ties stay."""
    small = {k: shrink(v, narrow) if isinstance(v, dict) and "model_type" in v else v for k, v in values.items()}
    kinds = values.get("layer_types")
    count = max(2, len(set(kinds))) if kinds else 2
    small |= {k: min(count, values[k]) for k in LAYERS if isinstance(values.get(k), int)}
    if kinds and len(kinds) > count:
        small["layer_types"] = [*dict.fromkeys(kinds), *kinds][:count]
    if narrow:
        small |= {k: min(v, values[k]) for k, v in SMALL.items() if isinstance(values.get(k), int)}
        heads = next((values[k] for k in ("num_attention_heads", "n_head") if values.get(k)), None)
        groups = values.get("num_key_value_heads")
        if heads and groups:  # one group, some or as many as heads: the kind of attention stays
            small["num_key_value_heads"] = 1 if groups == 1 else small["num_attention_heads"] // (1 + (groups < heads))
        # At 64 wide the usual 0.02 makes all words alike: what leaks or is weighed otherwise would hardly show.
        small |= {k: 0.1 for k in ("initializer_range", "init_std") if k in values}
    return small


def build_clone(cls, config):
    """A small model of a class from the seed; ValueError where its configuration cannot be made small."""
    said = None
    for narrow in (True, False):
        try:
            small = type(config)(**shrink(config.to_dict(), narrow))
            small._attn_implementation = "eager" if config._attn_implementation == "eager" else None
            set_seed(PLAN["seed"])
            model = cls(small).float()
            spread_weights(model)
            return model
        except Exception as error:  # a model class may raise anything
            said = said or error
    raise ValueError(f"{type(config).__name__} cannot be shrunk: {type(said).__name__}: {said}; try --keep_weights")


def spread_weights(model) -> None:
    """Biases and norms away from 0 and 1: what depends on them alone would else be the same in every variant."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def load_clone(cls, name, *args, config=None, **settings):
    """In the place of from_pretrained: the clone, saved as a folder, by the real one with the script's settings."""
    if PLAN["keep_weights"]:
        return REAL_LOAD(cls, name, *args, config=config, **settings)
    if not isinstance(config, transformers.PretrainedConfig):
        known = ("trust_remote_code", "revision", "cache_dir", "token", "subfolder", "gguf_file")
        config = transformers.AutoConfig.from_pretrained(name, **{k: v for k, v in settings.items() if k in known})
    folder = FOLDER / f"clone-{len(SEEN['clones'])}"
    if not folder.exists():  # made by mode one, read by all processes
        clone = build_clone(cls, config)
        with contextlib.suppress(Exception):  # a model without generation settings
            clone.generation_config = transformers.GenerationConfig.from_pretrained(name)
        clone.save_pretrained(folder)
    SEEN["clones"].append(f"a clone of {name}")
    gone = ("revision", "subfolder", "gguf_file", "variant", "use_safetensors", "device_map", "quantization_config")
    settings = {k: v for k, v in settings.items() if k not in gone}
    asked = settings.get("dtype", settings.pop("torch_dtype", None)) or "auto"
    settings["dtype"] = torch.float32 if MODE == "zero" else config.dtype or "auto" if asked == "auto" else asked
    if "flash" in str(settings.get("attn_implementation")):  # there is none on a CPU
        SEEN["flash"], settings["attn_implementation"] = True, "sdpa"
    small = type(config).from_pretrained(folder)
    return REAL_LOAD(cls, str(folder), *args, config=small, **settings)


def make_clone(cls, config, **settings):
    """In the place of _from_config, which a script that trains from scratch calls."""
    SEEN["clones"].append(f"{cls.__name__} from a configuration")
    return REAL_MAKE(cls, type(config)(**shrink(config.to_dict())), **settings)


REAL_LOAD, REAL_MAKE = PreTrainedModel.from_pretrained.__func__, PreTrainedModel._from_config.__func__

# ------------------------------------------------------------------------------------------------ the script

QUIET = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "steps", "logging_steps": 1}
QUIET |= {"report_to": [], "push_to_hub": False, "load_best_model_at_end": False, "eval_on_start": False}
QUIET |= {"disable_tqdm": True, "torch_compile": False, "dataloader_num_workers": 0, "auto_find_batch_size": False}
QUIET |= {"neftune_noise_alpha": None, "bf16": False, "fp16": False, "mixed_precision": "no", "warmup_steps": 0}
QUIET |= {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None, "use_liger_kernel": False}


def set_up_arguments(args) -> None:
    """In front of TrainingArguments.__post_init__: nothing is written, reported or uploaded outside the folder."""
    PLAN["closed"].append(os.path.abspath(args.output_dir)) if args.output_dir else None
    args.output_dir, args.use_cpu, args.report_to, args.push_to_hub = str(FOLDER / f"out-{MODE}"), True, "none", False
    if MODE == "zero":  # the DeepSpeed file is read with these: later is too late
        changes = QUIET | {"report_to": "none", "max_steps": PLAN["steps"], "train_sampling_strategy": "sequential"}
        changes |= {"per_device_train_batch_size": PLAN["batch"] // 2, "gradient_accumulation_steps": 1}
        for name, value in changes.items():
            setattr(args, name, value)
    REAL_POST_INIT(args)


def watch_writes(event: str, values: tuple) -> None:
    """Audit hook: no file is opened for writing, made, renamed or removed in the user's own output folder."""
    if event == "open":
        path, mode, flags = values
        if not (any(c in (mode or "") for c in "wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    elif event not in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
        return
    path = values[0]
    if isinstance(path, str | bytes | os.PathLike):
        full = os.path.abspath(os.fsdecode(path))
        own = any((full + os.sep).startswith(folder + os.sep) for folder in PLAN["closed"])
        if own and not full.startswith(str(FOLDER)):
            raise PermissionError(f"check_run.py keeps the script from writing to {full}")


def map_first_rows(rows, *args, **settings):
    """In the place of Dataset.map: of the first rows only."""
    rows = rows.select(range(PLAN["rows"])) if len(rows) > PLAN["rows"] else rows
    return REAL_MAP(rows, *args, **settings)


def generate_few(model, *args, **settings):
    """In the place of generate(): 8 tokens show whether texts agree."""
    settings = {k: v for k, v in settings.items() if k not in ("max_length", "min_length", "min_new_tokens")}
    if settings.get("generation_config") is not None:
        settings["generation_config"] = copy.deepcopy(settings["generation_config"])
        settings["generation_config"].max_new_tokens = None
    return REAL_GENERATE(model, *args, **settings | {"max_new_tokens": 8})


def make_trainer(trainer, *args, **settings) -> None:
    SEEN["trainers"] += 1
    REAL_INIT(trainer, *args, **settings)


def refuse_input(*args):
    send({"ended": "asks for input, and nobody is there to answer"})
    leave(1)


def patch_libraries() -> None:
    """The places where a script meets the libraries."""
    global REAL_POST_INIT, REAL_INIT, REAL_TRAIN, REAL_MAP, REAL_GENERATE
    REAL_POST_INIT, REAL_INIT, REAL_TRAIN = TrainingArguments.__post_init__, Trainer.__init__, Trainer.train
    TrainingArguments.__post_init__, Trainer.__init__, Trainer.train = set_up_arguments, make_trainer, train_instead
    PreTrainedModel.from_pretrained = classmethod(load_clone)
    if not PLAN["keep_weights"]:
        PreTrainedModel._from_config = classmethod(make_clone)
    REAL_GENERATE, GenerationMixin.generate = GenerationMixin.generate, generate_few
    with contextlib.suppress(ImportError):
        import datasets

        REAL_MAP, datasets.Dataset.map = datasets.Dataset.map, map_first_rows
        if PLAN["own_cache"]:
            datasets.config.HF_DATASETS_CACHE = FOLDER / "datasets"
    builtins.input = refuse_input
    sys.addaudithook(watch_writes)


def join_ranks() -> None:
    """DeepSpeed on the CPU: gloo, without its own collectives, which would be compiled first (deepspeed 0.19.8)."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


def send(event: dict) -> None:
    """One line for check_run.py, by the first rank."""
    if RANK == 0:
        with open(PLAN["events"], "a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")


def leave(code: int) -> None:
    """At once, with all threads: nothing of the script is to run on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------ variants of the run


class Record(TrainerCallback):
    """What a variant showed: rows and mode of each step, parameters that got a gradient, weights after the last."""

    def __init__(self):
        self.rows, self.modes, self.moved = [], set(), set()

    def watch(self, trainer) -> None:
        """Wraps the trainer's training_step, also a subclass's."""
        real = trainer.training_step

        def training_step(model, inputs, *args, **settings):
            ids, mask = inputs.get("input_ids", []), inputs.get("attention_mask")
            masked = torch.is_tensor(mask) and mask.shape == ids.shape
            rows = (row[mask[i] > 0] if masked else row for i, row in enumerate(ids))
            self.rows.append([zlib.crc32(row.numpy().tobytes()) for row in rows])
            loss = real(model, inputs, *args, **settings)
            self.modes.add(trainer.model.training)
            return loss

        trainer.training_step = training_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = ((name, parameter.grad) for name, parameter in model.named_parameters())
        self.moved |= {name for name, grad in grads if grad is not None and grad.any()}

    def finish(self, trainer) -> dict:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": [entry["loss"] for entry in history],
            "norms": [float(entry.get("grad_norm") or math.nan) for entry in history],
            "weights": gather_weights(trainer.model),
            "rows": self.rows,
            "moved": self.moved,
            "modes": self.modes,
        }


def gather_weights(model) -> dict[str, torch.Tensor]:
    """Every trainable parameter in fp32, whole also under ZeRO-3."""
    weights = {}
    for name, parameter in model.named_parameters():
        gather = contextlib.nullcontext()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            gather = deepspeed.zero.GatheredParameters([parameter])
        with gather:
            if parameter.requires_grad:
                weights[name] = parameter.detach().float().clone()
    return weights


class Stage:
    """The script's trainer as it stands when it would train, and how to put it back there."""

    def __init__(self, trainer):
        self.trainer, self.model, self.batch, self.steps = trainer, trainer.model, PLAN["batch"], PLAN["steps"]
        self.dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters())
        self.kinds = {name: p.dtype for name, p in trainer.model.named_parameters()}
        self.wanted = trainer.args
        self.tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        self.causal = not self.model.config.is_encoder_decoder
        self.drops = still_dropout(self.model)
        self.results, self.memory = {}, {}
        path = FOLDER / "reference.pt"
        self.reference = torch.load(path, weights_only=False) if MODE != "one" and path.exists() else {}
        if MODE != "zero":
            trainer.model.float()
            self.start = {
                k: v.detach().clone() for k, v in [*self.model.named_parameters(), *self.model.named_buffers()]
            }
        trainer.callback_handler.callbacks = [
            c for c in trainer.callback_handler.callbacks if not type(c).__name__.startswith(("Progress", "Printer"))
        ]
        self.callbacks = list(trainer.callback_handler.callbacks)
        self.attributes = dict(vars(trainer))
        self.forward = vars(self.model).get("forward")
        self.optimizer_state = copy.deepcopy(trainer.optimizer.state_dict()) if trainer.optimizer else None
        rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else 10**6
        while self.batch > 1 and rows < 2 * self.batch:
            self.batch //= 2
        self.steps = max(2, min(self.steps, rows // self.batch // 2 * 2))
        if rows < 2:
            raise ValueError(f"{rows} training rows: there is nothing to compare")

    def reset(self, batch: int = 1, accumulation: int = 1, steps: int = 2, **changes):
        """The trainer as it was, with its weights, for so many rows a process, accumulation steps and steps."""
        trainer = self.trainer
        vars(trainer).clear()
        vars(trainer).update(self.attributes)
        gc.collect()  # the last variant's DistributedDataParallel, with its hooks
        if MODE == "zero":
            return trainer
        trainer.args = copy.deepcopy(self.wanted)
        changes = QUIET | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation} | changes
        for name, value in (changes | {"max_steps": steps}).items():
            setattr(trainer.args, name, value)
        trainer._train_batch_size, trainer.model_wrapped = batch, self.model
        if self.forward is None:
            vars(self.model).pop("forward", None)  # autocast's, of a variant before
        else:
            self.model.forward = self.forward
        with torch.no_grad():
            for name, value in [*self.model.named_parameters(), *self.model.named_buffers()]:
                value.copy_(self.start[name])
        self.model.zero_grad(set_to_none=True)
        trainer.callback_handler.callbacks = list(self.callbacks)
        if self.optimizer_state is not None:
            trainer.optimizer.load_state_dict(copy.deepcopy(self.optimizer_state))
        AcceleratorState._reset_state()
        GradientState._reset_state()
        trainer.create_accelerator_and_postprocess()
        set_seed(PLAN["seed"])
        return trainer

    def run(self, batch: int, accumulation: int = 1, steps: int = 2, sgd: bool = True, resume=None, **changes) -> dict:
        """One variant of the run: plain SGD without clipping, or the user's optimizer; the rows in their order."""
        if sgd:
            changes |= {"max_grad_norm": 1e9, "lr_scheduler_type": transformers.SchedulerType.CONSTANT}
        changes = {"train_sampling_strategy": "sequential"} | changes
        trainer, record = self.reset(batch, accumulation, steps, **changes), Record()
        if sgd:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            trainer.optimizer = torch.optim.SGD(trainable, lr=0.01)
            trainer.create_optimizer = lambda model=None: trainer.optimizer
        record.watch(trainer)
        trainer.add_callback(record)
        REAL_TRAIN(trainer, resume_from_checkpoint=resume)
        return record.finish(trainer)

    def once(self, name: str, make) -> dict:
        """A variant that several checks read, made once; kept for the other processes."""
        if name not in self.memory:
            self.memory[name] = make()
        return self.memory[name]

    def base(self) -> dict:
        return self.once("base", lambda: self.run(self.batch))

    def with_optimizer(self) -> dict:
        """The user's optimizer, fp32, one process, the rows in their order."""
        return self.once("optimizer", lambda: self.with_state(self.run(self.batch, 1, self.steps, sgd=False)))

    def with_state(self, run: dict) -> dict:
        return run | {"state": measure_state(self.trainer), "batch": self.batch, "steps": self.steps}

    def loader(self):
        """(rows as the collator gets them, collator), of training."""
        if "loader" not in self.memory:
            loader = self.reset(self.batch).get_train_dataloader()
            self.memory["loader"] = loader.dataset, loader.collate_fn
        return self.memory["loader"]

    def first_rows(self) -> list:
        rows, _ = self.loader()
        return [rows[i] for i in range(min(PIECES["rows"], len(rows)))]

    def logits(self, batch: dict) -> torch.Tensor:
        """The model's logits of a batch, in eval mode."""
        known = inspect.signature(self.model.forward).parameters
        drop = ("labels",) if self.causal or "decoder_input_ids" in batch else ()
        packed = "cu_seq_lens_q" in batch or is_packed(batch)
        inputs = {k: v for k, v in batch.items() if k not in drop and (packed or k in known)}
        self.model.eval()
        with torch.no_grad():
            return self.model(**inputs).logits.float()


def still_dropout(model) -> dict[str, float]:
    """Switch all dropout off, in modules, attention and layers; returns what there was."""
    found = {}
    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            random = "drop" in key or "jitter" in key or (key == "p" and "Dropout" in type(module).__name__)
            if random and isinstance(value, float) and value:
                found[f"{name}.{key}"] = value
                setattr(module, key, 0.0)
    return found


def measure_state(trainer) -> float:
    """Elements of optimizer state a trained parameter, on all ranks together."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    held = torch.tensor(float(held))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(held)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return held.item() / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def is_packed(batch: dict) -> bool:
    """Whether rows of a batch hold several examples, by numbered masks or restarting positions."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    numbered = torch.is_tensor(mask) and mask.dim() == 2 and bool((mask > 1).any())
    return numbered or (torch.is_tensor(positions) and bool((positions[:, 1:] == 0).any()))


# ------------------------------------------------------------------------------------------------ comparing


def result(status: str, figure=None, bound=None, detail: str = "", **data) -> dict:
    figure = None if figure is None or not math.isfinite(figure) else float(f"{figure:.4g}")
    return {"status": status, "figure": figure, "bound": bound, "detail": detail, "data": data}


def not_tried(why: str) -> dict:
    return result("not tried", detail=why)


def judge(figure: float, bound: float, good: str, bad: str, **data) -> dict:
    fine = figure <= bound
    return result("holds" if fine else "fails", figure, bound, good if fine else bad, **data)


def judge_factor(worst: float, factor: float, bound: float, good: str, bad: str, **data) -> dict:
    """worst: in units of the bound; factor: how many times as much, which is to be 1."""
    return result("holds" if worst <= 1 else "fails", factor, bound, good if worst <= 1 else bad, **data)


def gap(first: float, second: float) -> float:
    return abs(first - second) / max(abs(second), 1e-9) if math.isfinite(first) else math.inf


def compare_weights(weights: dict, others: dict, start: dict, bound: float) -> tuple[float, str]:
    """Distance over the length of the update (all parameters together), and the first parameter that is off."""
    ways = {n: (others[n] - start[n]).norm().item() for n in others}
    off = {n: (weights[n] - others[n]).norm().item() if n in weights else math.inf for n in others}
    whole = math.sqrt(sum(way**2 for way in ways.values()))
    least = 0.1 * whole / math.sqrt(len(ways))  # a parameter that hardly moves is compared with what others move
    first = next((n for n in off if not off[n] <= bound * max(ways[n], least)), "")
    return math.sqrt(sum(value**2 for value in off.values())) / max(whole, 1e-12), first


def compare_runs(run: dict, base: dict, start: dict) -> tuple[float, float, float, str]:
    """(difference in units of its bound, figure, its bound, a sentence); figure: how many times as much."""
    factors = [run[name][0] / base[name][0] for name in ("losses", "norms")]
    later = max(gap(a, b) for a, b in zip(run["losses"], base["losses"], strict=True))
    moved, first = compare_weights(run["weights"], base["weights"], start, WEIGHTS)
    parts = [(abs(f - 1) / bound, f, 1 + bound) for f, bound in zip(factors, (LOSS, NORM), strict=True)]
    parts += [(moved / WEIGHTS, 1 + moved, 1 + WEIGHTS), (later / LOSS / 10, 1 + later, 1 + 10 * LOSS)]
    worst = next((part for part in parts if not part[0] <= 1), parts[0])
    said = f"loss {factors[0]:.2f}×, gradient {factors[1]:.2f}×"
    said += f", weights after {len(run['losses'])} steps off by {moved:.1e} of the update"
    return *worst, said + (f", first in {first}" if first and worst[0] > 1 else "")


def explain_factor(stage: Stage, ratio: float, steps: int, what: str) -> str:
    """The sentence of a loss or gradient that is not what it was; steps: by how many it would be multiplied."""
    takes = getattr(stage.trainer, "model_accepts_loss_kwargs", False) and not stage.trainer.compute_loss_func
    if ratio > 1.5 and abs(ratio / steps - 1) < 0.1:
        why = (
            "; the model's forward takes **kwargs, so the Trainer believes that its loss, a mean, is divided by "
            "num_items_in_batch: give the Trainer a compute_loss_func that divides the summed loss by it"
        )
        return f"the loss is multiplied by the {what} ({ratio:.2f}×)" + (why if takes else "")
    if ratio < 0.75 and abs(ratio * steps - 1) < 0.1:
        return f"the loss is divided by the {what} ({ratio:.2f}×)"
    if abs(ratio - 1) > LOSS:
        return (
            f"the loss changes with the {what} ({ratio:.4f}×), as where batches' means are averaged although they "
            "hold different numbers of tokens"
        )
    return f"the logged loss agrees, what is trained does not, with other {what}"


# ------------------------------------------------------------------------------------------------ checks: the run


def check_repeat(stage: Stage) -> dict:
    """The same run twice: what differs here cannot be blamed on anything else."""
    base, again = stage.base(), stage.run(stage.batch)
    if not all(map(math.isfinite, base["losses"])):
        return result("fails", None, None, f"the losses are {base['losses']}: not numbers")
    worst, factor, bound, said = compare_runs(again, base, stage.start)
    same = again["rows"] == base["rows"]
    bad = f"the same run, twice with one seed, differs ({'' if same else 'other rows; '}{said}): something is drawn "
    return judge_factor(worst, factor, bound, "the same run twice is the same", bad + "that no seed decides")


def check_cut(stage: Stage) -> dict:
    base, n = stage.base(), stage.batch
    if n < 2:
        return not_tried("the data has too few rows to cut a batch")
    cuts = [(n, 1), *([(n // 2, 2)] if n > 2 else []), (1, n)]
    runs = {f"{b}×{a}": base if a == 1 else stage.run(b, a) for b, a in cuts}
    compared = {name: compare_runs(run, base, stage.start) for name, run in runs.items()}
    worst, factor, bound, _ = max(compared.values(), key=lambda part: part[0])
    said = "; ".join(f"{name}: {parts[-1]}" for name, parts in compared.items() if runs[name] is not base)
    last = runs[f"1×{n}"]
    why = explain_factor(stage, last["losses"][0] / base["losses"][0], n, "accumulation steps")
    curves = {name: run["losses"] for name, run in runs.items()}
    return judge_factor(worst, factor, bound, said, f"{why}. {said}", curves=curves)


def check_ranks(stage: Stage) -> dict:
    base = stage.reference.get("base")
    if base is None:
        return not_tried("the run on one process gave nothing to compare with")
    run = stage.run(stage.batch // 2)
    worst, factor, bound, said = compare_runs(run, base, stage.start)
    why = explain_factor(stage, run["losses"][0] / base["losses"][0], 2, "number of processes")
    said = f"2 processes against 1: {said}"
    rows = [None] * 2
    torch.distributed.all_gather_object(rows, run["rows"][0])
    if worst > 1 and sorted(sum(rows, [])) != sorted(base["rows"][0]):
        why = "two processes train on other rows than one, or on rows put together otherwise"
    curves = {"1 process": base["losses"], "2 processes": run["losses"]}
    return judge_factor(worst, factor, bound, said, f"{why}. {said}", curves=curves)


def check_zero_ranks(stage: Stage) -> dict:
    base = stage.reference.get("optimizer")
    if base is None:
        return not_tried("the run on one process gave nothing to compare with")
    run = stage.once("zero", lambda: stage.with_state(stage.run(stage.batch // 2, sgd=False)))
    ratio, norm = (run[name][0] / base[name][0] for name in ("losses", "norms"))
    said = f"2 ranks with the DeepSpeed file against 1 process: loss {ratio:.2f}×"
    norm = norm if math.isfinite(norm) else 1.0  # a stage that tells no norm
    said += f", gradient {norm:.2f}×"
    why, off = explain_factor(stage, ratio, 2, "number of processes"), abs(ratio - 1) / LOSS
    worst = (off, ratio, 1 + LOSS) if off > 1 else (abs(norm - 1) / NORM, norm, 1 + NORM)
    return judge_factor(*worst, said, f"{why}. {said}")


def check_optimizer(stage: Stage) -> dict:
    """The user's optimizer on two ranks, with the DeepSpeed file if there is one, against one process in fp32."""
    base = stage.reference.get("optimizer")
    if base is None:
        return not_tried("the run on one process gave nothing to compare with")
    make = lambda: stage.with_state(stage.run(stage.batch // 2, 1, stage.steps, sgd=False))  # noqa: E731
    run = stage.once("zero", make)
    start = stage.reference["start"]
    moved, first = compare_weights(run["weights"], base["weights"], start, base["noise"])
    name, where = base["name"], "under the DeepSpeed file" if MODE == "zero" else "on 2 processes"
    state = f"state {run['state']:.2f} numbers a parameter, {base['state']:.2f} in one process"
    said = f"{name}, {base['steps']} steps {where}: weights off by {moved:.1e} of the update; {state}"
    why = f"{where} it trains to other weights, first in {first}"
    if base["state"] < 0.5 and run["state"] > 0.9:
        why = (
            f"is not {name.title()} any more: factored states become full. ZeRO hands the optimizer flat pieces, "
            "which it cannot factor; take zero_adafactor.py, or AdamW"
        )
        return result("fails", moved, base["noise"], f"{why}. {said}")
    return judge(
        moved, base["noise"], said, f"{why}. {said}", curves={"1 process": base["losses"], where: run["losses"]}
    )


def prepare_optimizer(stage: Stage) -> None:
    """The reference of check_optimizer, and what adding in another order alone makes of it: its bound."""
    run = stage.with_optimizer()
    run["name"] = str(getattr(stage.wanted.optim, "value", stage.wanted.optim))
    run["noise"] = 0.01
    if stage.results.get("batch cut", {}).get("status") == "holds" and stage.batch > 1:
        other = stage.run(stage.batch // 2, 2, stage.steps, sgd=False)
        run["noise"] = max(0.01, 4 * compare_weights(other["weights"], run["weights"], stage.start, 1)[0])
    stage.memory["optimizer"] = run


def prepare_resume(stage: Stage) -> None:
    """The whole run whose checkpoint, halfway, mode `again` goes on from, with the order of rows that the user has."""
    how = {
        "save_strategy": "steps",
        "save_steps": stage.steps // 2,
        "save_total_limit": None,
        "save_only_model": False,
    }
    how["train_sampling_strategy"] = stage.wanted.train_sampling_strategy
    run = stage.run(stage.batch, 1, stage.steps, sgd=False, **how)
    folder = Path(stage.trainer.args.output_dir) / f"checkpoint-{stage.steps // 2}"
    stage.memory["whole"] = run | {"steps": stage.steps, "batch": stage.batch, "checkpoint": str(folder)}
    stage.memory["whole"]["moments"] = list_moments(stage.trainer)


def list_moments(trainer) -> list[torch.Tensor]:
    """The optimizer's state tensors, in the order of its parameters."""
    states = trainer.optimizer.state_dict()["state"]
    return [v.float().clone() for state in states.values() for v in state.values() if torch.is_tensor(v)]


def check_resume(stage: Stage) -> dict:
    whole = stage.reference.get("whole")
    if whole is None:
        return not_tried(stage.reference.get("no checkpoint", "no checkpoint was written"))
    half, checkpoint = whole["steps"] // 2, whole["checkpoint"]
    how = {"train_sampling_strategy": stage.wanted.train_sampling_strategy}
    run = stage.run(whole["batch"], 1, whole["steps"], sgd=False, resume=checkpoint, **how)
    rows, left = run["rows"], whole["rows"][half:]
    moved, first = compare_weights(run["weights"], whole["weights"], stage.reference["start"], WEIGHTS)
    told = f"{whole['steps']} steps, or {half}, killed, and the rest in a new process"
    for step, (ours, theirs) in enumerate(zip(rows, left, strict=False), start=half + 1):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
            if one != other:
                why = f"the resumed run trains on other rows, first at step {step}, row {number} of its batch"
                return result("fails", moved, WEIGHTS, f"{why} ({told})")
    if len(rows) != len(left):
        return result("fails", moved, WEIGHTS, f"the resumed run makes {len(rows)} batches, {len(left)} were left")
    moments = list_moments(stage.trainer)
    off = [gap((a - b).norm().item() + b.norm().item(), b.norm().item()) for a, b in zip(moments, whole["moments"])]  # noqa: B905
    figure = max(moved, *off) if off else moved
    bad = f"the same rows, but the weights differ by {moved:.1e} of the update, the optimizer's state by "
    bad += f"{max(off, default=0):.1e}, first in {first or 'the state'} ({told}){find_lost(checkpoint, stage.model)}"
    return judge(figure, WEIGHTS, f"{told}: the same rows, weights and state", bad)


def find_lost(checkpoint: str, model) -> str:
    """What a checkpoint does not have by the model's own names: Trainer passes over it silently (5.23, MoE models)."""
    path = Path(checkpoint) / "model.safetensors"
    if not path.is_file():
        return ""
    with safetensors.safe_open(path, "pt") as saved:
        names = set(saved.keys())
    lost = [name for name, _ in model.named_parameters() if name not in names]
    said = "; the checkpoint has other names for {} parameters, which are not loaded, with {} the first"
    return said.format(len(lost), lost[0]) if lost else ""


def check_evaluation(stage: Stage) -> dict:
    if stage.trainer.eval_dataset is None:
        return not_tried("the script gives the trainer no evaluation set")
    runs = {size: evaluate(stage, size) for size in (4, 1)}
    stage.memory["evaluation"] = runs[4]
    worst, said = compare_metrics(runs[1], runs[4])
    bad = f"metrics depend on the batch size, 1 against 4: {said}; means of batches are no mean of tokens"
    return judge(worst, LOSS, f"{len(runs[4]['metrics'])} metrics, by batches of 4 and of 1: the same", bad)


def check_evaluation_ranks(stage: Stage) -> dict:
    if "evaluation" not in stage.reference:
        return not_tried("there is no evaluation on one process to compare with")
    worst, said = compare_metrics(evaluate(stage, 2), stage.reference["evaluation"])
    bad = f"metrics depend on the number of processes: {said}; rows that fill the last batch may count twice"
    return judge(worst, LOSS, "metrics on 2 processes and on 1: the same", bad)


def evaluate(stage: Stage, size: int) -> dict:
    """Metrics, and predictions by their labels, of the first rows; also the modes that the model was in."""
    trainer, made, modes = stage.reset(1, per_device_eval_batch_size=size), [], set()
    loop, rows = trainer.evaluation_loop, trainer.eval_dataset
    rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
    count = min(PIECES["evaluated"], len(rows))
    rows = rows.select(range(count)) if hasattr(rows, "select") else torch.utils.data.Subset(rows, range(count))
    trainer.evaluation_loop = lambda *args, **settings: made.append(loop(*args, **settings)) or made[-1]
    hook = stage.model.register_forward_pre_hook(lambda module, inputs: modes.add(module.training))
    metrics = trainer.evaluate(eval_dataset=rows)
    hook.remove()
    stage.memory["evaluation modes"] = modes
    timed = ("runtime", "per_second", "epoch", "preparation")
    metrics = {k: v for k, v in metrics.items() if isinstance(v, float | int) and not any(t in k for t in timed)}
    pairs = {}
    if made and made[-1].label_ids is not None and getattr(made[-1].predictions, "ndim", 0) == 2:
        trim = lambda row: tuple(int(i) for i in row if i not in (-100, getattr(stage.tokenizer, "pad_token_id", 0)))  # noqa: E731
        pairs = {trim(a): trim(b) for a, b in zip(made[-1].label_ids, made[-1].predictions, strict=True)}
    return {"metrics": metrics, "pairs": pairs}


def compare_metrics(ours: dict, theirs: dict) -> tuple[float, str]:
    off = {k: gap(ours["metrics"].get(k, math.inf), v) for k, v in theirs["metrics"].items()}
    changed = [labels for labels, made in theirs["pairs"].items() if ours["pairs"].get(labels) != made]
    worst = max(off, key=off.get)
    if changed and off[worst] <= LOSS:
        return 1.0, f"{len(changed)} of {len(theirs['pairs'])} predictions are others', or belong to other rows"
    return off[worst], f"{worst} {ours['metrics'].get(worst, math.nan):.6g} against {theirs['metrics'][worst]:.6g}"


def check_mode(stage: Stage) -> dict:
    modes, evaluated = stage.base()["modes"], stage.memory.get("evaluation modes", set())
    rates = sorted(set(stage.drops.values()))
    said = f"trains in training mode, dropout {', '.join(map(str, rates)) or 'none'}"
    said += "; evaluates in eval mode" if evaluated else "; nothing was evaluated"
    bad = [*(["trains in eval mode: no dropout"] if False in modes else [])]
    bad += ["evaluates in training mode: with dropout"] * (True in evaluated)
    asked = [k for k, v in stage.model.config.to_dict().items() if "drop" in k and isinstance(v, float) and v > 0]
    asked = [k for k in asked if "classifier" not in k and "summary" not in k and "layerdrop" not in k]
    bad += [f"the configuration has {', '.join(asked)}, but no module drops anything"] * bool(asked and not rates)
    return result("fails" if bad else "holds", len(bad), 0, "; ".join(bad) or said)


def check_tied(stage: Stage) -> dict:
    model = stage.model
    model = getattr(model, "decoder", model) if model.config.model_type == "encoder-decoder" else model
    ins, outs = (f() for f in (model.get_input_embeddings, model.get_output_embeddings))
    if outs is None or getattr(outs, "weight", None) is None:
        return not_tried("the model has no output embeddings")
    asked = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    tied = ins.weight is outs.weight or ins.weight.data_ptr() == outs.weight.data_ptr()
    said = f"tie_word_embeddings is {asked}, and the two are {'one matrix' if tied else 'two matrices'}"
    return result("holds" if tied == asked else "fails", float(tied), float(asked), said)


def check_gradients(stage: Stage) -> dict:
    moved, model = stage.base()["moved"], stage.model
    tables = tuple(n for n, module in model.named_modules() if "Sinusoidal" in type(module).__name__)  # never trained
    names = {n: p for n, p in model.named_parameters() if not (tables and n.startswith(tables))}
    still = [n for n, p in names.items() if p.requires_grad and n not in moved]
    frozen = [n for n, p in names.items() if not p.requires_grad]
    fresh = [] if hasattr(model, "peft_config") else frozen
    bad = [f"{len(still)} parameters get no gradient: {', '.join(still[:3])}"] * bool(still)
    bad += [f"{len(fresh)} parameters are frozen and not trained: {', '.join(fresh[:3])}"] * bool(fresh)
    said = f"{len(moved)} parameters get a gradient" + f", {len(frozen)} are frozen" * bool(frozen)
    return result("fails" if bad else "holds", len(still) + len(fresh), 0, "; ".join(bad) or said)


def check_precision(stage: Stage) -> dict:
    """How much of an update arrives in the precision that the run has: in bf16 weights small ones are rounded away."""
    asked = next((name for name in ("bf16", "fp16") if getattr(stage.wanted, name)), None)
    weights = ", ".join(f"{count} {kind}" for kind, count in stage.dtypes.items())
    said = f"parameters: {weights}; autocast: {asked or 'none'}"
    if asked == "fp16" or "float16" in stage.dtypes:
        return not_tried(f"{said}; fp16 needs a GPU")
    if set(stage.dtypes) == {"float32"} and not asked:
        return result("holds", 1.0, 0.5, said)
    flat = {"steps": 1, "sgd": False, "lr_scheduler_type": transformers.SchedulerType.CONSTANT}
    exact = stage.run(stage.batch, **flat)["weights"]
    start = {n: w.clone() for n, w in stage.start.items()}
    try:
        for name, parameter in stage.model.named_parameters():
            parameter.data = parameter.data.to(stage.kinds[name])
        rounded = {n: start[n].to(stage.kinds[n]).float() for n in exact}
        how = {"bf16": asked == "bf16", "mixed_precision": asked or "no"}
        made = stage.run(stage.batch, **flat, **how)["weights"]
    finally:
        for name, parameter in stage.model.named_parameters():
            parameter.data = start[name].clone()
    wanted = [(exact[n] - start[n]).flatten() for n in exact]
    arrived = [(made[n] - rounded[n].to(made[n])).flatten() for n in exact]
    share = sum((a @ b).item() for a, b in zip(wanted, arrived, strict=True)) / sum((a @ a).item() for a in wanted)
    said += f"; {share:.2f} of an update arrives"
    bad = f"{said}: the rest is rounded away. Keep the weights in float32 (dtype=torch.float32) under --bf16"
    return result("holds" if share >= 0.5 else "fails", share, 0.5, said if share >= 0.5 else bad)


# ------------------------------------------------------------------------------------------------ checks: the rows


def read_row(stage: Stage, row) -> dict:
    """One row as the model gets it: ids and labels without padding, and whether a label is its token's."""
    _, collate = stage.loader()
    batch = collate([row])
    labels = batch["labels"][0].tolist()
    if not stage.causal:
        return {"ids": labels, "labels": labels, "source": batch["input_ids"][0].tolist(), "starts": [0]}
    ids, positions = batch["input_ids"][0].tolist(), batch.get("position_ids")
    mask = batch.get("attention_mask")
    real = mask[0].tolist() if torch.is_tensor(mask) and mask.dim() == 2 else [1] * len(ids)
    if not torch.is_tensor(mask):  # trailing padding, without a mask
        pad = getattr(stage.tokenizer, "pad_token_id", None)
        last = max((i for i in range(len(ids)) if labels[i] != -100 or ids[i] != pad), default=0)
        real = [int(i <= last) for i in range(len(ids))]
    kept = [i for i in range(len(ids)) if real[i]]
    starts = [0]
    if torch.is_tensor(positions):
        starts = [n for n, i in enumerate(kept) if positions[0, i] == 0]
    padded = [i for i in range(len(ids)) if not real[i] and labels[i] != -100]
    return {"ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept], "starts": starts, "padded": padded}


def read_rows(stage: Stage) -> list[dict]:
    """The first rows by number, without fillers (a row of one token that asks for nothing)."""
    if "rows" not in stage.memory:
        rows = [read_row(stage, row) | {"row": i} for i, row in enumerate(stage.first_rows())]
        stage.memory["rows"] = [r for r in rows if len(r["ids"]) > 1 or r["labels"] != [-100] * len(r["labels"])]
    return stage.memory["rows"]


def find_stops(stage: Stage) -> set[int]:
    """Tokens that end a text: the tokenizer's EOS and those at which generate() ends."""
    ends = getattr(stage.model.generation_config, "eos_token_id", None) if stage.model.can_generate() else None
    ends = ends if isinstance(ends, list) else [ends]
    return {i for i in [*ends, getattr(stage.tokenizer, "eos_token_id", None)] if i is not None}


def are_blocks(stage: Stage, rows: list[dict]) -> bool:
    """Whether rows are one text cut into pieces of one length, with stops inside and nothing that parts them."""
    sizes, stops = Counter(len(row["ids"]) for row in rows), find_stops(stage)
    same = len(rows) > 2 and sizes.most_common(1)[0][1] >= 0.8 * len(rows)
    inside = sum(bool(stops & set(row["ids"][1:-3])) for row in rows)
    return stage.causal and same and inside > len(rows) / 2 and all(len(row["starts"]) == 1 for row in rows)


def check_labels(stage: Stage) -> dict:
    rows, stops = read_rows(stage), find_stops(stage)
    blocks = are_blocks(stage, rows)
    bad = [*find_bad_labels(stage, rows), *([] if blocks else find_bad_stops(rows, stops, stage.causal))]
    if blocks:
        hidden = [r["row"] for r in rows for t, label in zip(r["ids"][1:], r["labels"][1:]) if t in stops > {label}]  # noqa: B905
        bad += [f"stop tokens have no label in rows {name_rows(hidden)}"] * bool(hidden)
    asked = sum(label != -100 for row in rows for label in row["labels"])
    share = asked / max(1, sum(len(row["labels"]) for row in rows))
    said = f"{share:.0%} of the tokens of {len(rows)} rows are trained on"
    said += ", each row ends with a stop that is" if not bad and not blocks else ""
    views = [show_row(stage, row) for row in rows[: PIECES["views"]]]
    return result("fails" if bad else "holds", len(bad), 0, "; ".join([*bad, said] if bad else [said]), views=views)


def name_rows(numbers: list[int]) -> str:
    numbers = list(dict.fromkeys(numbers))
    return ", ".join(map(str, numbers[:5])) + " ..." * (len(numbers) > 5)


def find_bad_labels(stage: Stage, rows: list[dict]) -> list[str]:
    """Rows without labels, padding with labels, labels that are not their tokens, prompts that are missing."""
    empty = [r["row"] for r in rows if all(label == -100 for label in r["labels"][1 if stage.causal else 0 :])]
    bad = [f"rows {name_rows(empty)} ask for nothing: leave them out"] * bool(empty)
    padded = [r["row"] for r in rows if r.get("padded")] + find_padding_labels(stage)
    bad += [f"padding is trained on in rows {name_rows(padded)}: give it the label -100"] * bool(padded)
    if not stage.causal:
        return bad
    moved = [r["row"] for r in rows if any(b not in (-100, a) for a, b in zip(r["ids"], r["labels"], strict=True))]
    bad += [f"labels of rows {name_rows(moved)} are not their tokens: the model shifts them itself"] * bool(moved)
    bare = [r["row"] for r in rows if len(r["labels"]) > 1 and r["labels"][1] != -100]
    why = "have no prompt, or train on it, where the others do not: was the question cut?"
    return bad + [f"rows {name_rows(bare)} {why}"] * (0 < len(bare) < len(rows) / 2)


def find_padding_labels(stage: Stage) -> list[int]:
    """Rows of a collated batch that have labels where they have no tokens."""
    rows, (_, collate) = stage.first_rows(), stage.loader()
    uneven = sorted(range(len(rows)), key=lambda i: len(rows[i].get("input_ids", rows[i].get("labels", []))))
    chosen = [uneven[len(uneven) // 2], uneven[-1]]
    batch = collate([rows[i] for i in chosen])
    labels, mask, pad = batch["labels"], batch.get("attention_mask"), getattr(stage.tokenizer, "pad_token_id", None)
    if is_packed(batch):
        return []
    if stage.causal:
        same = torch.is_tensor(mask) and mask.shape == labels.shape
        return [chosen[i] for i in range(len(labels)) if same and (labels[i][mask[i] == 0] != -100).any()]
    ended = labels.eq(pad) if pad is not None and pad not in find_stops(stage) else torch.zeros_like(labels)
    return [chosen[i] for i in range(min(len(labels), 2)) if ended[i].any()]


def find_bad_stops(rows: list[dict], stops: set[int], causal: bool) -> list[str]:
    """Examples that do not end with a stop token, or whose stop has no label."""
    hidden, without, count = [], [], 0
    longest = max((len(row["ids"]) for row in rows), default=0)
    for row in rows:
        bounds = [*row["starts"], len(row["ids"])]
        for start, end in zip(bounds, bounds[1:]):  # noqa: B905
            tail = [i for i in range(max(start, end - 3), end) if row["ids"][i] in stops]
            cut = len(row["starts"]) == 1 and len(row["ids"]) == longest and len(rows) > 1
            count += not cut or bool(tail)
            if tail and row["labels"][tail[-1]] == -100:
                hidden.append(row["row"])
            elif not tail and not cut:
                masked = not causal and -100 in row["labels"]
                (hidden if masked else without).append(row["row"])
    why = "pad_token is eos_token, perhaps, and the collator masks padding: mask it by its position"
    bad = [f"the stop token has no label in {len(hidden)} of {count} examples (rows {name_rows(hidden)}): {why}"]
    bad = bad if hidden else []
    if len(without) > count / 2:
        bad.append(f"{len(without)} of {count} examples (rows {name_rows(without)}) end without a stop token")
    return bad


def show_row(stage: Stage, row: dict) -> list:
    """[[text of a token, whether it is trained on], ...]"""
    if stage.tokenizer is None or not hasattr(stage.tokenizer, "decode"):
        return []
    ids, flags = row["ids"][:400], [label != -100 for label in row["labels"][:400]]
    source = row.get("source", [])[:200]
    texts = [stage.tokenizer.decode([i]) if i >= 0 else "∅" for i in [*source, *ids]]
    return [[text, flag] for text, flag in zip(texts, [False] * len(source) + flags, strict=True)]


def check_prompts(stage: Stage) -> dict:
    rows, tokenizer = read_rows(stage), stage.tokenizer
    if tokenizer is None:
        return not_tried("the trainer has no tokenizer")
    ends, stops = find_stops(stage), set()
    learned = Counter(next((t for t in reversed(r["labels"]) if t in ends), None) for r in rows)
    stops = {token for token in learned if token is not None}
    if not stops:
        return result("fails", 0, None, "no row ends with a token at which generate() ends: it never stops")
    ends_generation = stage.model.generation_config.eos_token_id if stage.model.can_generate() else None
    ends_generation = ends_generation if isinstance(ends_generation, list) else [ends_generation]
    token = tokenizer.decode([learned.most_common(1)[0][0]])
    if not stops <= set(ends_generation):
        said = f"the stop that is trained on, {token!r}, is not in generation_config.eos_token_id {ends_generation}"
        return result("fails", 0, None, said)
    if not stage.causal:
        return result("holds", None, None, f"{token!r} is trained on and ends a generation")
    return check_template(stage, rows, token)


def check_template(stage: Stage, rows: list[dict], token: str) -> dict:
    """Whether what precedes an answer is what the tokenizer's generation prompt renders."""
    tokenizer, bos = stage.tokenizer, stage.tokenizer.bos_token_id
    double = [r["row"] for r in rows if bos is not None and r["ids"][:2] == [bos, bos]]
    if double:
        return result("fails", len(double), 0, f"rows {name_rows(double)} begin with two BOS tokens")
    if not getattr(tokenizer, "chat_template", None):
        return result("holds", None, None, f"no chat template; {token!r} is trained on and ends a generation")
    mark = "\U000f0000"
    chat = [{"role": "user", "content": mark}]
    after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).partition(mark)[2]
    good, other, unlike = [], [], 0
    for row in rows:
        first = next((i for i, label in enumerate(row["labels"]) if label != -100), 0)
        prompt, whole = tokenizer.decode(row["ids"][:first]), tokenizer.decode(row["ids"])
        if first > 1 and prompt.endswith(after) or first <= 1 and after in whole:
            good.append(row["row"])
        elif after.strip() and after.strip() in whole:
            other.append(row["row"])
        else:
            unlike += 1
    if other:
        said = f"rows {name_rows(other)}: what stands before the answer is not the generation prompt's {after[-40:]!r}"
        return result("fails", len(other), 0, said)
    if unlike > len(good):
        return not_tried("the rows are not written by the chat template: generate with the script's own prompt")
    return result("holds", 0, 0, f"{len(good)} rows begin as the generation prompt does; {token!r} ends a generation")


def check_packing(stage: Stage) -> dict:
    rows, (_, collate) = read_rows(stage), stage.loader()
    if stage.causal:
        stops, blocks = find_stops(stage), are_blocks(stage, rows)
        for row in rows if blocks else []:
            row["starts"] = [0] + [i + 1 for i, t in enumerate(row["ids"][:-1]) if t in stops and i > 0]
        packed = [row for row in rows if len(row["starts"]) > 1]
        return measure_leak(stage, packed, blocks) if packed else not_tried("no row holds several examples")
    batch = collate(stage.first_rows()[:3])
    if not is_packed(batch):
        return not_tried("no row holds several examples")
    worst = compare_batch(stage, collate, stage.first_rows()[:3])
    return judge(worst, LOGITS, f"3 examples packed and alone: losses off by {worst:.1e}", "packed examples leak")


def measure_leak(stage: Stage, rows: list[dict], blocks: bool) -> dict:
    """Logits of each example alone against those in its row."""
    _, collate = stage.loader()
    dataset, worst, where = stage.first_rows(), 0.0, ""
    for row in rows[:2]:
        batch = collate([dataset[row["row"]]])
        logits = stage.logits(batch)[0]
        bounds = [*row["starts"], len(row["ids"])]
        for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if end - start < 2 or number > 3:
                continue
            ids = torch.tensor([row["ids"][start:end]])
            alone = stage.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})[0]
            off = ((logits[start:end] - alone).abs().max() / alone.abs().max()).item()
            if off > worst:
                worst, where = (
                    off,
                    f"row {row['row']}, example {number + 1} (from token {start}), from those before it",
                )
    if SEEN["flash"] and worst > LOGITS:
        return not_tried("FlashAttention, which would keep packed examples apart, does not run on a CPU")
    good = f"examples in their row and alone: logits off by {worst:.1e} of the largest"
    bad = f"packed examples see each other: logits off by {worst:.1e} of the largest in {where}"
    bad += "; rows are one text cut into blocks, and nothing says where an example begins" * blocks
    return judge(worst, LOGITS, good, bad)


def compare_batch(stage: Stage, collate, rows: list) -> float:
    """Largest difference of a token's loss in a batch of rows from its loss in a row of its own, over the largest."""
    parts = [token_losses(stage, collate([row])) for row in rows]
    alone, together = torch.cat(parts).sort().values, token_losses(stage, collate(rows)).sort().values
    if len(alone) != len(together):
        return math.inf
    return ((alone - together).abs().max() / alone.abs().max()).item()


def token_losses(stage: Stage, batch: dict) -> torch.Tensor:
    """The loss of each supervised token."""
    logits, labels = stage.logits(batch), batch["labels"]
    if stage.causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != -100
    return torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none")


def check_padding(stage: Stage) -> dict:
    rows, collate = stage.first_rows(), stage.loader()[1]
    rows = sorted((r for r in rows if len(r.get("input_ids", [])) > 1), key=lambda row: len(row["input_ids"]))
    if len(rows) < 2:
        return not_tried("the rows have no input_ids of their own")
    chosen = [rows[0], rows[-1]]
    if is_packed(collate(chosen)):
        collate = stage.trainer.data_collator
    batch = collate(chosen)
    mask = batch.get("attention_mask")
    if is_packed(batch) or not torch.is_tensor(mask) or mask.dim() != 2 or bool(mask.all()):
        return not_tried("two rows of different length are not padded in a batch")
    side = "left" if (mask[:, 0] == 0).any() else "right"
    worst = compare_batch(stage, collate, chosen)
    bad = f"padding on the {side} changes a row: a token's loss by {worst:.1e} of the largest; give position_ids, or "
    return judge(
        worst, LOGITS, f"on the {side}; a row's losses off by {worst:.1e} beside a longer one", bad + "pad right"
    )


def check_positions(stage: Stage) -> dict:
    _, collate = stage.loader()
    positions = collate(stage.first_rows()[:1]).get("position_ids")
    if not torch.is_tensor(positions):
        padding = stage.results.get("padding side", not_tried("no padding was tried"))
        said = f"the model counts positions itself; as padding: {padding['detail']}"
        return result(padding["status"], padding["figure"], padding["bound"], said)
    steps = positions[0].diff()
    bad = int(((steps != 1) & (positions[0][1:] != 0)).sum()) + int(positions[0][0] != 0)
    return judge(bad, 0, "position_ids begin at 0 with each example and count up", f"position_ids jump {bad} times")


# ------------------------------------------------------------------------------------------------ all of it

CHECKS = {
    "one": {
        "repeatable": check_repeat,
        "labels": check_labels,
        "prompts": check_prompts,
        "batch cut": check_cut,
        "packing": check_packing,
        "padding side": check_padding,
        "position ids": check_positions,
        "evaluation": check_evaluation,
        "dropout and eval mode": check_mode,
        "tied weights": check_tied,
        "gradients": check_gradients,
        "precision": check_precision,
        "(base)": Stage.base,
        "(reference)": prepare_optimizer,
        "(checkpoint)": prepare_resume,
    },
    "again": {"resume": check_resume},
    "two": {"ranks": check_ranks, "optimizer": check_optimizer, "evaluation on ranks": check_evaluation_ranks},
    "zero": {"ranks under DeepSpeed": check_zero_ranks, "optimizer": check_optimizer},
}


def train_instead(trainer, *args, **settings) -> None:
    """In the place of Trainer.train: the checks of the plan's mode, and the end of the process."""
    stage = Stage(trainer)
    if RANK == 0 and MODE == "one":
        size = sum(p.numel() for p in trainer.model.parameters())
        real = "its own weights" if PLAN["keep_weights"] else "; ".join(SEEN["clones"]) or "as the script makes it"
        send({"model": f"{type(trainer.model).__name__}, {size:,} parameters: {real}", "batch": stage.batch})
    for name, check in CHECKS[MODE].items():
        if name in PLAN["skip"] or (PLAN["zero"] and MODE == "two" and name == "optimizer"):
            continue
        try:
            made = check(stage)
        except Exception as error:  # a script's trainer may raise anything
            traceback.print_exc()
            made = not_tried(f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}")
            stage.reference["no checkpoint"] = made["detail"]
        if made is not None:
            stage.results[name] = made
        if not name.startswith("("):
            send({"check": name, **made})
    if MODE == "one":
        kept = {k: v for k, v in stage.memory.items() if k in ("base", "optimizer", "whole", "evaluation")}
        kept |= {"start": stage.start, "no checkpoint": stage.results.get("(checkpoint)", {}).get("detail")}
        torch.save(kept, FOLDER / "reference.pt")
    send({"done": True})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    leave(0)


def end_with_parent() -> None:
    """The kernel ends this process with check_run.py, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def run_script(plan: dict, words: list[str], output: str, environ: dict[str, str]) -> None:
    """Become a rank: run the script, whose arguments follow it in words, to where it trains; does not return."""
    global PLAN, FOLDER, MODE, RANK
    PLAN, FOLDER, MODE, RANK = plan, Path(plan["folder"]), plan["mode"], int(environ.get("RANK", 0))
    os.setsid()
    gc.freeze()  # the libraries' own objects: a collection then takes milliseconds instead of a second
    end_with_parent()
    os.environ.update(environ)
    for number, path in enumerate((os.devnull, output, output)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
    ended = "ends without calling Trainer.train(): it does not train"
    try:
        if MODE == "zero":
            join_ranks()
        patch_libraries()
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        ended = ended if end.code in (None, 0) else f"ends with exit code {end.code} before it trains"
    except BaseException as error:  # whatever a script raises
        traceback.print_exc()
        ended = "asks for input, and nobody is there to answer"
        ended = ended if isinstance(error, EOFError) else f"crashes before it trains: {type(error).__name__}: {error}"
        ended = str(error) if "cannot be shrunk" in str(error) else ended
    if not SEEN["trainers"] and ended.startswith("ends without"):
        ended = "uses no transformers.Trainer: there is nothing to check"
    send({"ended": ended})
    leave(1)
