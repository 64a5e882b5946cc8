# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""portable_checkpoints.py: a run goes on on other ranks and stages as if it had not moved, and no file runs code."""

import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import checkpoints
import portable_checkpoints
from conftest import ROOT, run_warm

SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]
# ranks (0: without a launcher), ZeRO stage
LAYOUTS = {
    "1 process": (0, None),
    "2 ranks": (2, None),
    "ZeRO-1 x 2": (2, 1),
    "ZeRO-2 x 2": (2, 2),
    "ZeRO-3 x 2": (2, 3),
    "ZeRO-3 x 1": (1, 3),
    "ZeRO-2 x 1": (1, 2),
    "ZeRO-2 x 4": (4, 2),
}
STEPS = 6


class Runs:
    """Runs of a tiny model in a folder, all those of a number of ranks in one process a rank."""

    def __init__(self, folder: Path, work: Path, place: Path):
        self.folder, self.waiting, self.port = folder, {}, 29700
        tiny = {"run_summarization": [work / "tiny-t5", work / "train.csv"]}
        tiny["run_clm_instruct"] = [place / "tiny-llama", place / "train.jsonl"]
        self.inputs = {s: ["--model_name_or_path", model, "--train_file", rows] for s, (model, rows) in tiny.items()}

    def add(self, name: str, layout: str, optim: str, *more, script="run_summarization", checkpoint=None) -> Path:
        """Line up a run, from a checkpoint if one is given; the folder it will have written."""
        (ranks, stage), out = LAYOUTS[layout], self.folder / name
        if checkpoint is not None:
            shutil.copytree(checkpoint, out / checkpoint.name)
            shutil.copy(checkpoint.parent / "run.json", out)
        words = [*self.inputs[script], "--do_train", "--use_cpu", "--output_dir", out, "--max_steps", STEPS]
        words += ["--save_steps", 1, "--learning_rate", 1e-3, "--warmup_steps", 2, "--logging_steps", 1]
        words += ["--weight_decay", 0.01, "--per_device_train_batch_size", 8 // max(ranks, 1), "--packing", "false"]
        words += [] if optim == "DeepSpeed's AdamW" else ["--optim", optim]
        words += ["--deepspeed", self.write_config(stage, optim)] if stage else []
        case = {"script": script, "argv": [str(word) for word in (*words, *more)]}
        self.waiting.setdefault(ranks, []).append(case)
        return out

    def write_config(self, stage: int, optim: str) -> Path:
        config = json.loads((ROOT / f"ds_configs/zero{max(stage, 2)}.json").read_text())
        config["zero_optimization"]["stage"] = stage
        if optim == "DeepSpeed's AdamW":
            offload = json.loads((ROOT / "ds_configs/zero3_offload_adamw.json").read_text())
            config |= {key: offload[key] for key in ("optimizer", "scheduler")}
        path = self.folder / f"{optim} {stage}.json"
        path.write_text(json.dumps(config))
        return path

    def run(self, check: bool = True) -> str:
        """Run what waits; all that was printed."""
        printed = ""
        for ranks, cases in self.waiting.items():
            self.port += 1
            path = self.folder / "cases.json"
            path.write_text(json.dumps(cases))
            words = {"cwd": self.folder, "ranks": ranks, "port": self.port, "check": check, "timeout": 900}
            printed += run_warm(ROOT / "tests/moves_worker.py", path, **words).stdout
        self.waiting = {}
        return printed


def read_weights(folder: Path) -> dict:
    return load_file(next(folder.glob("*model.safetensors")))


def deviation(first: Path, second: Path) -> float:
    """The largest relative difference of any one tensor of two runs' weights, in the 2-norm."""
    expected, found = read_weights(first), read_weights(second)
    names = expected.keys() & found.keys()  # DeepSpeed saves tied weights under both names
    assert len(names) > 10
    return max(((expected[n] - found[n]).norm() / expected[n].norm()).item() for n in names)


@pytest.fixture
def runs(tmp_path, work, place) -> Runs:
    return Runs(tmp_path, work, place)


# ------------------------------------------------------------------------------------------------ moves


def test_a_run_moves_from_one_process_to_zero_2_to_zero_3_and_back_as_if_it_had_stayed(runs):
    whole, gone = {}, {}
    for optim in ("adamw_torch", "adafactor"):
        whole[optim] = runs.add(f"{optim} whole", "1 process", optim)
    runs.run()
    for steps, layout in ((2, "ZeRO-2 x 2"), (3, "ZeRO-3 x 2"), (5, "1 process")):
        for optim, at_home in whole.items():
            before = gone.get(optim, at_home) / f"checkpoint-{steps}"
            gone[optim] = runs.add(f"{optim} {layout}", layout, optim, checkpoint=before)
        printed = runs.run()
        assert printed.count("; going on with") == 2, layout
        assert "checkpoint-2: no random state of rank 1: begun from --seed + step + rank" in printed or steps != 2
    for optim, at_home in whole.items():
        assert deviation(at_home, gone[optim]) < 1e-6, optim
        assert read_rates(gone[optim]) == read_rates(at_home), optim


def read_rates(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert len(rates) == STEPS and len({*rates}) > 3
    return rates


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_adapters_move_from_one_process_to_zero_2_and_back(runs, optim):
    lora = (optim, "--lora_r", "4")  # matrices alone: one of the optimizer's two groups is empty
    whole = runs.add("whole", "1 process", *lora, script="run_clm_instruct")
    runs.run()
    moved = runs.add("moved", "ZeRO-2 x 1", *lora, script="run_clm_instruct", checkpoint=whole / "checkpoint-2")
    runs.run()
    back = runs.add("back", "1 process", *lora, script="run_clm_instruct", checkpoint=moved / "checkpoint-4")
    runs.run()
    assert deviation(whole, moved) < 1e-6 and deviation(whole, back) < 1e-6


MATRIX = [("run_summarization", "adamw_torch"), ("run_summarization", "adafactor")]
MATRIX += [("run_clm_instruct", "adamw_torch"), ("run_clm_instruct", "adafactor")]
MATRIX += [("run_clm_instruct", "DeepSpeed's AdamW")]


@pytest.mark.parametrize("script, optim", [pytest.param(*case, marks=SLOW) for case in MATRIX])
def test_every_move_ends_as_if_the_run_had_stayed(runs, script, optim):
    """`pytest -m slow -s` prints the table of RESULTS.md."""
    layouts = [name for name in LAYOUTS if optim != "DeepSpeed's AdamW" or "ZeRO" in name]
    whole = {name: runs.add(name, name, optim, script=script) for name in layouts}
    runs.run()
    moved = {}
    for start, end in itertools.product(layouts, layouts):
        checkpoint = whole[start] / "checkpoint-3"
        moved[start, end] = runs.add(f"{start} to {end}", end, optim, script=script, checkpoint=checkpoint)
    runs.run()
    found = {(start, end): deviation(whole[start], folder) for (start, end), folder in moved.items()}
    print(f"\n{script} {optim}", *(f"{a:11} -> {b:11} {gap:.1e}" for (a, b), gap in found.items()), sep="\n")
    assert max(found.values()) < 1e-6


# ------------------------------------------------------------------------------------------------ without code


class Poison:
    """Unpickled as by pickle.load, it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


POISONED = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "pytorch_model.bin"]
POISONED += ["global_step3/mp_rank_00_model_states.pt"]
POISONED += ["global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt"]


@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_that_would_run_code_is_named_and_not_run(tmp_path, name, protocol):
    path = tmp_path / "checkpoint-3" / name
    path.parent.mkdir(parents=True)
    torch.save({"state": torch.ones(2)}, path)
    assert portable_checkpoints.explain_unsafe(tmp_path / "checkpoint-3") is None
    torch.save({"state": torch.ones(2), "more": Poison(tmp_path / "ran")}, path, pickle_protocol=protocol)
    why = portable_checkpoints.explain_unsafe(tmp_path / "checkpoint-3")
    assert why.startswith(f"{name} ") and why.endswith("; it is not loaded") and "\n" not in why
    assert "holds posix.mkdir, which may run code" in why or protocol == 4
    with pytest.raises(portable_checkpoints.MoveError):
        portable_checkpoints.load_safely(path, mmap=False)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the poison works


def test_a_poisoned_checkpoint_is_passed_over_for_the_older_one_or_refused_where_it_is_named(runs, tmp_path):
    out = runs.add("out", "1 process", "adafactor")
    runs.run()
    expected = read_weights(out)
    newest, older = out / "checkpoint-5", out / "checkpoint-4"
    shutil.rmtree(out / "checkpoint-6")
    (out / "complete.json").unlink()
    torch.save({"state": Poison(tmp_path / "ran")}, newest / "optimizer.pt")
    for checkpoint in (newest, older):
        torch.save(Poison(tmp_path / "ran"), checkpoint / "training_args.bin")  # nobody loads it
        checkpoints.mark_complete(checkpoint)  # as one would who means harm
    runs.add("out", "1 process", "adafactor")
    printed = runs.run()
    assert f"Passing over {newest}: optimizer.pt holds posix.mkdir, which may run code; it is not loaded." in printed
    assert f"going on from {older}" in printed and not (tmp_path / "ran").exists()
    assert all(torch.equal(weights, expected[name]) for name, weights in read_weights(out).items())
    torch.save({"state": Poison(tmp_path / "ran")}, older / "scheduler.pt")
    checkpoints.mark_complete(older)
    runs.add("other", "1 process", "adafactor", "--resume_from_checkpoint", older)
    printed = runs.run(check=False)
    said = f"error: --resume_from_checkpoint {older}: scheduler.pt holds posix.mkdir, which may run code"
    assert printed.count(said) == 1 and "Traceback" not in printed and not (tmp_path / "ran").exists()


def test_deepspeed_loads_its_files_by_this_module_and_runs_no_code(runs, tmp_path):
    out = runs.add("out", "ZeRO-2 x 1", "adamw_torch")
    runs.run()
    kept = read_weights(out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "complete.json").unlink()
    runs.add("out", "ZeRO-2 x 1", "adamw_torch")
    assert f"going on from {out}/checkpoint-5" in runs.run()
    assert all(torch.equal(weights, kept[name]) for name, weights in read_weights(out).items())
    path = next((out / "checkpoint-5").glob("global_step5/*_optim_states.pt"))
    torch.save({"optimizer_state_dict": Poison(tmp_path / "ran")}, path)
    engine = SimpleNamespace(dp_world_size=1, zero_optimization_stage=lambda: 2, checkpoint_engine=SimpleNamespace())
    engine.load_checkpoint = lambda *args, **more: engine.checkpoint_engine.load(path, map_location="cpu")
    with pytest.raises(KeyError, match=f"{path.name} holds posix.mkdir, which may run code"):
        portable_checkpoints.load_deepspeed_checkpoint(engine, str(out / "checkpoint-5"), refusal=KeyError)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_move_is_refused_in_one_sentence(runs):
    whole = runs.add("whole", "ZeRO-2 x 1", "adamw_torch")
    runs.run()
    moved = runs.add("moved", "1 process", "adafactor", checkpoint=whole / "checkpoint-3")
    (moved / "run.json").unlink()  # else the other --optim is refused by it
    printed = runs.run(check=False)
    assert printed.count(f"error: {moved}/checkpoint-3: is not of this run's model and optimizer, name another") == 1
    assert "Traceback" not in printed
    stock = transformers.Adafactor([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(portable_checkpoints.MoveError, match="put zero_adafactor.py beside the script"):
        portable_checkpoints.check_move(stock, {"a"}, ["a"])
    with pytest.raises(portable_checkpoints.MoveError, match="has other parameters than this run trains"):
        portable_checkpoints.check_move(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]), {"a"}, ["a", "b"])
