# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "xxhash"]
# ///
"""
What lies in a training's output folder: who works in it, what the run was asked for, what is whole, what is finished.

Optional beside guards.py, which calls it. In the order in which a run meets them: find_problems, choose_checkpoint,
RunFolder, finish. Three files of ours lie in the folder: .lock, held while a run is alive; run.json, what decides the
result; and complete.json, in every checkpoint and at the end in the folder itself, written last: it lists the files
with sizes and checksums, and what it does not vouch for was cut off by a kill, or damaged.
"""

import argparse
import errno
import fcntl
import importlib.metadata
import json
import mmap
import os
import shutil
import socket
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

try:
    import portable_checkpoints
except ModuleNotFoundError:
    portable_checkpoints = None

LOCK, SETTINGS, MARKER = ".lock", "run.json", "complete.json"
LOG_FILE = "run.log"

# Flags that decide no weight: they may change from one start to the next, and take effect. The second list are those
# that decide what is evaluated and written at the end.
FREE = """
output_dir resume_from_checkpoint do_train use_cpu deepspeed local_rank debug skip_memory_metrics disable_tqdm
report_to run_name project rank_timeout cache_dir token overwrite_cache preprocessing_num_workers audit_only skip_audit
trust_remote_code include_num_input_tokens_seen validation_split_percentage torch_empty_cache_steps bf16_full_eval
fp16_full_eval per_device_eval_batch_size eval_accumulation_steps dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor
""".split()
FREE_BEGINNINGS = ("eval_", "log", "save_", "hub_", "push_", "ddp_", "trackio_")
FREE_BEGINNINGS += ("activation_checkpointing", "gradient_checkpointing")
AT_THE_END = """
do_eval do_predict validation_file test_file max_eval_samples max_predict_samples predict_with_generate num_beams
max_new_tokens val_max_target_length rouge_language generation_max_length generation_num_beams generation_config
merge_lora merge_dtype prediction_loss_only include_for_metrics batch_eval_metrics
""".split()
# What may change as well, and is said: the run goes on to the new end.
LENGTHS = ("num_train_epochs", "max_steps")
# Told in other words: as one product with the ranks.
TOLD_OTHERWISE = {"per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"}
# By a checksum of what they name, and what is said where that differs.
BY_CONTENT = {"model_name_or_path": "the model's files differ", "train_file": "the training file's content differs"}
BY_CONTENT |= {"tokenizer_name": "the tokenizer's files differ", "config_name": "the configuration differs"}
BY_CONTENT |= {"dataset_name": "the data set differs", "prompt_template": "the template differs"}

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "deepspeed", "peft")
MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt")
LARGE, PIECE = 1 << 30, 1 << 20  # of a larger file a piece of each 64th counts

open_locks = {}  # folder -> the stream whose lock this process holds


class FolderError(ValueError):
    """Why a run may not work in a folder; guards.py makes a UsageError of it."""


# ------------------------------------------------------------------------------------------------ what is whole


