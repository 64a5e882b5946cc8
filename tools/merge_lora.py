# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "peft"]
# ///
"""Merge LoRA adapters into their base model and write one plain model folder; says how far it is from the adapters.

The adapters that a run with --lora_r left in its output folder (run_clm_instruct.py --merge_lora does this itself):

    python tools/merge_lora.py --adapter_dir out/lora --output_dir out/lora/merged

Half the size, and not quite the model that was trained:

    python tools/merge_lora.py --adapter_dir out/lora --output_dir out/lora/merged16 --merge_dtype bfloat16

The sum is made in fp32 and, where another type is asked for, rounded once. In bf16 most of a small update falls below
the weights' precision (40 steps on SmolLM2-135M: three quarters of the merged weights are the base's again), so the
last line printed measures how far the folder is from the adapters.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import jinja2
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data_prep"))
from whole_files import Output, describe_command, find_folder_problems

# What the merged model is compared on.
PROMPTS = (
    "What is the capital of France?",
    "Write a short note to a colleague who is ill.",
    "Name three things that a good camera needs.",
    "Summarize: the battery is weak, but the lens is great and the case is light.",
)
COMPARED_TOKENS = 16  # tokens of each answer

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--adapter_dir", required=True, help="Folder with adapter_config.json.")
    add("--output_dir", required=True, help="Folder to make; must be absent or empty.")
    dtypes = ("float32", "bfloat16", "float16")
    add("--merge_dtype", choices=dtypes, default="float32", help="Type of the merged weights. Default: float32.")
    add("--model_name_or_path", default=None, help="The base, if not where adapter_config.json says.")
    add("--model_revision", default=None, help="Branch, tag or commit of a base on the hub. Default: the adapters'.")
    add("--cache_dir", default=None, help="Where downloads are kept.")
    add("--token", default=None, help="Hub token for private and gated models; never logged. Default: the login's.")
    add("--trust_remote_code", action="store_true", help="Run code that comes with a hub model, if you have read it.")
    return parser.parse_args(argv)


def read_adapter(folder):
    """Return what adapter_config.json says; ValueError where the folder holds no adapters."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        what = "has no adapter_config.json" if Path(folder).is_dir() else "there is no such folder"
        raise ValueError(f"--adapter_dir {folder}: {what}; give the output folder of a run with --lora_r")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind}; only LORA can be merged")
    if not any((Path(folder) / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise ValueError(f"--adapter_dir {folder}: has no adapter_model.safetensors; the run has not ended")
    return settings


def check_args(args):
    """Return (base's name, hub options, base's configuration, problems); no weights are loaded."""
    problems = find_folder_problems(Path(args.output_dir))
    try:
        settings = read_adapter(args.adapter_dir)
    except ValueError as error:
        return None, {}, None, [*problems, str(error)]
    base = args.model_name_or_path or settings.get("base_model_name_or_path")
    revision = args.model_revision or settings.get("revision") or "main"
    hub = {"cache_dir": args.cache_dir, "token": args.token, "trust_remote_code": args.trust_remote_code}
    hub["revision"] = revision
    try:
        return base, hub, AutoConfig.from_pretrained(base, **hub), problems
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        known = "--model_name_or_path" if args.model_name_or_path else f"{args.adapter_dir}: its base"
        sentence = f"{known} {base} cannot be loaded; give its folder by --model_name_or_path: {reason}"
        return base, hub, None, [*problems, sentence]


# ---------------------------------------------------------------------------------------------------------------------
# The models


def load_adapted(base, config, hub, adapter_dir, tokenizer):
    """Return the base in fp32 with its adapters, not merged."""
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32, **hub)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    if (Path(adapter_dir) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(adapter_dir)
    else:
        print(f"{adapter_dir} has no generation_config.json: the base's goes along; check its end tokens")
    return PeftModel.from_pretrained(model, adapter_dir).eval()


def encode_prompts(tokenizer):
    """Return the ids of PROMPTS, as a chat where the tokenizer has a template for one."""
    if tokenizer.chat_template:
        try:
            chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
            texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
            return [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
        except (jinja2.TemplateError, ValueError):  # a template for more than a question
            pass
    return [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]


@torch.no_grad()
def answer(model, prompts):
    """Return each prompt's greedy answer, as ids with the prompt (or the decoder's start) in front."""
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": COMPARED_TOKENS}
    return [model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings) for ids in prompts]


@torch.no_grad()
def score(model, prompts, answers):
    """Return the logits (tokens, vocabulary) of all answers' tokens, each given those before it."""
    logits = []
    for ids, whole in zip(prompts, answers, strict=True):
        if model.config.is_encoder_decoder:
            logits.append(model(input_ids=ids, decoder_input_ids=whole).logits[0, :-1])
        else:
            logits.append(model(input_ids=whole).logits[0, ids.shape[1] - 1 : -1])
    return torch.cat(logits)


def describe_distance(adapted, merged):
    """Return in words how far two models' logits are from each other. adapted, merged: (tokens, vocabulary)."""
    largest = (adapted - merged).abs().max().item()
    equal = (adapted.argmax(dim=1) == merged.argmax(dim=1)).double().mean().item()
    return f"largest logit difference {largest:.2g}, {equal:.1%} of {len(adapted)} greedy tokens equal"


# ---------------------------------------------------------------------------------------------------------------------


def merge(args, base, hub, config, output):
    """Write the merged folder; returns, in words, its distance from the adapters."""
    dtype = getattr(torch, args.merge_dtype)
    own = (Path(args.adapter_dir) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(args.adapter_dir) if own else AutoTokenizer.from_pretrained(base, **hub)
    model = load_adapted(base, config, hub, args.adapter_dir, tokenizer)
    prompts = encode_prompts(tokenizer)
    answers = answer(model, prompts)
    adapted = score(model, prompts, answers)
    model = model.merge_and_unload().to(dtype)

    def write(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    output.write(write)
    model = model.float()
    same = sum(map(torch.equal, answers, answer(model, prompts)))
    distance = describe_distance(adapted, score(model, prompts, answers))
    return f"{distance}, {same} of {len(prompts)} greedy answers of {COMPARED_TOKENS} tokens the same"


def main(argv=None):
    args = parse_args(argv)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft 0.21 asks by the old name
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base, hub, config, problems = check_args(args)
    output = Output(args.output_dir, "merge_lora", describe_command(args, args.adapter_dir, base))
    if output.is_finished():
        return 0
    if not problems:
        try:
            distance = merge(args, base, hub, config, output)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            problems.append(f"--adapter_dir {args.adapter_dir}: cannot be merged into {base}: {reason}")
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    stored = "" if config.dtype in (None, getattr(torch, args.merge_dtype)) else f"; the base is in {config.dtype}"
    print(f"base and adapters as one model: {args.output_dir}, {args.merge_dtype}{stored.replace('torch.', '')}")
    print(f"merged against adapters, in fp32 arithmetic: {distance}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
