# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/merge_lora.py: the merged folder is base and adapters, in the dtype asked for, and says how far it is off."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

import init_model
import merge_lora as tool
from conftest import ROOT

TEXTS = ["How do I clean a lens?", "Wipe the lens with a soft cloth.", "Name three things.", "A strap, a box, a zoom."]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def make_adapter(folder: Path, base: Path, task: str = "CAUSAL_LM", size: float = 0.05, tokens=()) -> Path:
    """Adapters on all linear layers of a base, their B drawn at random instead of zero, with the base's tokenizer."""
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSeq2SeqLM
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(tokens))
    model = auto.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type=task))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a Llama in fp32 (llama), the same rounded (llama16), a T5 (t5), and adapters of each."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "texts.txt").write_text("\n".join(TEXTS * 20))
    for name, flags in (("llama", ["--vocab_size", "384"]), ("t5", [])):
        argv = ["--architecture", name, "--train_file", folder / "texts.txt", "--output_dir", folder / name, *flags]
        init_model.main([str(part) for part in argv])
    model = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)
    model.save_pretrained(folder / "llama16")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "llama16")
    for name in ("llama", "llama16"):
        make_adapter(folder / f"{name}-lora", folder / name)
    make_adapter(folder / "t5-lora", folder / "t5", task="SEQ_2_SEQ_LM", size=0.5)
    return folder


def merge(place: Path, adapter: str, out: Path, *flags) -> int:
    argv = ["--adapter_dir", place / adapter, "--output_dir", out, *flags]
    return tool.main([str(part) for part in argv])


def compute_logits(folder: Path, auto=AutoModelForCausalLM) -> torch.Tensor:
    """A folder's logits in fp32, whether it holds a model or adapters."""
    ids = torch.arange(4, 24)[None]
    extra = {} if auto is AutoModelForCausalLM else {"decoder_input_ids": ids}
    with torch.no_grad():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=ids, **extra).logits


