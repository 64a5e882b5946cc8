# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every text model of AutoModelForSeq2SeqLM: the loss of a batch however it is cut, generation, saving and loading."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import fast_batches
import guards
import run_summarization as script
from conftest import ROOT, run_warm

WIDTHS = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
WIDTHS |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(image_size=16, patch_size=8)
NO_LAYERDROP = dict(encoder_layerdrop=0.0, decoder_layerdrop=0.0)
T5 = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0)
GEMMA = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
GEMMA |= dict(head_dim=16, attention_dropout=0.0, dropout_rate=0.0, sliding_window=64)
FEW_EXPERTS = dict(num_experts=4, router_jitter_noise=0.0, expert_capacity=64)
HALVES = dict(num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=2, num_decoder_attention_heads=2)
HALVES |= dict(hidden_size=32, encoder_ffn_dim=64, decoder_ffn_dim=64, dropout=0.0, attention_dropout=0.0)
LONG = dict(max_encoder_position_embeddings=128, max_decoder_position_embeddings=128, attention_window=4)
SPARSE_STEPS = dict(encoder_sparse_step=2, decoder_sparse_step=2, moe_token_dropout=0.0)
SPARSE = dict(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
# Type: its configuration's class, and what makes it tiny.
TYPES = {
    "t5": ("T5Config", T5),
    "mt5": ("MT5Config", T5),
    "umt5": ("UMT5Config", T5),
    "longt5": ("LongT5Config", T5),
    "switch_transformers": ("SwitchTransformersConfig", T5 | FEW_EXPERTS | SPARSE),
    "t5gemma": ("T5GemmaConfig", GEMMA),
    "t5gemma2": ("T5Gemma2Config", GEMMA),
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

START_IS_END = {"decoder_start_token_id": 1}
REFUSED = {"nllb-moe": ("NllbMoeConfig", WIDTHS | NO_LAYERDROP | SPARSE_STEPS | dict(num_experts=4))}
READS_POSITIONS = [name for name in fast_batches.PACKABLE if name not in ("t5", "mt5", "umt5", "t5gemma")]


def make_model(name: str, tokenizer, **changes):
    """A tiny model of the type with random weights."""
    cls, sizes = (TYPES | REFUSED)[name]
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vocabulary, start = {"vocab_size": 400}, {"decoder_start_token_id": tokenizer.pad_token_id}
    if sizes is GEMMA:
        sizes = sizes | ids | vocabulary | {"bos_token_id": tokenizer.eos_token_id}  # it hides padding by its id
    if name == "t5gemma2":
        encoder = {"text_config": sizes, "vision_config": VISION, "mm_tokens_per_image": 4}
        encoder = transformers.T5Gemma2EncoderConfig(**encoder, image_token_index=399)
        decoder = transformers.T5Gemma2DecoderConfig(**sizes)
        config = transformers.T5Gemma2Config(
            encoder=encoder, decoder=decoder, image_token_index=399, dropout_rate=0.0, attention_dropout=0.0
        )
    elif name == "t5gemma":
        halves = [transformers.T5GemmaModuleConfig(**sizes, cross_attention_hidden_size=32) for _ in range(2)]
        config = transformers.T5GemmaConfig(
            encoder=halves[0], decoder=halves[1], **vocabulary, dropout_rate=0.0, attention_dropout=0.0
        )
    else:
        positions = {} if name == "led" or sizes is T5 else {"max_position_embeddings": 128}
        config = getattr(transformers, cls)(**{**positions, **sizes, **ids, **vocabulary, **start, **changes})
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


def measure_distance(found: dict, gradients: dict) -> float:
    """How far all gradients are from what they should be, over their norm."""
    distance = sum((found[key] - gradient).square().sum() for key, gradient in gradients.items()) ** 0.5
    return float(distance / sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5)


@pytest.mark.parametrize("name", TYPES)
def test_loss_and_gradients_are_the_same_however_the_batch_is_cut_and_the_folder_generates(name, features, tmp_path):
    tokenizer, rows = features
    model = make_model(name, tokenizer).eval()  # no dropout
    collator = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)
    whole, gradients = compute_losses(model, [collator(rows)])
    cut, other = compute_losses(model, [collator(rows[start : start + 4]) for start in range(0, 13, 4)])
    assert cut == pytest.approx(whole, rel=1e-5) and whole > 3
    assert gradients.keys() == other.keys()
    assert measure_distance(other, gradients) < 1e-3

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


def make_packed(name: str, attention: str, features, count: int = 13) -> tuple:
    """(model in training, the rows' plain collator, their packing collator, its check)."""
    tokenizer, rows = features
    # M2M100 does not count a start that is padding; its models start with </s>
    model = make_model(name, tokenizer, **START_IS_END if name == "m2m_100" else {}).train()
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    plain = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)
    packing_collator, (check,) = fast_batches.pack_seq2seq(model, rows[:count], plain)
    return model, plain, packing_collator, check


ATTENTIONS = [(name, kind) for name in fast_batches.PACKABLE for kind in ("sdpa", "eager")]
ATTENTIONS = [pair for pair in ATTENTIONS if pair not in (("t5gemma", "sdpa"), ("mvp", "sdpa"))]  # only eager (5.23)


