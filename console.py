# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "datasets"]
# ///
"""
What a run says while it is at work: a line a logged step, each warning once, the libraries' rest in run.log.

Optional beside guards.py, which calls it. In the order in which a run meets them: set_log_defaults, quiet_libraries,
show_steps. What is left out of the console is kept in memory until there is an output folder to write run.log into.
"""

import datetime
import logging
import logging.handlers
import os
import re
import sys
import time
from pathlib import Path

import datasets
import torch
import transformers
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from step_figures import count_flop, count_tokens, find_peak, measure_memory

LOG_FILE = "run.log"
EVERY, LEAST_LINES = 10, 50  # a loss every so many steps, and so many a run at least
OWN_STEPS = 1 / LEAST_LINES  # the default that says so: a share of the run, as the library takes it

# Whose warnings a user can act on; of all others the console shows errors only. DeepSpeed's are said by flags' checks.
HEARD = ("transformers", "datasets", "accelerate", "peft")
# Of those heard, what is no news: special tokens that the run itself lines up, weights that are tied, and how often a
# checkpoint's run logged; what differs and matters is checkpoints.py's to say.
NOISE = "seem corrupted|new PAD/BOS/EOS tokens|missing keys in the checkpoint|tied weights mapping"
NOISE = re.compile(NOISE + "|do not match the ones in the `trainer_state")

held = logging.handlers.MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1)


class Console(logging.StreamHandler):
    """The first rank's warnings that a user can act on, each once; errors of every rank."""

    def __init__(self, rank: int):
        super().__init__(sys.stdout)
        self.rank, self.said = rank, set()

    def filter(self, record) -> bool:
        text, heard = record.getMessage(), record.name.split(".")[0] in HEARD and self.rank == 0
        if text in self.said or NOISE.search(text) or record.levelno < (logging.WARNING if heard else logging.ERROR):
            return False
        self.said.add(text)
        return True


def set_log_defaults(parser) -> None:
    """Where --logging_steps is not given: a share of the run, which show_steps() makes ten steps at most."""
    if "--logging_steps" in parser._option_string_actions:
        parser.set_defaults(logging_steps=OWN_STEPS)