@pytest.mark.parametrize("name, auto", [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_the_merged_folder_is_the_adapted_model_by_itself(name, auto, place, tmp_path, capsys):
    assert merge(place, f"{name}-lora", tmp_path / "out") == 0
    base, adapted, merged = (
        compute_logits(path, auto) for path in (place / name, place / f"{name}-lora", tmp_path / "out")
    )
    assert (base - adapted).abs().max() > 0.1
    assert torch.allclose(adapted, merged, atol=1e-4)
    printed = capsys.readouterr().out
    assert f"base and adapters as one model: {tmp_path}/out, float32" in printed
    assert re.search(r"largest logit difference \d.*, 100.0% of \d+ greedy tokens equal", printed)
    assert f"{name}-lora has no generation_config.json: the base's goes along" in printed
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (place / f"{name}-lora", tmp_path / "out")]
    assert tokenizers[0](TEXTS)["input_ids"] == tokenizers[1](TEXTS)["input_ids"]


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_the_sum_is_made_in_fp32_and_rounded_once_to_the_dtype(dtype, place, tmp_path, capsys):
    """By default fp32, so that nothing is lost; what is printed is the distance that a reader of the folder finds."""
    flags = [] if dtype is None else ["--merge_dtype", dtype]
    assert merge(place, "llama16-lora", tmp_path / "out", *flags) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    wanted = getattr(torch, dtype or "float32")
    assert merged.dtype == merged.config.dtype == wanted
    base = AutoModelForCausalLM.from_pretrained(place / "llama16", dtype=torch.float32)
    summed = peft.PeftModel.from_pretrained(base, place / "llama16-lora").merge_and_unload().state_dict()
    assert all(torch.equal(value, summed[key].to(wanted)) for key, value in merged.state_dict().items())
    printed = capsys.readouterr().out
    largest = float(re.search(r"largest logit difference (\S+),", printed).group(1))
    assert largest < 1e-4 if wanted == torch.float32 else largest > 1e-4
    assert f"{tmp_path}/out, {dtype or 'float32'}" + "; the base is in bfloat16" * (dtype != "bfloat16") in printed
    assert re.search(r"([0-4]) of 4 greedy answers of 16 tokens the same", printed)


def test_the_distance_counts_logits_and_the_tokens_that_stay_the_same():
    adapted = torch.tensor([[0.0, 1.0], [3.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    told = tool.describe_distance(adapted, adapted + torch.tensor([[0, 0.5], [0, 0], [4, 0], [0, 0]]))
    assert told == "largest logit difference 4, 75.0% of 4 greedy tokens equal"


def test_template_and_generation_settings_of_the_adapters_go_along(place, tmp_path, capsys):
    folder = make_adapter(tmp_path / "lora", place / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[7, 2], pad_token_id=3).save_pretrained(folder)
    assert merge(tmp_path, "lora", tmp_path / "out") == 0 and "the base's goes along" not in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [7, 2]
    assert "user: What is the capital" in tokenizer.decode(tool.encode_prompts(tokenizer)[0][0])


def test_adapters_of_a_model_with_added_tokens_are_merged_into_as_many(place, tmp_path):
    words = [f"<word{i}>" for i in range(200)]
    folder = make_adapter(tmp_path / "lora", place / "llama", tokens=words)
    assert merge(tmp_path, "lora", tmp_path / "out") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    count = len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    # peft saves the embeddings beside the adapters where they are not the base's any more
    trained = load_file(folder / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(merged.get_input_embeddings().weight, trained) and len(trained) == count > 384


def test_the_tool_runs_by_itself_and_without_a_ranks_variables(place, tmp_path):
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "HF_HUB_OFFLINE") if name in os.environ}
    command = [sys.executable, ROOT / "tools/merge_lora.py", "--adapter_dir", place / "llama-lora"]
    command = [str(part) for part in (*command, "--output_dir", "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "greedy tokens equal" in done.stdout and (tmp_path / "out/model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ messages


def message(place: Path, adapter: str, out: Path, capsys, *flags) -> list[str]:
    """The lines of a merge that is refused with exit code 2."""
    capsys.readouterr()
    assert merge(place, adapter, out, *flags) == 2
    return capsys.readouterr().err.splitlines()


def test_no_adapter_and_a_folder_in_use_are_named_at_once_and_nothing_is_written(place, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    told = message(place, "llama", tmp_path / "full", capsys)
    why = "not empty, nothing is overwritten; empty it or name another"
    assert told[0] == f"error: --output_dir {tmp_path}/full: {why}"
    assert told[1].startswith(f"error: --adapter_dir {place}/llama: has no adapter_config.json")
    assert "there is no such folder" in message(place, "nowhere", tmp_path / "new", capsys)[0]
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]


def test_a_merge_started_again_changes_nothing_and_of_another_type_it_is_refused(place, tmp_path, capsys):
    left = tmp_path / "out/.merge_lora.unfinished/files"
    left.mkdir(parents=True)
    (left / "config.json").write_text("torn")  # by a kill
    assert merge(place, "t5-lora", tmp_path / "out") == 0 and not left.exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    assert merge(place, "t5-lora", tmp_path / "out") == 0
    assert "holds what this command makes, finished: config.json, " in capsys.readouterr().out
    assert merge(place, "t5-lora", tmp_path / "out", "--merge_dtype", "bfloat16") == 2
    assert "not empty, nothing is overwritten" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "change, said",
    [
        ({"peft_type": "IA3"}, "peft_type is IA3; only LORA can be merged"),
        ({"base_model_name_or_path": "/gone/base"}, "its base /gone/base cannot be loaded; give its folder by"),
        ({"base_model_name_or_path": None}, "its base None cannot be loaded; give its folder by"),
    ],
)
def test_what_cannot_be_merged_is_named(change, said, place, tmp_path, capsys):
    folder = make_adapter(tmp_path / "lora", place / "llama")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    told = message(tmp_path, "lora", tmp_path / "out", capsys)
    assert len(told) == 1 and said in told[0] and not (tmp_path / "out").exists()


def test_a_base_that_moved_is_given_by_a_flag_and_another_base_is_refused(place, tmp_path, capsys):
    folder = make_adapter(tmp_path / "lora", place / "llama")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/gone/base"}))
    assert merge(tmp_path, "lora", tmp_path / "out", "--model_name_or_path", place / "llama") == 0
    assert torch.allclose(compute_logits(place / "llama-lora"), compute_logits(tmp_path / "out"), atol=1e-4)
    told = message(tmp_path, "lora", tmp_path / "new", capsys, "--model_name_or_path", place / "t5")
    assert len(told) == 1 and f"lora: cannot be merged into {place}/t5" in told[0]
    assert not (tmp_path / "new").exists()