@pytest.mark.parametrize("name, attention", ATTENTIONS)
def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(name, attention, features):
    model, plain, packing_collator, check = make_packed(name, attention, features)
    rows = [*features[1], {"input_ids": [1], "attention_mask": [1], "labels": [-100]}]  # a filler row, too
    expected, gradients = compute_losses(model, [plain(rows)])
    batch = packing_collator(rows)
    assert len(batch["input_ids"]) < len(rows) / 1.5
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape[1] > longest  # so that some example stands behind another
    loss, found = compute_losses(model, [batch])
    assert loss == pytest.approx(expected, rel=1e-5) and found.keys() == gradients.keys()
    assert measure_distance(found, gradients) < 1e-3
    assert compute_losses(model, [plain(rows)])[0] == expected  # plain masks pass as they are
    assert check.measure(model, torch.device("cpu")) < 1e-5 and model.training


def test_windows_of_t5gemma_are_kept_in_packed_rows(features):
    model, plain, packing_collator, _ = make_packed("t5gemma", "eager", features)
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.config.sliding_window = 3
        assert "sliding_attention" in stack.config.layer_types
    expected, gradients = compute_losses(model, [plain(features[1])])
    loss, found = compute_losses(model, [packing_collator(features[1])])
    assert loss == pytest.approx(expected, rel=1e-5) and measure_distance(found, gradients) < 1e-3
    for stack in (model.get_encoder(), model.get_decoder()):
        stack.config.sliding_window = 64
    assert measure_distance(compute_losses(model, [plain(features[1])])[1], gradients) > 1e-2  # they do cut