def quiet_libraries(args) -> None:
    """Send what the libraries say to the log; no bars but on the first rank's terminal. args: the parsed flags."""
    if getattr(args, "logging_steps", None) == OWN_STEPS and args.eval_steps is None:
        args.eval_steps = 500  # or the library would evaluate as often as it logs
    root, rank = logging.getLogger(), int(os.environ.get("RANK", 0))
    if held in root.handlers:
        return
    console = Console(rank)
    console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("reports").setLevel(logging.INFO)  # audit and samples, for the log
    held.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    root.addHandler(held)
    root.addHandler(console)
    logging.captureWarnings(True)
    for name in ("transformers", "datasets"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # Not imported yet; it will add a handler of its own, that a filter of the logger comes before.
    logging.getLogger("DeepSpeed").addFilter(lambda record: root.handle(record) and False)
    if rank > 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def open_log(folder: Path) -> None:
    """Write what was held so far, and all from now on, into the folder's run.log."""
    if folder.is_dir():
        stream = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
        stream.setFormatter(held.formatter)
        held.setTarget(stream)
        held.flush()
        held.capacity = 1


def show_steps(trainer) -> TrainerCallback:
    """Open the log, silence the trainer's own lines; returns the callback that prints ours."""
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # the first rank may come later
    open_log(folder)
    bars = sys.stderr.isatty() and not trainer.args.disable_tqdm
    stock = (ProgressCallback, PrinterCallback)
    for callback in [c for c in trainer.callback_handler.callbacks if isinstance(c, stock)]:
        callback.on_log = lambda *args, **kwargs: None
        if not bars:
            trainer.remove_callback(callback)
    trainer.args.disable_tqdm = not bars  # reports.py's bar goes by it
    trainer.log_metrics = lambda *args: None  # tables of what a line says
    return RunLines(trainer)


class RunLines(TrainerCallback):
    """A line for each loss that is logged: accuracy (causal models), learning rate, speed, memory, time left."""

    def __init__(self, trainer):
        self.trainer, self.stock = trainer, trainer.compute_loss
        self.causal = not trainer.model.config.is_encoder_decoder
        self.sums, self.seconds, self.mark, self.worked, self.first = None, 0.0, 0.0, 0.0, 0
        trainer.compute_loss = self.count

    def count(self, model, inputs, return_outputs=False, **kwargs):
        """The trainer's compute_loss; adds to self.sums (source tokens, target tokens, right, asked), unread."""
        labels, (sources, targets) = inputs["labels"], count_tokens(inputs, self.trainer.processing_class.pad_token_id)
        loss, outputs = self.stock(model, inputs, return_outputs=True, **kwargs)
        if self.sums is not None:
            counts = [0 * sources if self.causal else sources, sources if self.causal else targets]
            self.sums += torch.stack([*counts, *self.judge(outputs, labels)]).to(self.sums)
        return (loss, outputs) if return_outputs else loss

    def judge(self, outputs, labels) -> list:
        """How many supervised tokens a causal model would have said, and how many there are."""
        none = labels.new_zeros(()), labels.new_zeros(())
        logits, labels = getattr(outputs, "logits", None), labels[:, 1:]
        if not self.causal or logits is None:
            return [*none]
        right = getattr(self.trainer.compute_loss_func, "right", none[0])  # counted where there are no logits
        if logits.dim() == 3:
            right = (logits[:, :-1].detach().argmax(dim=-1) == labels).sum()
        return [right, labels.ne(-100).sum()]

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.logging_steps == OWN_STEPS:
            state.logging_steps = max(1, min(EVERY, state.max_steps // LEAST_LINES))
        self.sums = torch.zeros(4, dtype=torch.long, device=args.device)
        half = args.bf16 or args.fp16 or model.dtype != torch.float32
        self.flop, self.peak = count_flop(model), find_peak(args.device, torch.bfloat16 if half else torch.float32)
        self.mark, self.worked, self.first = time.perf_counter(), 0.0, state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        took, self.mark = time.perf_counter() - self.mark, time.perf_counter()
        self.seconds, self.worked = self.seconds + took, self.worked + took

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()  # neither evaluation nor saving is training

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if "loss" in logs:
            self.add_figures(args, state, logs)
        if state.is_world_process_zero and (line := self.describe(args, state, logs)):
            transformers.trainer_callback.tqdm.write(line)

    def add_figures(self, args, state, logs: dict) -> None:
        """Speed and accuracy since the last line, over all ranks, into the logs that trackers and curves read."""
        if args.world_size > 1:
            torch.distributed.all_reduce(self.sums)
        sources, targets, right, asked = self.sums.tolist()
        self.sums.zero_()
        seconds, self.seconds = self.seconds or 1e-9, 0.0
        figures = {"tokens_per_second": (sources + targets) / seconds}
        figures |= {"token_accuracy": right / asked} if asked and self.causal else {}
        work = sources * self.flop[0] + targets * self.flop[1]
        self.share = work / seconds / self.peak / args.world_size
        logs |= figures
        state.log_history[-1] |= figures

    def describe(self, args, state, logs: dict) -> str:
        """The line of what was logged."""
        if "loss" in logs:
            pace = self.worked / max(state.global_step - self.first, 1)
            left = datetime.timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
            accuracy = f"  accuracy {logs['token_accuracy']:.1%}" if "token_accuracy" in logs else ""
            rate = f"  lr {logs['learning_rate']:.2e}" if "learning_rate" in logs else ""
            return (
                f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  loss {logs['loss']:.4f}"
                f"{accuracy}{rate}  {logs['tokens_per_second']:,.0f} tokens/s  MFU {self.share:.1%}  "
                f"{measure_memory(args.device):.2f} GB  {left} left"
            )
        if "train_runtime" in logs:
            took = datetime.timedelta(seconds=round(logs["train_runtime"]))
            return f"trained to step {state.global_step} in {took}: mean loss {logs['train_loss']:.4f}"
        scores = {k: v for k, v in logs.items() if isinstance(v, (int, float)) and not k.endswith("_per_second")}
        names = [k for k in scores if "_" in k and not k.endswith(("runtime", "preparation_time"))]
        said = ", ".join(f"{k.split('_', 1)[1]} {scores[k]:.4g}" for k in names)
        return f"{names[0].split('_')[0]} at step {state.global_step}: {said}" if names else ""