def hash_file(path: Path, whole: bool = True) -> str:
    """A file's 128-bit checksum (XXH3, no protection against intent); without `whole` by samples where it is large."""
    size = path.stat().st_size
    if size == 0:
        return "empty"
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        if whole or size < LARGE:
            digest.update(view)
        else:
            for start in range(0, size, size // 64):
                digest.update(view[start : start + PIECE])
        view.release()
    return digest.hexdigest()


def sum_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def list_files(folder: Path, skip=()) -> list[Path]:
    """The files in a folder and its folders, but for ours, hidden ones, and what `skip` begins names with."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    names = (LOCK, MARKER)
    return [p for p in found if not p.parts[0].startswith((".", *skip)) and p.name not in names]


def write_marker(path: Path, content: dict) -> None:
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(aside, path)


def set_modes(folder: Path, skip=()) -> None:
    """Give files of mode 0600 the one that the umask says: safetensors leaves models that others cannot read."""
    os.umask(umask := os.umask(0))
    for path in (folder / name for name in list_files(folder, skip)):
        if path.stat().st_mode & 0o777 == 0o600:
            path.chmod(0o666 & ~umask)


def mark_complete(folder: Path, skip=()) -> None:
    """Write complete.json of the files that lie in a folder."""
    set_modes(folder, skip)
    files = {str(p): [(folder / p).stat().st_size, hash_file(folder / p)] for p in list_files(folder, skip)}
    write_marker(folder / MARKER, {"files": files})


def explain_incomplete(folder: Path) -> str | None:
    """Why a folder's marker does not vouch for it, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        for name, (size, checksum) in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if hash_file(path) != checksum:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MARKER}, which is written last, is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MARKER} cannot be read ({type(error).__name__})"
    return None


def explain_fault(checkpoint: Path, ours: bool) -> str | None:
    """Why a checkpoint cannot be resumed from, or None; ours: made with a marker."""
    marked = ours or not checkpoint.is_dir() or (checkpoint / MARKER).exists()
    why = explain_incomplete(checkpoint) if marked else explain_unmarked(checkpoint)
    return why or (portable_checkpoints.explain_unsafe(checkpoint) if portable_checkpoints else None)


def explain_unmarked(folder: Path) -> str | None:
    """Why a checkpoint without a marker, of another program, cannot be resumed from, or None if it looks whole."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        for path in folder.glob("*.index.json"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            if lost := [s for s in sorted(shards) if not (folder / s).is_file()]:
                return f"{lost[0]} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return "trainer_state.json, or an index of weights, is missing or torn"
    for path in folder.rglob("*"):
        if path.suffix in (".pt", ".pth", ".bin", ".safetensors") and not is_readable(path):
            return f"{path.relative_to(folder)} is torn"
    for what, patterns in {
        "the optimizer's state": ("optimizer.pt", "optimizer.bin", "latest"),
        "the scheduler's state": ("scheduler.pt", "latest"),
        "the random state": ("rng_state*.pth",),
    }.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"{what} is missing"
    if (folder / "latest").exists():
        tag = folder / (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        ranks, states = len(list(folder.glob("rng_state*.pth"))), len(list(tag.glob("*_optim_states.pt")))
        if ranks != states or states == 0:
            return f"{states} optimizer states and {ranks} random states: not one of each for every rank"
    return None


def is_readable(path: Path) -> bool:
    """Whether a file of torch's or of safetensors is as long as it says itself."""
    if path.suffix != ".safetensors":
        return zipfile.is_zipfile(path)
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


# ------------------------------------------------------------------------------------------------ what decides


def describe_settings(model_args, data_args, training_args) -> dict:
    """What decides a run's weights, and under "at the end" what it evaluates and writes; by name, as JSON has it."""
    given = {**vars(model_args), **vars(data_args)}
    given |= {name: getattr(training_args, name) for name in training_args.__dataclass_fields__}
    apart = {*FREE, *AT_THE_END, *TOLD_OTHERWISE}
    decides = {k for k in given if k not in apart and not k.startswith(FREE_BEGINNINGS)}
    settings = {name: getattr(given[name], "value", given[name]) for name in sorted(decides)}  # of an enumeration
    settings["effective batch"] = training_args.train_batch_size * training_args.gradient_accumulation_steps
    settings["effective batch"] *= training_args.world_size
    for name in BY_CONTENT:
        settings[name] = describe_content(given.get(name))
    carved = training_args.do_eval and not given.get("validation_file") and "validation_split_percentage" in given
    settings["validation_split_percentage"] = given["validation_split_percentage"] if carved else None
    if training_args.deepspeed:
        config = training_args.deepspeed
        config = config if isinstance(config, dict) else json.loads(Path(config).read_text(encoding="utf-8"))
        settings |= {f"deepspeed {k}": config[k] for k in ("optimizer", "scheduler") if k in config}
    settings["at the end"] = {name: given[name] for name in AT_THE_END if name in given}
    for name in ("validation_file", "test_file"):
        settings["at the end"][name] = describe_content(given[name])
    return json.loads(json.dumps(settings, default=str))


def describe_content(name: str | None) -> str | None:
    """A checksum of what a flag names, where it is a file or a folder; else the name."""
    if name is None or not Path(name).exists():
        return name
    path = Path(name)
    if path.is_file():
        return hash_file(path, whole=False)
    files = [p for p in sorted(path.iterdir()) if p.suffix in MODEL_FILES + (".parquet", ".jsonl", ".csv")]
    files = [p for p in files if not p.name.startswith((".", "training_args", "trainer_state", SETTINGS, MARKER))]
    return sum_text("".join(f"{p.name} {hash_file(p, whole=False)}\n" for p in files))


def find_versions() -> dict:
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def read_settings(folder: Path) -> dict | None:
    """run.json of a folder, None where there is none, or a damaged one."""
    try:
        content = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return content if content["checksum"] == hash_settings(content) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def hash_settings(content: dict) -> str:
    return sum_text(json.dumps([content["settings"], content["versions"]], sort_keys=True))


def write_settings(folder: Path, settings: dict) -> None:
    content = {"settings": settings, "versions": find_versions()}
    write_marker(folder / SETTINGS, content | {"checksum": hash_settings(content)})


def compare_settings(old: dict, new: dict) -> list[str]:
    """The settings that decide the weights and differ, each with both values; not how long a run is."""
    names = sorted({*old, *new} - {*LENGTHS, "at the end"})
    changed = [name for name in names if old.get(name) != new.get(name)]
    return [BY_CONTENT.get(name, f"{name} was {old.get(name)!r}, is {new.get(name)!r}") for name in changed]


# ------------------------------------------------------------------------------------------------ before a run


def find_problems(args: argparse.Namespace) -> list[str]:
    """An output folder may be new, empty, or a training's own; nothing else is written into."""
    folder, named = Path(args.output_dir), f"--output_dir {args.output_dir}:"
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        return [f"{named} {nearest} is a file"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{named} {nearest} may not be written to; name another folder"]
    # runs/ holds TensorBoard's curves, run.log what libraries say: an attempt writes them from its first second on.
    held = sorted(p.name for p in folder.iterdir() if p.name not in ("runs", LOG_FILE)) if folder.exists() else []
    if args.do_train:
        ours = SETTINGS in held or any(name.startswith("checkpoint-") for name in held)
        if "trainer_state.json" in held and SETTINGS not in held and args.resume_from_checkpoint is None:
            way_out = "name another folder, or go on from it with --resume_from_checkpoint CHECKPOINT"
            return [f"{named} holds a finished run; {way_out}"]
        if [name for name in held if name != LOCK] and not ours and args.resume_from_checkpoint is None:
            found = f"holds something else ({', '.join(held[:5])}) and no checkpoint to go on from"
            return [f"{named} {found}; name another folder or empty it"]
        return []
    results = [name for name in held if name in ("all_results.json", "generated_predictions.jsonl")]
    return [f"{named} already holds {', '.join(results)}; name another folder"] if results else []


def choose_checkpoint(model_args, data_args, training_args) -> tuple[str | None, dict | None]:
    """
    (the checkpoint to go on from, or None; the results, where the folder holds this run finished, or None).

    The one that --resume_from_checkpoint names, else the newest whole one in the output folder. The first rank looks,
    all ranks get its answer. Raises FolderError where another run is at work there, or was asked for something else.
    """
    if not training_args.do_train:
        return None, None
    answer = [None, None, None]
    if training_args.process_index == 0:
        try:
            answer[:2] = inspect_folder(describe_settings(model_args, data_args, training_args), training_args)
        except FolderError as error:
            answer[2] = str(error)
    if training_args.world_size > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[2]:
        raise FolderError(answer[2])
    return answer[0], answer[1]


def inspect_folder(settings: dict, training_args) -> tuple[str | None, dict | None]:
    """What choose_checkpoint returns, on the first rank."""
    folder, named = Path(training_args.output_dir), training_args.resume_from_checkpoint
    if folder.exists():
        take_lock(folder)
    if named is not None and named.lower() not in ("true", "false"):
        named = Path(named)
        if why := explain_fault(named, ours=read_settings(named.parent) is not None):
            raise FolderError(f"--resume_from_checkpoint {named}: {why}")
        check_settings(read_settings(named.parent), settings, f"--resume_from_checkpoint {named}")
        return str(named), None
    before, finished = read_settings(folder), (folder / MARKER).exists()
    differs = before and any(before["settings"].get(name) != settings[name] for name in (*LENGTHS, "at the end"))
    if finished and (why := explain_incomplete(folder)):
        print(f"{folder}: {why}; the run is ended again from its last checkpoint.", flush=True)
    elif finished and not differs:
        check_settings(before, settings, f"--output_dir {folder}")
        print(f"{folder} holds this run, finished; more --num_train_epochs or --max_steps go on with it.", flush=True)
        return None, json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    for path in list_checkpoints(folder):
        why = explain_fault(path, ours=before is not None)
        if why is None:
            check_settings(before, settings, f"--output_dir {folder}")
            return str(path), None
        print(f"Passing over {path}: {why}.", flush=True)
    if finished:
        found = "holds a finished run and no whole checkpoint to go on from"
        raise FolderError(f"--output_dir {folder}: {found}; name another folder")
    return None, None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit() and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True)


def check_settings(before: dict | None, settings: dict, named: str) -> None:
    """Raise FolderError where a run that goes on would not be the one that began; say what else changed."""
    if before is None:
        print(f"{named}: no {SETTINGS} says what that run was asked for; it is gone on with as it is.", flush=True)
        return
    if changed := compare_settings(before["settings"], settings):
        way_out = "give the values of before, or name another --output_dir to begin anew"
        raise FolderError("\n".join([*(f"{named}: {line}" for line in changed), way_out]))
    old, new = before["versions"], find_versions()
    for name in sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
        print(f"{named}: began with {name} {old.get(name)}, goes on with {new.get(name)}", flush=True)
    for name in LENGTHS:
        if before["settings"].get(name) != settings[name]:
            print(f"{named}: --{name} was {before['settings'].get(name)}, is {settings[name]}", flush=True)


def take_lock(folder: Path) -> None:
    """Lock a folder for this process; the system gives the lock of a process that died to the next."""
    if old := open_locks.pop(str(folder.resolve()), None):
        old.close()  # of an earlier run in this process
    stream = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        raise FolderError(f"--output_dir {folder}: another run works in it ({stream.read().strip()})") from None
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    open_locks[str(folder.resolve())] = stream


# ------------------------------------------------------------------------------------------------ while it runs


def load_weights(trainer, stock, *given) -> None:
    """Load a checkpoint's weights, or the best one's; the trainer passes over those that the model calls otherwise."""
    folder, model, saved = Path(given[0] if given else trainer.state.best_model_checkpoint), trainer.model, set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as content:
            saved |= {*content.keys()}
    if trainer.is_deepspeed_enabled or not isinstance(model, PreTrainedModel) or saved <= {*model.state_dict()}:
        return stock(*given)
    # Mixtral's experts (transformers 5.23): one tensor in the model, many in the file.
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


class RunFolder(TrainerCallback):
    """
    Locks the folder, says in it what the run was asked for, and vouches for every checkpoint once it is whole.

    Has the trainer load weights of other names, too. arguments: the script's model and data arguments.
    """

    def __init__(self, trainer, arguments: tuple):
        self.folder, self.arguments, self.limit = Path(trainer.args.output_dir), arguments, None
        for name in ("_load_from_checkpoint", "_load_best_model"):
            setattr(trainer, name, partial(load_weights, trainer, getattr(trainer, name)))

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # the library keeps the checkpoint's logging_steps and the like
        args.eval_on_start &= state.global_step == 0
        # No old checkpoint goes before the new one is vouched for.
        self.limit, args.save_total_limit = args.save_total_limit, None
        if not state.is_world_process_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        take_lock(self.folder)
        ours = read_settings(self.folder) is not None
        for path in list_checkpoints(self.folder) if ours else []:
            if int(path.name.split("-")[-1]) > state.global_step:
                shutil.rmtree(path)  # cut off by a kill, or damaged: it would be written into
        for name in (MARKER, "all_results.json"):  # to the latter the library adds
            (self.folder / name).unlink(missing_ok=True)
        write_settings(self.folder, describe_settings(*self.arguments, args))

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and state.is_world_process_zero and not (self.folder / SETTINGS).exists():
            raise OSError(errno.ESTALE, "Stale file: it was removed while the run was at work", str(self.folder))

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank has written its random state
        if state.is_world_process_zero:
            mark_complete(self.folder / f"checkpoint-{state.global_step}")
            rotate_checkpoints(str(self.folder), self.limit, state.best_model_checkpoint)


def finish(folder: Path) -> None:
    """Vouch for a finished run's files, and let the folder go."""
    if read_settings(folder) is not None:
        mark_complete(folder, skip=("checkpoint-", "runs", LOG_FILE))
    else:
        set_modes(folder, skip=("checkpoint-", "runs", LOG_FILE))
    if lock := open_locks.pop(str(folder.resolve()), None):
        lock.close()
