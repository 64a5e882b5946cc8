# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The inside of check_run.py: runs a training script with a tiny clone of its model and compares variants of its run.

check_run.py forks a process for each rank, which calls run_script() with a plan. The script is not edited: its
from_pretrained() gives a clone, its Trainer.train() makes the checks of the plan's mode (the functions check_*), and
the process ends there. Modes: one (a process), two (ranks, gloo), zero (the same with the DeepSpeed file), again
(resumes one's checkpoint in a fresh process). Tested with transformers 5.23.
"""

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
from functools import cached_property
from pathlib import Path

import datasets
import safetensors
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

PLAN, FOLDER, MODE, RANK, TELL = {}, Path(), "", 0, None  # set by run_script() in the process of a rank
LOSS, NORM, WEIGHTS, LOGITS = 1e-4, 1e-3, 1e-2, 1e-3  # bounds; docs/check_run.md says why these
READ, VIEWED, EVALUATED = 64, 3, 7  # rows whose labels are read, shown token by token, evaluated
SEEN = {"models": [], "flash": False, "closed": None, "deepspeed": None}  # what the script did so far

# ------------------------------------------------------------------------------------------------ the clone

SMALL = {  # a configuration's names for its sizes, and what they become
    "num_layers|num_decoder_layers|num_hidden_layers|encoder_layers|decoder_layers|n_layer": 2,
    "hidden_size|d_model|n_embd|embedding_size|moe_intermediate_size|shared_expert_intermediate_size": 64,
    "num_attention_heads|num_heads|n_head|encoder_attention_heads|decoder_attention_heads": 4,
    "num_local_experts|num_experts|n_routed_experts": 4,
    "head_dim|d_kv": 16,
    "intermediate_size|d_ff|encoder_ffn_dim|decoder_ffn_dim|n_inner|ffn_dim": 128,
}


def shrink(values: dict, narrow: bool = True) -> dict:
    """A configuration's values with few narrow layers, one of each special kind; vocabulary and ties stay."""
    kinds, small = values.get("layer_types") or [], dict(values)
    for key, value in values.items():
        size = next((size for names, size in SMALL.items() if key in names.split("|")), None)
        if isinstance(value, dict) and "model_type" in value:
            small[key] = shrink(value, narrow)
        elif isinstance(value, int) and size and (narrow or size == 2):
            small[key] = min(value, max(size, len(set(kinds))) if size == 2 else size)
    small |= {"layer_types": [*dict.fromkeys(kinds), *kinds][: max(2, len(set(kinds)))]} if kinds else {}
    heads, groups = values.get("num_attention_heads") or values.get("n_head"), values.get("num_key_value_heads")
    if narrow and heads and groups:  # one group, some or as many as heads: the kind of attention stays
        small["num_key_value_heads"] = 1 if groups == 1 else small["num_attention_heads"] // (1 + (groups < heads))
    # At 64 wide the usual 0.02 makes all words alike: what leaks or is weighed otherwise would hardly show.
    return small | {k: 0.1 for k in ("initializer_range", "init_std") if k in values and narrow}


def build_clone(cls, config):
    """A small model of a class from the seed; ValueError where its configuration cannot be made small."""
    said = None
    for narrow in (True, False):
        try:
            small = type(config)(**shrink(config.to_dict(), narrow))
            small._attn_implementation = "eager" if config._attn_implementation == "eager" else None
            set_seed(PLAN["seed"])
            model = REAL_MAKE(cls, small).float()
            for parameter in (p for p in model.parameters() if p.dim() == 1 and p.requires_grad):
                # Biases and norms away from 0 and 1: what depends on them alone would be the same in every variant.
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
            return model
        except Exception as error:  # a model class may raise anything
            said = said or error
    raise ValueError(f"{type(config).__name__} cannot be shrunk: {type(said).__name__}: {said}; try --keep_weights")


def load_clone(cls, name, *args, config=None, **settings):
    """In the place of from_pretrained: the clone, saved as a folder, by the real one with the script's settings."""
    if PLAN["keep_weights"]:
        return REAL_LOAD(cls, name, *args, config=config, **settings)
    if not isinstance(config, transformers.PretrainedConfig):
        known = ("trust_remote_code", "revision", "cache_dir", "token", "subfolder", "gguf_file")
        config = transformers.AutoConfig.from_pretrained(name, **{k: v for k, v in settings.items() if k in known})
    folder = FOLDER / f"clone-{len(SEEN['models'])}"
    if not folder.exists():  # made by mode one, read by all processes
        clone = build_clone(cls, config)
        with contextlib.suppress(Exception):  # a model without generation settings
            clone.generation_config = transformers.GenerationConfig.from_pretrained(name)
        clone.save_pretrained(folder)
    SEEN["models"].append(f"a clone of {name}")
    gone = ("revision", "subfolder", "gguf_file", "variant", "use_safetensors", "device_map", "quantization_config")
    settings = {k: v for k, v in settings.items() if k not in gone}
    asked = settings.get("dtype", settings.pop("torch_dtype", None)) or "auto"
    settings["dtype"] = torch.float32 if MODE == "zero" else config.dtype or "auto" if asked == "auto" else asked
    if "flash" in str(settings.get("attn_implementation")):  # there is none on a CPU
        SEEN["flash"], settings["attn_implementation"] = True, "sdpa"
    small = type(config).from_pretrained(folder)
    loaded = REAL_LOAD(cls, str(folder), *args, config=small, **settings)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config._name_or_path = str(name)  # TRL reads the tokenizer from there
    return loaded


def make_clone(cls, config, **settings):
    """In the place of _from_config, which a script that trains from scratch calls."""
    SEEN["models"].append(f"{cls.__name__} from a configuration")
    return REAL_MAKE(cls, config, **settings) if PLAN["keep_weights"] else build_clone(cls, config)


REAL_LOAD, REAL_MAKE = PreTrainedModel.from_pretrained.__func__, PreTrainedModel._from_config.__func__

# ------------------------------------------------------------------------------------------------ the script

QUIET = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "steps", "logging_steps": 1}
QUIET |= {"report_to": [], "push_to_hub": False, "load_best_model_at_end": False, "eval_on_start": False}
QUIET |= {"disable_tqdm": True, "torch_compile": False, "dataloader_num_workers": 0, "auto_find_batch_size": False}
QUIET |= {"neftune_noise_alpha": None, "bf16": False, "fp16": False, "mixed_precision": "no", "warmup_steps": 0}
QUIET |= {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": None, "use_liger_kernel": False}


def set_up_arguments(args) -> None:
    """In front of TrainingArguments.__post_init__: nothing is written, reported or uploaded outside the folder."""
    SEEN["closed"], SEEN["deepspeed"] = os.path.abspath(args.output_dir or FOLDER), args.deepspeed
    args.deepspeed = None
    args.output_dir, args.use_cpu, args.report_to, args.push_to_hub = str(FOLDER / f"out-{MODE}"), True, "none", False
    if MODE == "zero":  # the DeepSpeed file is read with these: later is too late
        args.deepspeed = str(FOLDER / f"deepspeed-{RANK}.json")
        Path(args.deepspeed).write_text(json.dumps(plain_deepspeed(SEEN["deepspeed"])))
        changes = QUIET | {"report_to": "none", "max_steps": PLAN["steps"], "train_sampling_strategy": "sequential"}
        changes |= {"per_device_train_batch_size": PLAN["batch"] // 2, "gradient_accumulation_steps": 1}
        for name, value in changes.items():
            setattr(args, name, value)
    REAL_POST_INIT(args)


def plain_deepspeed(given: str | dict) -> dict:
    """
    The DeepSpeed file as two CPU ranks can run it: the same stage and optimizer, in fp32.

    The batch is ours, nothing is offloaded (a CPU has nowhere else), Adam is torch's, which needs no compiler.
    """
    config = json.loads(Path(given).read_text(encoding="utf-8")) if isinstance(given, str) else copy.deepcopy(given)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config |= dict.fromkeys(sizes, "auto")
    config |= {k: {"enabled": "auto"} for k in ("bf16", "fp16") if k in config}  # by the flags, which are off
    for key in ("offload_optimizer", "offload_param"):
        config.get("zero_optimization", {}).pop(key, None)
    if config.get("optimizer", {}).get("type", "").lower() in ("adam", "adamw"):
        config["optimizer"].setdefault("params", {})["torch_adam"] = True
    config.pop("scheduler", None)  # warm-up is cut with the run; the flags' schedule is then compared with itself
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


def watch_writes(event: str, values: tuple) -> None:
    """Audit hook: no file is opened for writing, made, renamed or removed in the user's own output folder."""
    reads = event == "open" and not (
        set(values[1] or "") & set("wax+") or (values[2] or 0) & (os.O_ACCMODE | os.O_CREAT)
    )
    if reads or event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
        return
    if SEEN["closed"] and isinstance(values[0], str | bytes | os.PathLike):
        path = Path(os.path.abspath(os.fsdecode(values[0])))
        if path.is_relative_to(SEEN["closed"]) and not path.is_relative_to(FOLDER):
            raise PermissionError(f"check_run.py keeps the script from writing to {path}")


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


def patch_libraries() -> None:
    """The places where a script meets the libraries."""
    global REAL_POST_INIT, REAL_TRAIN, REAL_MAP, REAL_GENERATE
    REAL_POST_INIT, TrainingArguments.__post_init__ = TrainingArguments.__post_init__, set_up_arguments
    REAL_TRAIN, Trainer.train = Trainer.train, train_instead
    PreTrainedModel.from_pretrained, PreTrainedModel._from_config = classmethod(load_clone), classmethod(make_clone)
    REAL_GENERATE, GenerationMixin.generate = GenerationMixin.generate, generate_few
    REAL_MAP, datasets.Dataset.map = datasets.Dataset.map, map_first_rows
    if not any(word.startswith("--dataset_name") for word in sys.argv):  # the hub's are read from the user's cache
        datasets.config.HF_DATASETS_CACHE = FOLDER / "datasets"
    sys.addaudithook(watch_writes)


def hide_output(words: list[str]) -> list[str]:
    """The words with a folder of ours as --output_dir, for scripts that read it themselves."""
    ours = str(FOLDER / f"out-{MODE}")
    pairs = zip(["", *words], words, strict=False)
    return [
        f"--output_dir={ours}" if w.startswith("--output_dir=") else ours if before == "--output_dir" else w
        for before, w in pairs
    ]


def send(event: dict) -> None:
    """To check_run.py, by the first rank."""
    if RANK == 0:
        TELL.send(event)


def end(why: str) -> None:
    """Tell check_run.py, and end at once with all threads: nothing of the script is to run on."""
    send({"ended": why})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(why))


def run_script(plan: dict, words: list[str], environ: dict[str, str], tell) -> None:
    """Become a rank: run the script, whose arguments follow it in words, to where it trains; does not return."""
    global PLAN, FOLDER, MODE, RANK, TELL
    PLAN, FOLDER, MODE, RANK, TELL = plan, Path(plan["folder"]), plan["mode"], int(environ.get("RANK", 0)), tell
    os.setsid()
    gc.freeze()  # the libraries' own objects: a collection then takes milliseconds instead of a second
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # the kernel ends this with check_run.py, however that ends (Linux)
    os.environ.update(environ)
    for number, path in enumerate((os.devnull, *[FOLDER / f"{MODE}-{RANK}.txt"] * 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)
    torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    sys.argv, sys.path[0] = hide_output(words), os.path.dirname(os.path.abspath(words[0]))
    ended = "ends without calling Trainer.train(): it does not train"
    try:
        if MODE == "zero":  # on gloo, without DeepSpeed's own collectives, which would be compiled first (0.19.8)
            os.environ["DS_ACCELERATOR"] = "cpu"
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.init_distributed("gloo")
        patch_libraries()
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        ended = ended if error.code in (None, 0) else f"ends with exit code {error.code} before it trains"
    except BaseException as error:  # whatever a script raises
        traceback.print_exc()
        ended = f"crashes before it trains: {type(error).__name__}: {error}"
        ended = "asks for input, and nobody is there to answer" if isinstance(error, EOFError) else ended
        ended = str(error) if "cannot be shrunk" in str(error) else ended
    if not SEEN["closed"] and ended.startswith("ends without"):
        ended = "uses no transformers.Trainer: there is nothing to check"
    end(ended)


def train_instead(trainer, *args, **settings) -> None:
    """In the place of Trainer.train: the checks of the plan's mode, and the end of the process."""
    stage = Checks(trainer)
    size = sum(p.numel() for p in trainer.model.parameters())
    real = "its own weights" if PLAN["keep_weights"] else "; ".join(SEEN["models"]) or "as the script makes it"
    about = {"model": f"{type(trainer.model).__name__}, {size:,} parameters: {real}", "batch": stage.batch}
    if MODE == "one":
        send(about | {"deepspeed": bool(SEEN["deepspeed"])})
    for name in PLAN["names"]:
        made = stage.results[name] = attempt(getattr(Checks, name.replace(" ", "_").lower()), stage)
        send({"check": name, **(made if isinstance(made, dict) else {"why": made})})
    if MODE == "one":
        kept = {name: attempt(make, stage) for name, make in REFERENCES.items()} | {"start": stage.start}
        torch.save(kept, FOLDER / "reference.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    end("")


def attempt(make, stage):
    """make(stage), or the reason why it cannot be had."""
    try:
        return make(stage)
    except NotTried as why:
        return str(why)
    except Exception as error:  # a script's trainer may raise anything
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"


class NotTried(Exception):
    """Why a check cannot be made."""


# ------------------------------------------------------------------------------------------------ variants of the run


class Record(TrainerCallback):
    """What a variant showed: rows and mode of each step, parameters that got a gradient, weights after the last."""

    def __init__(self, trainer):
        self.rows, self.modes, self.moved, self.step = [], set(), set(), trainer.training_step
        trainer.training_step = self.training_step  # also a subclass's
        self.trainer = trainer
        trainer.add_callback(self)

    def training_step(self, model, inputs, *args, **settings):
        ids, mask = inputs.get("input_ids", []), inputs.get("attention_mask")
        masked = torch.is_tensor(mask) and mask.shape == ids.shape
        rows = (row[mask[i] > 0] if masked else row for i, row in enumerate(ids))
        self.rows.append([zlib.crc32(row.numpy().tobytes()) for row in rows])
        loss = self.step(model, inputs, *args, **settings)
        self.modes.add(self.trainer.model.training)
        return loss

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    def finish(self) -> dict:
        history = [entry for entry in self.trainer.state.log_history if "loss" in entry]
        made = {
            "losses": [e["loss"] for e in history],
            "norms": [float(e.get("grad_norm") or math.nan) for e in history],
        }
        made |= {"weights": gather_weights(self.trainer.model), "rows": self.rows, "moved": self.moved}
        return made | {"modes": self.modes, "state": measure_state(self.trainer)}


def gather_weights(model) -> dict[str, torch.Tensor]:
    """Every trainable parameter in fp32, whole also under ZeRO-3."""
    weights = {}
    for name, parameter in model.named_parameters():
        gather = sys.modules["deepspeed"].zero.GatheredParameters if hasattr(parameter, "ds_id") else None
        with gather([parameter]) if gather else contextlib.nullcontext():
            if parameter.requires_grad:
                weights[name] = parameter.detach().float().clone()
    return weights


def measure_state(trainer) -> float:
    """Elements of optimizer state a trained parameter; under DeepSpeed on all ranks together."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    held = sum(v.numel() for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    held = torch.tensor(float(held))
    if MODE == "zero":
        torch.distributed.all_reduce(held)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return held.item() / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


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


class Stage:
    """The script's trainer as it stands when it would train, and how to put it back there."""

    def __init__(self, trainer):
        self.trainer, self.model, self.wanted = trainer, trainer.model, trainer.args
        self.kinds = {name: p.dtype for name, p in trainer.model.named_parameters()}
        self.tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        self.causal = not self.model.config.is_encoder_decoder
        self.drops, self.results = still_dropout(self.model), {}
        self.kept = torch.load(FOLDER / "reference.pt", weights_only=False) if MODE != "one" else {}
        if MODE != "zero":
            trainer.model.float()
        self.start = self.kept.get("start") or {name: value.detach().clone() for name, value in self.values()}
        callbacks = trainer.callback_handler.callbacks
        self.callbacks = [c for c in callbacks if not type(c).__name__.startswith(("Progress", "Printer"))]
        trainer.callback_handler.callbacks = list(self.callbacks)
        self.attributes, self.forward = dict(vars(trainer)), vars(self.model).get("forward")
        self.optimizer_state = copy.deepcopy(trainer.optimizer.state_dict()) if trainer.optimizer else None
        rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else 10**6
        if rows < 2:
            raise ValueError(f"{rows} training rows: there is nothing to compare")
        self.batch = PLAN["batch"]
        while self.batch > 1 and rows < 2 * self.batch:
            self.batch //= 2
        self.steps = max(2, min(PLAN["steps"], rows // self.batch // 2 * 2))

    def values(self):
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def reset(self, batch: int = 1, accumulation: int = 1, steps: int = 2, kinds=None, **changes):
        """The trainer as it was, with its weights, in fp32 or of such dtypes by name, for a run cut like this."""
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
        vars(self.model).pop("forward", None)  # autocast's, of a variant before
        if self.forward is not None:
            self.model.forward = self.forward
        for name, value in self.values():
            value.data = self.start[name].to((kinds or {}).get(name, self.start[name].dtype), copy=True)
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
        trainer = self.reset(batch, accumulation, steps, **{"train_sampling_strategy": "sequential"} | changes)
        if sgd:
            trainer.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.01)
            trainer.create_optimizer = lambda model=None: trainer.optimizer
        record = Record(trainer)
        REAL_TRAIN(trainer, resume_from_checkpoint=resume)
        return record.finish()

    @cached_property
    def base(self) -> dict:
        return self.run(self.batch)

    @cached_property
    def on_two(self) -> dict:
        """The user's optimizer on two ranks."""
        return self.run(self.batch // 2, 1, self.steps, sgd=False)

    def reference(self, name: str) -> dict:
        """What mode one left for the other modes."""
        if not isinstance(self.kept[name], dict):
            raise NotTried(self.kept[name] or "there is no evaluation on one process to compare with")
        return self.kept[name]

    @cached_property
    def loader(self):
        return self.reset(self.batch).get_train_dataloader()

    @cached_property
    def first_rows(self) -> list:
        """As the collator gets them."""
        return [self.loader.dataset[i] for i in range(min(READ, len(self.loader.dataset)))]

    def collate(self, rows: list) -> dict:
        return self.loader.collate_fn(rows)

    def logits(self, batch: dict) -> torch.Tensor:
        """The model's logits of a batch, in eval mode."""
        known = inspect.signature(self.model.forward).parameters
        drop = ("labels",) if self.causal or "decoder_input_ids" in batch else ()
        packed = "cu_seq_lens_q" in batch or is_packed(batch)
        inputs = {k: v for k, v in batch.items() if k not in drop and (packed or k in known)}
        self.model.eval()
        with torch.no_grad():
            return self.model(**inputs).logits.float()


def is_packed(batch: dict) -> bool:
    """Whether rows of a batch hold several examples, by numbered masks or restarting positions."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    numbered = torch.is_tensor(mask) and mask.dim() == 2 and bool((mask > 1).any())
    return numbered or (torch.is_tensor(positions) and bool((positions[:, 1:] == 0).any()))


# ------------------------------------------------------------------------------------------------ comparing


def judge(figure: float, bound: float | None, good: str, bad: str = "", fine: bool | None = None, **data) -> dict:
    """A check's result: holds where figure <= bound, or as fine says."""
    fine = figure <= bound if fine is None else fine
    figure = float(f"{figure:.4g}") if math.isfinite(figure) else None
    status = "holds" if fine else "fails"
    return {"status": status, "figure": figure, "bound": bound, "detail": good if fine else bad, "data": data}


def gap(first: float, second: float) -> float:
    return abs(first - second) / max(abs(second), 1e-9) if math.isfinite(first) else math.inf


def compare_weights(weights: dict, others: dict, start: dict, bound: float = WEIGHTS) -> tuple[float, str]:
    """Distance over the length of the update (all parameters together), and the first parameter that is off."""
    ways = {n: (others[n] - start[n]).norm().item() for n in others}
    off = {n: (weights[n] - others[n]).norm().item() if n in weights else math.inf for n in others}
    whole = math.hypot(*ways.values())
    least = 0.1 * whole / math.sqrt(len(ways))  # a parameter that hardly moves is compared with what others move
    first = next((n for n in off if not off[n] <= bound * max(ways[n], least)), "")
    return math.hypot(*off.values()) / max(whole, 1e-12), first


def compare_runs(run: dict, base: dict, start: dict | None) -> tuple[bool, float, float, str]:
    """(Whether all agrees, the first figure that does not, its bound, a sentence); without start: the first step."""
    loss, norm = (run[name][0] / base[name][0] for name in ("losses", "norms"))
    norm = 1.0 if start is None and math.isnan(norm) else norm  # a ZeRO stage that tells none
    parts, said = [(loss, LOSS), (norm, NORM)], f"loss {loss:.2f}×, gradient {norm:.2f}×"
    first = ""
    if start is not None:
        moved, first = compare_weights(run["weights"], base["weights"], start)
        parts += [(1 + moved, WEIGHTS), (1 + max(map(gap, run["losses"], base["losses"])), 10 * LOSS)]
        said += f", weights after {len(run['losses'])} steps off by {moved:.1e} of the update"
    wrong = [(factor, bound) for factor, bound in parts if not abs(factor - 1) <= bound]
    figure, bound = (wrong or parts)[0]
    return not wrong, figure, 1 + bound, said + f", first in {first}" * bool(first and wrong)


def explain_factor(trainer, run: dict, base: dict, times: int, what: str) -> str:
    """The sentence of a run that is not what it was; times: by how much a known fault would multiply its loss."""
    ratio = run["losses"][0] / base["losses"][0]
    if ratio > 1.5 and abs(ratio / times - 1) < 0.1:
        why = "; compute_loss_func is to divide the summed loss by num_items_in_batch"
        if not trainer.compute_loss_func:
            why = "; the model's forward takes **kwargs, so the Trainer believes that its loss, a mean, is divided by "
            why += "num_items_in_batch: give the Trainer a compute_loss_func that divides the summed loss by it"
            why *= getattr(trainer, "model_accepts_loss_kwargs", False)
        return f"the loss is multiplied by the {what} ({ratio:.2f}×)" + why
    if ratio < 0.75 and abs(ratio * times - 1) < 0.1:
        return f"the loss is divided by the {what} ({ratio:.2f}×)"
    if not abs(ratio - 1) <= LOSS:
        why = "as where batches' means are averaged although they hold different numbers of tokens"
        return f"the loss changes with the {what} ({ratio:.4f}×), {why}"
    return f"the logged loss agrees, what is trained does not, with other {what}"


def name_rows(numbers: list[int]) -> str:
    numbers = list(dict.fromkeys(numbers))
    return ", ".join(map(str, numbers[:5])) + " ..." * (len(numbers) > 5)


# ------------------------------------------------------------------------------------------------ the checks


class RunChecks(Stage):
    """What variants of the run show: a method a check, by its name; a dict of judge(), or NotTried."""

    def repeatable(self) -> dict:
        """The same run twice: what differs here cannot be blamed on anything else."""
        base, again = self.base, self.run(self.batch)
        if not all(map(math.isfinite, base["losses"])):
            return judge(math.nan, None, "", f"the losses are {base['losses']}: not numbers")
        fine, figure, bound, said = compare_runs(again, base, self.start)
        bad = "the same run, twice with one seed, differs (" + "other rows; " * (again["rows"] != base["rows"])
        bad += f"{said}): something is drawn that no seed decides"
        return judge(figure, bound, "the same run twice is the same", bad, fine)

    def batch_cut(self) -> dict:
        base, n = self.base, self.batch
        if n < 2:
            raise NotTried("the data has too few rows to cut a batch")
        runs = {f"{b}×{n // b}": self.run(b, n // b) for b in dict.fromkeys((n // 2, 1))}
        compared = {name: compare_runs(run, base, self.start) for name, run in runs.items()}
        said = "; ".join(f"{name}: {parts[-1]}" for name, parts in compared.items())
        last = runs[f"1×{n}"]
        fine, figure, bound, _ = next((c for c in reversed(compared.values()) if not c[0]), compared[f"1×{n}"])
        curves = {f"{n}×1": base["losses"]} | {name: run["losses"] for name, run in runs.items()}
        why = explain_factor(self.trainer, last, base, n, "accumulation steps")
        return judge(figure, bound, said, f"{why}. {said}", fine, curves=curves)

    def ranks(self) -> dict:
        base, run, rows = self.reference("base"), self.run(self.batch // 2), [None, None]
        fine, figure, bound, said = compare_runs(run, base, self.start)
        why = explain_factor(self.trainer, run, base, 2, "number of processes")
        torch.distributed.all_gather_object(rows, run["rows"][0])
        if sorted(sum(rows, [])) != sorted(base["rows"][0]):
            why = "two processes train on other rows than one, or on rows put together otherwise"
        said, curves = f"2 processes against 1: {said}", {"1 process": base["losses"], "2 processes": run["losses"]}
        return judge(figure, bound, said, f"{why}. {said}", fine, curves=curves)

    def ranks_under_deepspeed(self) -> dict:
        base, run = self.reference("optimizer"), self.on_two
        fine, figure, bound, said = compare_runs(run, base, None)
        why, said = explain_factor(self.trainer, run, base, 2, "number of processes"), f"2 ranks against 1: {said}"
        return judge(figure, bound, said, f"{why}. {said}", fine)

    def optimizer(self) -> dict:
        """The user's optimizer on two ranks, with the DeepSpeed file if there is one, against one process in fp32."""
        base, run, where = self.reference("optimizer"), self.on_two, "on 2 processes"
        where = "under the DeepSpeed file" if MODE == "zero" else where
        moved, first = compare_weights(run["weights"], base["weights"], self.kept["start"], base["noise"])
        name = str(getattr(self.wanted.optim, "value", self.wanted.optim))
        said = f"{name}, {self.steps} steps {where}: weights off by {moved:.1e} of the update; "
        said += f"state {run['state']:.2f} numbers a parameter, {base['state']:.2f} in one process"
        why, full = f"{where} it trains to other weights, first in {first}", base["state"] < 0.5 and run["state"] > 0.9
        if full:
            why = (
                f"is not {name.title()} any more: factored states become full. ZeRO hands the optimizer flat pieces, "
            )
            why += "which it cannot factor; take zero_adafactor.py, or AdamW"
        curves = {"1 process": base["losses"], where: run["losses"]}
        return judge(moved, base["noise"], said, f"{why}. {said}", moved <= base["noise"] and not full, curves=curves)

    def prepare_optimizer(self) -> dict:
        """The reference of `optimizer`, and what adding in another order alone makes of it: its bound."""
        run = self.run(self.batch, 1, self.steps, sgd=False) | {"noise": WEIGHTS}
        if self.results.get("batch cut", {}).get("status") == "holds":
            other = self.run(self.batch // 2, 2, self.steps, sgd=False)
            run["noise"] = max(WEIGHTS, 4 * compare_weights(other["weights"], run["weights"], self.start)[0])
        return run

    def prepare_resume(self) -> dict:
        """The whole run whose checkpoint, halfway, mode `again` goes on from; its rows in the user's own order."""
        how = {"save_strategy": "steps", "save_steps": self.steps // 2, "save_total_limit": None}
        how |= {"train_sampling_strategy": self.wanted.train_sampling_strategy}
        run = self.run(self.batch, 1, self.steps, sgd=False, **how)
        folder = Path(self.trainer.args.output_dir) / f"checkpoint-{self.steps // 2}"
        return run | {"checkpoint": str(folder)}

    def resume(self) -> dict:
        whole, half = self.reference("whole"), self.steps // 2
        how = {"train_sampling_strategy": self.wanted.train_sampling_strategy, "resume": whole["checkpoint"]}
        run = self.run(self.batch, 1, self.steps, sgd=False, **how)
        rows, left = run["rows"], whole["rows"][half:]
        moved, first = compare_weights(run["weights"], whole["weights"], self.kept["start"])
        told = f"{self.steps} steps, or {half}, killed, and the rest in a new process"
        for step, (ours, theirs) in enumerate(zip(rows, left, strict=False), start=half + 1):
            for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
                if one != other:
                    why = f"the resumed run trains on other rows, first at step {step}, row {number} of its batch"
                    return judge(moved, WEIGHTS, "", f"{why} ({told})", False)
        if len(rows) != len(left):
            why = f"the resumed run makes {len(rows)} batches, {len(left)} were left"
            return judge(moved, WEIGHTS, "", why, False)
        bad = f"the same rows, but the weights differ by {moved:.1e} of the update, first in {first} ({told})"
        path = Path(whole["checkpoint"]) / "model.safetensors"
        with safetensors.safe_open(path, "pt") if path.is_file() else contextlib.nullcontext() as saved:
            lost = sorted({n for n, _ in self.model.named_parameters()} - set(saved.keys())) if saved else []
        if lost:  # MoE models: Trainer passes over them silently (transformers 5.23)
            bad += f"; the checkpoint has other names for {len(lost)} parameters, which are not loaded, with {lost[0]}"
        return judge(moved, WEIGHTS, f"{told}: the same rows and weights", bad)

    def evaluation(self) -> dict:
        if self.trainer.eval_dataset is None:
            raise NotTried("the script gives the trainer no evaluation set")
        worst, said = self.compare_metrics(self.evaluate(1), self.evaluated)
        bad = f"metrics depend on the batch size, 1 against 4: {said}; means of batches are no mean of tokens"
        return judge(worst, LOSS, "metrics and predictions, by batches of 4 and of 1: the same", bad)

    def evaluation_on_ranks(self) -> dict:
        worst, said = self.compare_metrics(self.evaluate(2), self.reference("evaluation"))
        bad = f"metrics depend on the number of processes: {said}; rows that fill the last batch may count twice"
        return judge(worst, LOSS, "metrics and predictions, on 2 processes and on 1: the same", bad)

    def evaluate(self, size: int) -> dict:
        """Metrics, predictions by their labels, of the first rows (of training, if there are no others); the modes."""
        trainer, made, modes = self.reset(1, per_device_eval_batch_size=size), [], set()
        loop, rows = trainer.evaluation_loop, trainer.eval_dataset or trainer.train_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        first = range(min(EVALUATED, len(rows)))
        rows = rows.select(first) if hasattr(rows, "select") else torch.utils.data.Subset(rows, first)
        trainer.evaluation_loop = lambda *args, **settings: made.append(loop(*args, **settings)) or made[-1]
        hook = self.model.register_forward_pre_hook(lambda module, inputs: modes.add(module.training))
        metrics = trainer.evaluate(eval_dataset=rows)
        hook.remove()
        timed, pad = ("runtime", "per_second", "epoch", "preparation"), getattr(self.tokenizer, "pad_token_id", 0)
        metrics = {k: v for k, v in metrics.items() if isinstance(v, float | int) and not any(t in k for t in timed)}
        pairs, generates = {}, getattr(trainer.args, "predict_with_generate", False)
        if made and made[-1].label_ids is not None and getattr(made[-1].predictions, "ndim", 0) == 2:
            for labels, row in zip(made[-1].label_ids, made[-1].predictions, strict=True):
                kept = (row != -100) & (row != pad) if generates else labels != -100
                pairs[tuple(labels[labels != -100].tolist())] = row[kept].tolist()
        return {"metrics": metrics, "pairs": pairs, "modes": modes}

    @cached_property
    def evaluated(self) -> dict:
        return self.evaluate(4)

    def compare_metrics(self, ours: dict, theirs: dict) -> tuple[float, str]:
        off = {"": 0.0} | {k: gap(ours["metrics"].get(k, math.inf), v) for k, v in theirs["metrics"].items()}
        changed, worst = sum(ours["pairs"].get(k) != v for k, v in theirs["pairs"].items()), max(off, key=off.get)
        said = f"{changed} of {len(theirs['pairs'])} predictions are others', or belong to other rows; " * bool(
            changed
        )
        if off[worst] > LOSS:
            said += f"{worst} {ours['metrics'].get(worst, math.nan):.6g} against {theirs['metrics'][worst]:.6g}"
        return max(off[worst], float(changed)), said

    def dropout_and_eval_mode(self) -> dict:
        evaluated, rates = self.evaluated["modes"], sorted(set(self.drops.values()))
        asked = {k for k, v in self.model.config.to_dict().items() if "drop" in k and isinstance(v, float) and v > 0}
        asked = [k for k in asked if not any(other in k for other in ("classifier", "summary", "layerdrop"))]
        bad = ["trains in eval mode: no dropout"] * (False in self.base["modes"])
        bad += ["evaluates in training mode: with dropout"] * (True in evaluated)
        bad += [f"the configuration has {', '.join(asked)}, but no module drops anything"] * bool(asked and not rates)
        said = f"trains in training mode, dropout {', '.join(map(str, rates)) or 'none'}; evaluates in eval mode"
        return judge(len(bad), 0, said, "; ".join(bad))

    def tied_weights(self) -> dict:
        model = (
            getattr(self.model, "decoder", self.model)
            if "encoder-decoder" in self.model.config.model_type
            else self.model
        )
        ins, outs = model.get_input_embeddings(), model.get_output_embeddings()
        if getattr(outs, "weight", None) is None:
            raise NotTried("the model has no output embeddings")
        asked = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
        tied = ins.weight is outs.weight or ins.weight.data_ptr() == outs.weight.data_ptr()
        said = f"tie_word_embeddings is {asked}, and the two are {'one matrix' if tied else 'two matrices'}"
        return judge(float(tied), float(asked), said, said, tied == asked)

    def parameters(self) -> dict:
        """Those that are there to be trained: no tables of sines."""
        tables = tuple(n for n, module in self.model.named_modules() if "Sinusoidal" in type(module).__name__)
        return {n: p for n, p in self.model.named_parameters() if not (tables and n.startswith(tables))}

    def frozen_parameters(self) -> dict:
        frozen = [n for n, p in self.parameters().items() if not p.requires_grad]
        if hasattr(self.model, "peft_config"):
            return judge(0, 0, f"adapters are trained, {len(frozen)} parameters are frozen beneath them")
        bad = f"{len(frozen)} parameters are frozen and not trained: {name_rows(frozen)}; if that is meant, --skip it"
        return judge(len(frozen), 0, "no parameter is frozen", bad)

    def gradients(self) -> dict:
        wanted, moved = [n for n, p in self.parameters().items() if p.requires_grad], self.base["moved"]
        still = [n for n in wanted if n not in moved]
        bad = f"{len(still)} parameters get no gradient in two steps: {name_rows(still)}"
        return judge(len(still), 0, f"{len(wanted)} parameters get a gradient", bad)

    def precision(self) -> dict:
        """How much of an update arrives in the precision of the run: in bf16 weights small ones are rounded away."""
        asked = next((name for name in ("bf16", "fp16") if getattr(self.wanted, name)), None)
        kinds = Counter(str(kind).removeprefix("torch.") for kind in self.kinds.values())
        said = f"parameters: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}; autocast: {asked or 'none'}"
        if asked == "fp16" or "float16" in kinds:
            raise NotTried(f"{said}; fp16 needs a GPU")
        if set(kinds) == {"float32"} and not asked:
            return judge(1.0, 0.5, said, fine=True)
        flat = {"steps": 1, "sgd": False, "lr_scheduler_type": transformers.SchedulerType.CONSTANT}
        exact, start = self.run(self.batch, **flat)["weights"], self.start
        how = {"kinds": self.kinds, "bf16": asked == "bf16", "mixed_precision": asked or "no"}
        made = self.run(self.batch, **flat, **how)["weights"]
        wanted = {n: (exact[n] - start[n]).flatten() for n in exact}
        came = {n: (made[n] - start[n].to(self.kinds[n]).float()).flatten() for n in exact}
        share = sum((wanted[n] @ came[n]).item() for n in exact) / sum((w @ w).item() for w in wanted.values())
        said += f"; {share:.2f} of an update arrives"
        bad = f"{said}: the rest is rounded away. Keep the weights in float32 (dtype=torch.float32) under --bf16"
        return judge(share, 0.5, said, bad, share >= 0.5)


class Checks(RunChecks):
    """What the rows show, as the model gets them."""

    @cached_property
    def rows(self) -> list[dict]:
        """The first rows, without fillers (a row of one token that asks for nothing)."""
        longest = max(self.first_rows, key=lambda row: len(row.get("input_ids", row.get("labels", []))))
        made = [self.read_row(row, longest) | {"row": number} for number, row in enumerate(self.first_rows)]
        return [row for row in made if len(row["ids"]) > 1 or row["labels"] != [-100] * len(row["labels"])]

    def read_row(self, row, longest) -> dict:
        """One row beside a long one: ids and labels without padding, where its examples start, labels of padding."""
        batch = self.collate([row, longest])
        batch = self.collate([row]) if is_packed(batch) or len(batch["labels"]) != 2 else batch
        labels, source, mask = batch["labels"][0].tolist(), batch["input_ids"][0].tolist(), batch.get("attention_mask")
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if not self.causal:
            alone = self.collate([row])
            ids = [token for token in alone["labels"][0].tolist() if token != -100]
            hidden = -100 in alone["labels"] and not self.stops() & set(ids[-1:])
            padded, source = pad in labels and pad not in self.stops(), [token for token in source if token != pad]
            return {"ids": ids, "labels": [*ids, *[-100] * hidden], "source": source, "starts": [0], "padded": padded}
        if torch.is_tensor(mask) and mask.dim() == 2:
            kept = mask[0].nonzero().flatten().tolist()
        else:  # trailing padding, without a mask
            last = max((i for i in range(len(source)) if labels[i] != -100 or source[i] != pad), default=0)
            kept = list(range(last + 1))
        positions, padded = batch.get("position_ids"), set(range(len(source))) - set(kept)
        starts = [n for n, i in enumerate(kept) if positions[0, i] == 0] if torch.is_tensor(positions) else [0]
        row = {"ids": [source[i] for i in kept], "labels": [labels[i] for i in kept], "source": [], "starts": starts}
        return row | {"padded": any(labels[i] != -100 for i in padded)}

    def stops(self, generating: bool = False) -> set[int]:
        """Tokens that end a text: the tokenizer's EOS and those at which generate() ends, or only the latter."""
        ends = getattr(self.model.generation_config, "eos_token_id", None) if self.model.can_generate() else None
        ends = [*(ends if isinstance(ends, list) else [ends])]
        ends += [] if generating else [getattr(self.tokenizer, "eos_token_id", None)]
        return {token for token in ends if token is not None}

    @cached_property
    def are_blocks(self) -> bool:
        """Whether rows are one text cut into pieces of one length, with stops inside and nothing that parts them."""
        rows, stops = self.rows, self.stops()
        same = len(rows) > 2 and Counter(len(r["ids"]) for r in rows).most_common(1)[0][1] >= 0.8 * len(rows)
        inside = sum(bool(stops & set(r["ids"][1:-3])) for r in rows)
        return self.causal and same and inside > len(rows) / 2 and all(len(r["starts"]) == 1 for r in rows)

    def labels(self) -> dict:
        rows, pieces = self.rows, []
        bad = [*self.find_bad_labels(), *self.find_bad_stops()]
        asked = sum(label != -100 for row in rows for label in row["labels"])
        share = asked / max(1, sum(len(row["labels"]) for row in rows))
        said = f"{share:.0%} of the tokens of {len(rows)} rows are trained on"
        said += ", each row ends with a stop that is" * (not bad and not self.are_blocks)
        for row in rows[:VIEWED] if hasattr(self.tokenizer, "decode") else []:
            ids, flags = row["source"][:200] + row["ids"][:400], [label != -100 for label in row["labels"][:400]]
            texts = [self.tokenizer.decode([i]) if i >= 0 else "∅" for i in ids]
            pieces.append(list(zip(texts, [False] * len(row["source"][:200]) + flags, strict=True)))
        return judge(len(bad), 0, said, "; ".join([*bad, said]), views=pieces)

    def find_bad_labels(self) -> list[str]:
        """Rows without labels, padding with labels, labels that are not their tokens, prompts cut or missing."""
        rows, shift = self.rows, int(self.causal)
        said = {
            "rows {} ask for nothing: leave them out": lambda r: set(r["labels"][shift:]) <= {-100},
            "padding is trained on in rows {}: give it the label -100": lambda r: r["padded"],
        }
        if self.causal:
            begins, count = Counter(r["ids"][0] for r in rows).most_common(1)[0]
            longest, prompted = max(len(r["ids"]) for r in rows), sum(r["labels"][1] == -100 for r in rows)
            cut = "rows {} are as long as any and do not begin as the others: was the question cut?"
            bare = "rows {} have no prompt, or train on it, where the others do not: was the question cut?"
            said |= {
                "labels of rows {} are not their tokens: the model shifts them itself": lambda r: any(
                    b not in (-100, a) for a, b in zip(r["ids"], r["labels"], strict=True)
                ),
                bare: lambda r: len(rows) / 2 < prompted and r["labels"][1] != -100,
                cut: lambda r: 0.8 * len(rows) < count and r["ids"][0] != begins and len(r["ids"]) == longest,
            }
        found = {text: [r["row"] for r in rows if wrong(r)] for text, wrong in said.items()}
        return [text.format(name_rows(numbers)) for text, numbers in found.items() if numbers]

    def find_bad_stops(self) -> list[str]:
        """Examples that do not end with a stop token, or whose stop has no label."""
        rows, stops, hidden, without, count = self.rows, self.stops(), [], [], 0
        longest = max(len(row["ids"]) for row in rows)
        for row in rows:
            bounds = [*row["starts"], len(row["ids"])]
            if self.are_blocks:
                pairs = list(zip(row["ids"], row["labels"], strict=True))[1:]
                count += any(token in stops for token, _ in pairs)
                hidden += [row["row"]] * any(token in stops and label == -100 for token, label in pairs)
                continue
            for start, end in zip(bounds, bounds[1:], strict=False):
                tail = [i for i in range(max(start, end - 3), end) if row["ids"][i] in stops]
                cut = len(row["starts"]) == 1 and len(row["ids"]) == longest and len(rows) > 1
                count += not cut or bool(tail)
                masked = row["labels"][tail[-1]] == -100 if tail else not self.causal and -100 in row["labels"]
                if masked or not (tail or cut):
                    (hidden if masked else without).append(row["row"])
        bad = f"the stop token has no label in {len(hidden)} of {count} examples (rows {name_rows(hidden)}): "
        bad += "pad_token is eos_token, perhaps, and the collator masks padding: mask it by its position"
        more = f"{len(without)} of {count} examples (rows {name_rows(without)}) end without a stop token"
        return [bad] * bool(hidden) + [more] * (len(without) > count / 2)

    def prompts(self) -> dict:
        """Whether the stop that is learned ends a generation, and rows begin as the generation prompt does."""
        rows, tokenizer = self.rows, self.tokenizer
        if tokenizer is None:
            raise NotTried("the trainer has no tokenizer")
        learned = Counter(t for r in rows for t in [next((t for t in r["labels"][::-1] if t in self.stops()), None)])
        ends, good, other = self.stops(generating=True), [], []
        stops = [token for token, _ in learned.most_common() if token is not None]
        if not stops:
            return judge(0, None, "", "no row ends with a token at which generate() ends: it never stops", False)
        said = f"{tokenizer.decode(stops[:1])!r} is trained on and ends a generation"
        if not set(stops) <= ends:
            bad = f"the stop that is trained on, {tokenizer.decode(stops[:1])!r}, is not in "
            return judge(0, None, "", f"{bad}generation_config.eos_token_id {sorted(ends)}", False)
        bos = tokenizer.bos_token_id if self.causal else None
        double = [r["row"] for r in rows if bos is not None and r["ids"][:2] == [bos, bos]]
        if double:
            return judge(len(double), 0, "", f"rows {name_rows(double)} begin with two BOS tokens")
        if not self.causal or not getattr(tokenizer, "chat_template", None):
            return judge(0, 0, f"{said}; there is no chat template to compare with")
        chat = [{"role": "user", "content": "\U000f0000"}]
        after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).partition(
            "\U000f0000"
        )[2]
        for row in rows:
            first = next((i for i, label in enumerate(row["labels"]) if label != -100), 0)
            prompt, whole = tokenizer.decode(row["ids"][:first]), tokenizer.decode(row["ids"])
            good += [row["row"]] * (prompt.endswith(after) or first <= 1 and after in whole)
            other += [row["row"]] * (
                first > 1 and not prompt.endswith(after) and bool(after.strip()) and after.strip() in whole
            )
        if len(rows) - len(good) - len(other) > len(good):
            raise NotTried("the rows are not written by the chat template: generate with the script's own prompt")
        bad = f"rows {name_rows(other)}: what stands before the answer is not the generation prompt's {after[-40:]!r}"
        return judge(len(other), 0, f"{len(good)} rows begin as the generation prompt does; {said}", bad)

    def packing(self) -> dict:
        """Each example in its row (causal) or batch and alone."""
        rows, collate = self.rows, self.collate
        if not self.causal:
            if not is_packed(collate(self.first_rows[:3])):
                raise NotTried("no row holds several examples")
            worst = self.compare_batch(collate, self.first_rows[:3])
            return judge(
                worst, LOGITS, f"3 examples packed and alone: losses off by {worst:.1e}", "packed examples leak"
            )
        blocks, stops, worst, where = self.are_blocks, self.stops(), 0.0, ""
        inner = {r["row"]: [i + 1 for i, t in enumerate(r["ids"][:-1]) if t in stops and i] for r in rows if blocks}
        packed = [r | {"starts": [0, *inner[r["row"]]] if blocks else r["starts"]} for r in rows]
        packed = [row for row in packed if len(row["starts"]) > 1]
        if not packed:
            raise NotTried("no row holds several examples")
        for row in packed[:2]:
            logits, bounds = (
                self.logits(collate([self.first_rows[row["row"]]]))[0],
                [*row["starts"], len(row["ids"])],
            )
            for start, end in list(zip(bounds, bounds[1:], strict=False))[:4]:
                ids = torch.tensor([row["ids"][start:end]])
                alone = self.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})[0]
                off = ((logits[start:end] - alone).abs().max() / alone.abs().max()).item() if end - start > 1 else 0
                worst, where = max((worst, where), (off, f"row {row['row']}, the example from token {start}"))
        if SEEN["flash"] and worst > LOGITS:
            raise NotTried("FlashAttention, which would keep packed examples apart, does not run on a CPU")
        bad = (
            f"packed examples see each other: logits off by {worst:.1e} of the largest in {where}, by those before it"
        )
        bad += "; rows are one text cut into blocks, and nothing says where an example begins" * blocks
        return judge(worst, LOGITS, f"examples in their row and alone: logits off by {worst:.1e} of the largest", bad)

    def compare_batch(self, collate, rows: list) -> float:
        """Largest difference of a token's loss in a batch of rows from its loss in a row alone, over the largest."""
        losses = []
        for batch in [collate(rows), *(collate([row]) for row in rows)]:
            logits, labels = self.logits(batch), batch["labels"]
            logits, labels = (logits[:, :-1], labels[:, 1:]) if self.causal else (logits, labels)
            keep = labels != -100
            losses.append(torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none"))
        together, alone = losses[0].sort().values, torch.cat(losses[1:]).sort().values
        if len(alone) != len(together):
            raise NotTried(f"rows together ask for {len(together)} tokens, alone for {len(alone)}: see labels")
        return ((alone - together).abs().max() / alone.abs().max()).item()

    def padding_side(self) -> dict:
        rows, collate = [row for row in self.first_rows if len(row.get("input_ids", [])) > 1], self.collate
        if len(rows) < 2:
            raise NotTried("the rows have no input_ids of their own")
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        chosen = [rows[0], rows[-1]]
        collate = self.trainer.data_collator if is_packed(collate(chosen)) else collate
        mask = collate(chosen).get("attention_mask")
        if is_packed(collate(chosen)) or not torch.is_tensor(mask) or mask.dim() != 2 or bool(mask.all()):
            raise NotTried("two rows of different length are not padded in a batch")
        side, worst = "left" if (mask[:, 0] == 0).any() else "right", self.compare_batch(collate, chosen)
        bad = f"padding on the {side} changes a row's losses by {worst:.1e} of the largest: give position_ids"
        return judge(worst, LOGITS, f"on the {side}; a row's losses off by {worst:.1e} beside a longer one", bad)

    def position_ids(self) -> dict:
        positions = self.collate(self.first_rows[:1]).get("position_ids")
        if not torch.is_tensor(positions):
            made = self.results.get("padding side")
            if not isinstance(made, dict):
                raise NotTried(f"the model counts positions itself; padding side: {made}")
            return made | {"detail": f"the model counts positions itself; as padding side: {made['detail']}"}
        steps = positions[0].diff()
        bad = int(((steps != 1) & (positions[0][1:] != 0)).sum()) + int(positions[0][0] != 0)
        return judge(
            bad, 0, "position_ids begin at 0 with each example and count up", f"position_ids jump {bad} times"
        )


REFERENCES = {"base": lambda stage: stage.base, "optimizer": Checks.prepare_optimizer, "whole": Checks.prepare_resume}
REFERENCES["evaluation"] = lambda stage: stage.evaluated if stage.trainer.eval_dataset is not None else None
