# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""model_checks.py: a model that is not what it seems is refused before anything is trained or generated."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import lora
import model_checks
from conftest import ROOT, run_warm


@pytest.fixture
def copies(work, place, tmp_path):
    """A copy of tiny-t5 or tiny-llama, with a change to its weights or its config."""

    def copy(name: str, weights=None, config=None, file="config.json"):
        folder = tmp_path / f"{name}-copy"
        shutil.copytree((work if name == "tiny-t5" else place) / name, folder)
        if weights is not None:
            save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | config))
        return folder

    return copy


AUTO = {"tiny-t5": AutoModelForSeq2SeqLM, "tiny-llama": AutoModelForCausalLM}


def refusal(name: str, folder) -> str:
    with pytest.raises(model_checks.UsageError) as caught:
        model_checks.load(AUTO[name], str(folder))
    return str(caught.value)


@pytest.mark.parametrize("name", AUTO)
def test_a_whole_model_loads_and_passes(name, copies):
    folder = copies(name)
    model, tokenizer = model_checks.load(AUTO[name], str(folder)), model_checks.load(AutoTokenizer, str(folder))
    ids = tokenizer(["The lens is great.", "I like the strap."])["input_ids"]
    model_checks.check_model(model, tokenizer, ids, SimpleNamespace(model_name_or_path=str(folder)))


def test_weights_that_the_file_lacks_are_named_and_tied_ones_are_none(copies):
    folder = copies("tiny-t5", weights=lambda w: {k: v for k, v in w.items() if not k.startswith("decoder")})
    said = refusal("tiny-t5", folder)
    assert "weights that the files lack" in said and "decoder.block.0.layer.0.SelfAttention.k.weight" in said
    assert "lm_head" not in said


@pytest.mark.parametrize("layers", [9, 1, -1])
@pytest.mark.parametrize("name, key", [("tiny-t5", "num_layers"), ("tiny-llama", "num_hidden_layers")])
def test_another_number_of_layers_is_refused(copies, name, key, layers):
    said = refusal(name, copies(name, config={key: layers}))
    assert (
        "weights that the files lack" if layers > 2 else "weights that the files have and the model has not"
    ) in said


def test_weights_of_another_shape_are_named(copies):
    said = refusal("tiny-t5", copies("tiny-t5", weights=lambda w: w | {"shared.weight": w["shared.weight"][:-3]}))
    assert "shared.weight" in said


def test_a_torn_file_is_refused(copies):
    folder = copies("tiny-t5")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot be loaded" in refusal("tiny-t5", folder)


def test_torn_generation_settings_are_refused(copies):
    folder = copies("tiny-t5")
    (folder / "generation_config.json").write_text('{"max_length": 2')
    assert "generation_config.json is not JSON" in refusal("tiny-t5", folder)


def test_a_folder_without_tokenizer_is_refused(copies):
    folder = copies("tiny-t5")
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(model_checks.UsageError, match="--tokenizer_name .*: the folder has no tokenizer"):
        model_checks.load(AutoTokenizer, str(folder), "tokenizer_name")


def check(model, tokenizer, ids) -> str:
    with pytest.raises(model_checks.UsageError) as caught:
        model_checks.check_model(model, tokenizer, ids, SimpleNamespace(model_name_or_path="here"))
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(copies, value):
    folder = copies("tiny-t5")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.block[1].layer[0].SelfAttention.q.weight[3, 2] = value
    assert "not finite numbers: encoder.block.1.layer.0.SelfAttention.q.weight" in check(model, tokenizer, [])


def test_a_tokenizer_that_does_not_know_the_data_or_is_anothers_is_refused(copies):
    folder = copies("tiny-t5")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    unknown = [tokenizer.unk_token_id]
    assert "knows 11 of 100 tokens of the data not" in check(model, tokenizer, [unknown * 11 + [5] * 89])
    for ids in (unknown * 10 + [5] * 90, unknown * 9):
        model_checks.check_model(model, tokenizer, [ids], SimpleNamespace(model_name_or_path="here"))
    model.resize_token_embeddings(4000)
    assert "4000 tokens, its tokenizer has" in check(model, tokenizer, [])


def test_generation_settings_that_could_not_be_saved_are_refused(copies):
    folder = copies("tiny-t5")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.num_beams, model.generation_config.early_stopping = 1, True
    assert "generation settings that could not be saved" in check(model, tokenizer, [])


def train(copies, work, tmp_path, folder, *flags, ranks: int = 0):
    words = ["--model_name_or_path", folder, "--do_train", "--train_file", work / "train.csv", "--max_steps", "1"]
    words += ["--max_target_length", "12", "--save_strategy", "no", "--output_dir", tmp_path / "out", *flags]
    return run_warm(ROOT / "run_summarization.py", *words, cwd=tmp_path, ranks=ranks, port=29587, check=False)


def test_settings_that_ship_with_a_model_are_kept_where_no_flag_is_given(copies, work, tmp_path):
    shipped = {"early_stopping": True, "length_penalty": 2.0, "num_beams": 4, "max_new_tokens": 3}
    folder = copies("tiny-t5", config=shipped, file="generation_config.json")
    assert train(copies, work, tmp_path, folder).returncode == 0
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (saved["num_beams"], saved["early_stopping"], saved["length_penalty"]) == (4, True, 2.0)
    assert saved["max_length"] == 12 and "max_new_tokens" not in saved  # the flag rules


def test_under_zero3_too_a_model_that_lacks_weights_is_refused_with_code_2(copies, work, tmp_path):
    folder = copies("tiny-t5", config={"num_layers": 3})
    done = train(copies, work, tmp_path, folder, "--deepspeed", ROOT / "ds_configs/zero3.json", ranks=2)
    assert done.returncode != 0 and "weights that the files lack" in done.stdout
    assert "Traceback" not in done.stdout.split("error: ")[0] and not (tmp_path / "out/model.safetensors").exists()


def test_adapters_of_added_tokens_train_their_rows_and_the_folder_loads_with_plain_peft(place, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(place / "tiny-llama"), None
    model = AutoModelForCausalLM.from_pretrained(place / "tiny-llama")
    known = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<new{i}>" for i in range(known - len(tokenizer) + 2)])
    model.resize_token_embeddings(len(tokenizer))
    settings = SimpleNamespace(lora_r=4, lora_alpha=8.0, lora_dropout=0.0, lora_target_modules=None)
    model = lora.add_adapters(model, known, settings, SimpleNamespace(gradient_checkpointing=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[known, known + 1, 7, known]])
    before = model(input_ids=ids).logits.detach()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.allclose(model(input_ids=ids).logits, before)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model.eval()
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        lora.load_adapted(str(tmp_path), tokenizer),
    ):
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_adapters_whose_base_is_absent_name_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/no/such/base"}))
    with pytest.raises(lora.UsageError, match="adapters of /no/such/base, which is needed too"):
        lora.load_adapted(str(tmp_path), None)
