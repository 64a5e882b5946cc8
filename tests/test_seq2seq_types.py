# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every text model of AutoModelForSeq2SeqLM: the loss of a batch however it is cut, generation, saving and loading."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import fast_batches
import guards
import run_summarization as script
from conftest import ROOT

WIDTHS = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
WIDTHS |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
NO_LAYERDROP = dict(encoder_layerdrop=0.0, decoder_layerdrop=0.0)
T5 = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0)
GEMMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
GEMMA |= dict(head_dim=16, attention_dropout=0.0, dropout_rate=0.0, sliding_window=64)
FEW_EXPERTS = dict(num_experts=4, router_jitter_noise=0.0, expert_capacity=64)
HALVES = dict(num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=2, num_decoder_attention_heads=2)
HALVES |= dict(hidden_size=32, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, attention_dropout=0.0)
LONG = dict(max_encoder_position_embeddings=128, max_decoder_position_embeddings=128, attention_window=16)
SPARSE = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
# Type: its configuration's class, and what makes it tiny.
TYPES = {
    "t5": ("T5Config", T5),
    "mt5": ("MT5Config", T5),
    "umt5": ("UMT5Config", T5),
    "longt5": ("LongT5Config", T5),
    "switch_transformers": ("SwitchTransformersConfig", T5 | FEW_EXPERTS | SPARSE),
    "t5gemma": ("T5GemmaConfig", GEMMA),
    "bart": ("BartConfig", WIDTHS),
    "mbart": ("MBartConfig", WIDTHS),
    "mvp": ("MvpConfig", WIDTHS),
    "plbart": ("PLBartConfig", WIDTHS),
    "pegasus": ("PegasusConfig", WIDTHS),
    "pegasus_x": ("PegasusXConfig", WIDTHS | dict(num_global_tokens=4, block_size=16)),
    "bigbird_pegasus": ("BigBirdPegasusConfig", WIDTHS | dict(attention_type="original_full")),
    "marian": ("MarianConfig", WIDTHS),
    "m2m_100": ("M2M100Config", WIDTHS | NO_LAYERDROP),
    "blenderbot": ("BlenderbotConfig", WIDTHS),
    "blenderbot-small": ("BlenderbotSmallConfig", WIDTHS),
    "led": ("LEDConfig", WIDTHS | LONG),
    "prophetnet": ("ProphetNetConfig", HALVES | dict(activation_dropout=0.0, disable_ngram_loss=True)),
}


def make_model(name: str, tokenizer):
    """A tiny model of the type with random weights."""
    cls, sizes = TYPES[name]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocabulary, start = {"vocab_size": 400}, {"decoder_start_token_id": tokenizer.pad_token_id}
    if name == "t5gemma":
        sizes = sizes | ids | vocabulary | {"bos_token_id": tokenizer.eos_token_id}  # it hides padding by its id
        halves = [transformers.T5GemmaModuleConfig(**sizes, cross_attention_hidden_size=32) for _ in range(2)]
        config = transformers.T5GemmaConfig(
            encoder=halves[0], decoder=halves[1], **vocabulary, dropout_rate=0.0, attention_dropout=0.0
        )
    else:
        positions = {} if name in ("led", "t5gemma") or sizes is T5 else {"max_position_embeddings": 128}
        config = getattr(transformers, cls)(**{**positions, **sizes, **ids, **vocabulary, **start})
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    data_args = SimpleNamespace(val_max_target_length=12, num_beams=None, lang=None, forced_bos_token=None)
    data_args.source_prefix = None
    training_args = SimpleNamespace(generation_max_length=None, generation_num_beams=None)
    script.set_generation_defaults(model, tokenizer, data_args, training_args)
    return model


@pytest.fixture(scope="module")
def features(work):
    """(tokenizer, 13 tokenised reviews of different lengths)."""
    tokenizer = AutoTokenizer.from_pretrained(work / "tiny-t5")
    limits = {"max_source_length": 60, "max_target_length": 12, "pad_to_max_length": False}
    rows = script.datasets.load_dataset("csv", data_files=str(work / "train.csv"), split="train")[:13]
    rows = {"source": rows["review_body"], "reference": rows["review_headline"]}
    limits["ignore_pad_token_for_loss"] = True
    columns = script.tokenize_rows(rows, tokenizer, tokenizer, "", limits)
    names = ("input_ids", "attention_mask", "labels")
    return tokenizer, [{name: columns[name][i] for name in names} for i in range(13)]


def compute_losses(model, batches: list[dict]) -> tuple[float, dict]:
    """The loss of one step over the batches, and each parameter's gradient."""
    model.zero_grad()
    items = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    losses = []
    for batch in batches:
        labels = batch.pop("labels")
        losses.append(script.compute_token_loss(model(**batch), labels, items))
        losses[-1].backward()
    return float(sum(losses)), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TYPES)
def test_loss_and_gradients_are_the_same_however_the_batch_is_cut_and_the_folder_generates(name, features, tmp_path):
    tokenizer, rows = features
    model = make_model(name, tokenizer).eval()  # no dropout
    collator = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)
    whole, gradients = compute_losses(model, [collator(rows)])
    cut, other = compute_losses(model, [collator(rows[start : start + 4]) for start in range(0, 13, 4)])
    assert cut == pytest.approx(whole, rel=1e-5) and whole > 3
    assert gradients.keys() == other.keys()
    distance = sum((other[key] - gradient).square().sum() for key, gradient in gradients.items()) ** 0.5
    norm = sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5
    assert distance < 1e-3 * norm

    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    batch = collator(rows[:2])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    texts = [m.generate(**inputs, max_length=8).tolist() for m in (model, loaded)]
    assert texts[0] == texts[1] and len(texts[0][0]) > 1


def test_the_decoder_reads_what_comes_before_each_target(features):
    tokenizer, rows = features
    for name in ("m2m_100", "blenderbot", "bart", "t5", "t5gemma", "prophetnet"):
        model = make_model(name, tokenizer)
        batch = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)(rows)
        ids, labels = batch["decoder_input_ids"], batch["labels"]
        start = model.generation_config.decoder_start_token_id
        assert (ids[:, 0] == start).all(), name
        shifted = labels[:, :-1].masked_fill(labels[:, :-1] == -100, tokenizer.pad_token_id)
        assert torch.equal(ids[:, 1:], shifted), name


def test_fsmt_is_refused_by_its_name_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "fsmt"}')
    args = SimpleNamespace(model_name_or_path=str(tmp_path), fp16=False)
    (problem,) = guards.find_model_problems(args)
    assert "FSMT models are not trained: a batch's padding changes their losses" in problem


def test_the_table_of_types_says_what_is_tested():
    page = (ROOT / "docs/summarization.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| yes \| (yes|no) \| yes \| yes \|$", page, re.M)
    packs = {name: "yes" if name in fast_batches.PACKABLE else "no" for name in TYPES}
    assert dict(rows) == packs