@pytest.mark.parametrize("name", fast_batches.PACKABLE)
def test_the_check_refuses_an_attention_that_mixes_examples(name, features, capsys, monkeypatch):
    model, _, packing_collator, check = make_packed(name, "eager", features)
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, process_index=0)
    check.on_train_begin(args, None, None, model=model)
    assert "packed or alone the same logits" in capsys.readouterr().out
    batch, masks = check.pack(check.rows), ("attention_mask", "decoder_attention_mask")
    positions = iter([fast_batches.count_positions(batch[key]) for key in masks])  # they do restart
    monkeypatch.setattr(fast_batches, "count_positions", lambda numbers: next(positions))
    check.pack = lambda rows: batch | {key: batch[key].clamp(max=1) for key in masks}  # one example for the masks
    with pytest.raises(fast_batches.UsageError, match="lets packed examples see each other"):
        check.on_train_begin(args, None, None, model=model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", READS_POSITIONS)
def test_the_check_refuses_a_model_whose_positions_do_not_restart(name, precision, features, monkeypatch):
    model, _, _, check = make_packed(name, "eager", features)
    args = SimpleNamespace(device=torch.device("cpu"), bf16=precision == "bf16", fp16=False, process_index=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        check.on_train_begin(args, None, None, model=model)
        count_through = lambda numbers: torch.arange(numbers.shape[1]).expand(numbers.shape)  # noqa: E731
        monkeypatch.setattr(fast_batches, "count_positions", count_through)
        with pytest.raises(fast_batches.UsageError, match="positions do not restart"):
            check.on_train_begin(args, None, None, model=model)


def test_an_m2m100_that_starts_with_padding_is_padded(features):
    model = make_model("m2m_100", features[0])
    collator = script.SummaryCollator(features[0], model=model, label_pad_token_id=-100)
    assert fast_batches.pack_seq2seq(model, features[1], collator) == (None, [])


def test_a_packed_row_may_be_longer_than_the_models_positions(features):
    model, plain, packing_collator, _ = make_packed("bart", "sdpa", features)
    packed = packing_collator.pack(features[1], [list(range(13))])
    assert packed["input_ids"].shape[1] > model.config.max_position_embeddings
    expected, _ = compute_losses(model, [plain(features[1])])
    assert compute_losses(model, [packed])[0] == pytest.approx(expected, rel=1e-5)


def test_in_bf16_the_padding_behind_packed_targets_makes_no_gradient_nan(features):
    model, _, packing_collator, _ = make_packed("bart", "sdpa", features)
    batch = packing_collator.pack(features[1][:5], [[0, 1], [2, 3, 4]])
    numbers = batch["attention_mask"][0]
    numbers[numbers == 0] = 2  # no padding among the sources, that the targets' padding could see
    assert (batch["decoder_attention_mask"][0] == 0).any()
    masks = {"attention_mask": batch["decoder_attention_mask"], "encoder_attention_mask": batch["attention_mask"]}
    masks = fast_batches.separate_examples(model.get_decoder(), (), masks)[1]
    assert all((mask == 0).any(dim=-1).all() for mask in masks.values())  # every position sees something
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = compute_losses(model, [batch])
    assert loss > 3 and all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", TYPES)
def test_a_filler_row_asks_for_nothing_of_any_model(name, features):
    tokenizer, rows = features
    model = make_model(name, tokenizer).eval()
    collator = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)
    filler = {"input_ids": [tokenizer.eos_token_id], "attention_mask": [1], "labels": [-100]}
    expected, gradients = compute_losses(model, [collator(rows[:3])])
    found, others = compute_losses(model, [collator([*rows[:3], filler])])
    assert found == pytest.approx(expected, rel=1e-5) and measure_distance(others, gradients) < 1e-3
    assert collator([filler])["labels"].tolist() == [[-100]]


def test_leds_sources_are_padded_to_its_window_and_its_targets_are_not(features):
    tokenizer, rows = features
    model = make_model("led", tokenizer)
    batch = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert longest % 4 and batch["input_ids"].shape[1] == -(-longest // 4) * 4
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    assert batch["attention_mask"].sum().item() == sum(len(row["input_ids"]) for row in rows)
    assert batch["labels"].shape[1] == max(len(row["labels"]) for row in rows)


@pytest.fixture
def two_ranks(features, work, tmp_path):
    """A run of the script on a tiny model, by two ranks or one: (the loss of each step, what it printed)."""

    def train(name: str, *words, ranks: int = 2) -> tuple[list[float], str]:
        tokenizer, out = features[0], tmp_path / f"out{ranks}"
        model = make_model(name, tokenizer)
        if "gemma" in name:
            model.generation_config.decoder_start_token_id = None
        for part in (model, tokenizer):
            part.save_pretrained(tmp_path / name)
        plain = ["--model_name_or_path", tmp_path / name, "--do_train", "--train_file", work / "train.csv"]
        plain += ["--max_source_length", "64", "--max_target_length", "12", "--num_train_epochs", "1"]
        plain += ["--logging_steps", "1", "--optim", "sgd", "--save_strategy", "no", "--output_dir", out]
        done = run_warm(ROOT / "run_summarization.py", *plain, *words, cwd=tmp_path, ranks=ranks, port=29586)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry], done.stdout

    return train


def test_led_trains_under_zero3_where_one_ranks_row_fills_the_window_and_the_others_does_not(two_ranks, features):
    assert {min(20, len(row["input_ids"])) % 4 == 0 for row in features[1]} == {True, False}
    size_a_rank = ["--max_source_length", "20", "--per_device_train_batch_size"]
    losses, _ = two_ranks("led", *size_a_rank, "1", "--deepspeed", ROOT / "ds_configs/zero3.json")
    alone, _ = two_ranks("led", *size_a_rank, "2", ranks=0)
    assert len(losses) == 45 and losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("config", [None, "zero3.json"])
def test_bart_is_packed_on_two_ranks_and_has_the_losses_of_padding(two_ranks, config):
    zero = ["--deepspeed", ROOT / "ds_configs" / config] if config else []
    losses, printed = two_ranks("bart", *zero, "--per_device_train_batch_size", "7")
    assert printed.count("packed or alone the same logits") == 1
    alone, printed = two_ranks("bart", "--packing", "false", "--per_device_train_batch_size", "14", ranks=0)
    assert "batches are padded" in printed and losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", ["mbart", "t5gemma2"])  # no start of its own; a vision tower
def test_the_last_batch_of_two_ranks_is_filled_for(name, two_ranks):
    losses, _ = two_ranks(name, "--per_device_train_batch_size", "7")
    alone, _ = two_ranks(name, "--packing", "false", "--per_device_train_batch_size", "14", ranks=0)
    assert len(losses) == 7 and losses == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name, depends", [("switch_transformers", False), ("nllb-moe", True)])
def test_a_full_expert_makes_the_loss_depend_on_the_batch_in_nllb_moe_alone(name, depends, features):
    tokenizer, rows = features
    model = make_model(name, tokenizer, expert_capacity=4).train()  # without dropout
    collator = script.SummaryCollator(tokenizer, model=model, label_pad_token_id=-100)
    whole, _ = compute_losses(model, [collator(rows)])
    cut, _ = compute_losses(model, [collator([row]) for row in rows])
    assert (abs(cut - whole) > 1e-4 * whole) == depends


@pytest.mark.parametrize("name", guards.NOT_TRAINED)
def test_a_type_that_is_not_trained_is_refused_by_its_name_with_the_reason(name, tmp_path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{name}"}}')
    args = SimpleNamespace(model_name_or_path=str(tmp_path), fp16=False)
    (problem,) = guards.find_model_problems(args)
    assert f"{name} models are not trained: {guards.NOT_TRAINED[name]}" in problem


def test_every_type_of_the_library_is_tested_or_refused():
    kinds = set(guards.known_models.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) | {"mt5"}
    assert kinds - {"encoder-decoder"} == {*TYPES, *guards.NOT_TRAINED}  # the joined pairs of test_join_models.py
    assert not set(TYPES) & set(guards.NOT_TRAINED)


def test_the_table_of_types_says_what_is_tested():
    page = (ROOT / "docs/summarization.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| yes \| (yes|no) \| yes \| yes \|$", page, re.M)
    packs = {name: "yes" if name in fast_batches.PACKABLE else "no" for name in TYPES}
    assert dict(rows) == packs
