# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Packed batches and the loss without logits are the plain batch and the plain loss, in values and gradients."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, MT5Config, T5Config, UMT5Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cpu_dropout
import fast_batches

START, PAD = 0, 0
T5S = [T5Config, MT5Config, UMT5Config]


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Token rows of very uneven length; no special tokens in between."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        source = [dice.randint(5, 90) for _ in range(min(60, int(dice.lognormvariate(2.5, 0.8)) + 1))]
        target = [dice.randint(5, 90) for _ in range(dice.randint(1, 12))] + [1]
        rows.append({"input_ids": source, "attention_mask": [1] * len(source), "labels": target})
    return rows


def pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def pad_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """What the stock collator makes of them."""
    batch = {"input_ids": pad([r["input_ids"] for r in rows], PAD), "labels": pad([r["labels"] for r in rows], -100)}
    return batch | {"attention_mask": pad([r["attention_mask"] for r in rows], 0)}


def make_t5(config_class, attention: str = "sdpa", dropout: float = 0.0):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = config_class(**sizes, dropout_rate=dropout, decoder_start_token_id=START, pad_token_id=PAD)
    config._attn_implementation = attention
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    for block in (*model.encoder.block, *model.decoder.block):  # else the bias is the same at every distance
        if (attention := block.layer[0].SelfAttention).has_relative_attention_bias:
            torch.nn.init.normal_(attention.relative_attention_bias.weight)
    return model


def make_causal(model_type: str, attention: str = "sdpa", **changes):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The plain loss: summed cross-entropy in fp32."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


class TargetCollator:
    """What PackingCollator takes of a DataCollatorForSeq2Seq: its padding, and the decoder's input."""

    def __init__(self, pad_id: int = PAD, start: int = START, multiple: int | None = None):
        self.start, self.pad_to_multiple_of = start, multiple
        self.tokenizer = SimpleNamespace(pad_token_id=pad_id)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = pad([[self.start, *row["labels"][:-1]] for row in rows], self.tokenizer.pad_token_id)
        return {"decoder_input_ids": ids.masked_fill(ids == -100, self.tokenizer.pad_token_id)}


def pack_seq2seq(model, multiple: int | None = None) -> fast_batches.PackingCollator:
    return fast_batches.pack_seq2seq(model, [], TargetCollator(multiple=multiple))[0]


def compute(model, batch: dict, fused=None) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over tokens, and the gradients; by a FusedLoss, or from the logits."""
    model.zero_grad()
    labels = batch["labels"]
    if fused is None:
        loss = token_loss_sum(model(**batch).logits, labels)
    else:
        with fused.labelled(labels):
            outputs = model(**{k: v for k, v in batch.items() if k != "labels"} | add_starts(model, batch))
            loss = fused(outputs, labels, num_items_in_batch=1)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def add_starts(model, batch: dict) -> dict:
    """decoder_input_ids of a padded batch, which the model would make from the labels."""
    if "decoder_input_ids" in batch or not model.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=1e-3), name


# ------------------------------------------------------------------------------------ encoder-decoders, packed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config_class", T5S)
def test_a_packed_batch_has_the_loss_and_the_gradients_of_the_padded_one(config_class, attention):
    rows = make_rows(12) + [{"input_ids": [1], "attention_mask": [1], "labels": [-100]}]  # a filler row, too
    model = make_t5(config_class, attention)
    expected_loss, expected = compute(model, pad_batch(rows))
    packed = pack_seq2seq(model, 8)(rows)
    assert len(packed["input_ids"]) < len(rows) and packed["input_ids"].shape[1] % 8 == 0
    loss, gradients = compute(model, packed)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)
    padded_again, _ = compute(model, pad_batch(rows))  # plain masks pass the hooks as they are
    assert padded_again == expected_loss
    fused = fast_batches.fuse_loss(model)
    for batch in (packed, pad_batch(rows)):
        loss, gradients = compute(model, batch, fused)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_same_gradients(gradients, expected)


def test_a_model_that_is_not_known_to_bear_packing_is_left_as_it_is():
    config = transformers.LEDConfig(vocab_size=96, d_model=16, encoder_layers=1, decoder_layers=1)
    model = transformers.LEDForConditionalGeneration(config)
    before = [type(module) for module in model.modules()]
    cpu_dropout.speed_up_cpu(model)
    assert pack_seq2seq(model) is None and fast_batches.fuse_loss(model) is None
    assert [type(module) for module in model.modules()] == before and model.config._attn_implementation == "eager"
    assert not model.get_encoder()._forward_pre_hooks and not model.get_decoder()._forward_pre_hooks


def test_without_the_hooks_the_examples_of_a_row_would_see_each_other():
    rows, model = make_rows(12), make_t5(T5Config, "sdpa")
    expected, _ = compute(model, pad_batch(rows))
    packed = fast_batches.PackingCollator(TargetCollator())(rows)
    for name in ("attention_mask", "decoder_attention_mask"):
        packed[name] = packed[name].ne(0).long()
    assert compute(model, packed)[0] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("start, pad_id", [(0, 0), (0, 3), (5, 91)])
def test_every_example_is_packed_once_with_its_start_token_and_its_number(start, pad_id):
    rows = make_rows(9, seed=4)
    packed = fast_batches.PackingCollator(TargetCollator(pad_id, start))(rows)
    assert packed.pop("use_cache") is False
    found = []
    for ids, numbers, starts, places, labels in zip(*packed.values(), strict=True):
        for number in range(1, int(numbers.max()) + 1):
            source, target = ids[numbers == number].tolist(), labels[places == number].tolist()
            assert starts[places == number].tolist() == [start, *target[:-1]]
            found.append((source, target))
        assert (ids[numbers == 0] == pad_id).all() and (labels[places == 0] == -100).all()
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)


def test_the_decoder_reads_padding_where_a_label_inside_a_target_is_none():
    row = {"input_ids": [5, 6, 1], "labels": [7, -100, 2, 1]}
    packed = fast_batches.PackingCollator(TargetCollator(3, 0))([row])
    assert packed["decoder_input_ids"].tolist() == [[0, 7, 3, 2]]


@pytest.mark.parametrize("count", [16, 32, 64])
def test_at_least_95_percent_of_the_source_positions_are_real(count):
    dice = np.random.default_rng(0)
    real = computed = targets = target_positions = 0
    for _ in range(20):
        sizes = np.stack([dice.lognormal(3.9, 0.6, count).clip(4, 180), dice.integers(3, 16, count)], axis=1).astype(
            int
        )
        rows = fast_batches.pack_examples(sizes)
        assert sorted(i for row in rows for i in row) == list(range(count))
        sums = np.array([sizes[row].sum(axis=0) for row in rows])
        real, computed = real + sums[:, 0].sum(), computed + len(rows) * sums[:, 0].max()
        targets, target_positions = targets + sums[:, 1].sum(), target_positions + len(rows) * sums[:, 1].max()
    assert real / computed >= 0.95 and targets / target_positions >= 0.9


@pytest.mark.parametrize("sizes", [[(5, 1)], [(5, 1), (900, 3)], [(7, 2)] * 6])
def test_odd_batches_are_packed_too(sizes):
    rows = fast_batches.pack_examples(np.array(sizes))
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))


# ------------------------------------------------------------------------------------------ dropout on the CPU


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_dropout_drops_a_share_of_p_scales_the_rest_and_its_gradient_alike(p, dtype):
    torch.manual_seed(0)
    values = torch.ones(100_001, dtype=dtype, requires_grad=True)
    dropped = cpu_dropout.drop_on_cpu(values, p)
    (gradient,) = torch.autograd.grad(dropped.sum(), values)
    assert dropped.dtype == dtype and torch.equal(dropped, gradient)  # of ones
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 1e5) ** 0.5)
    assert dropped[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-2)
    for step in (1, 2, 3, 4, 7):  # neighbours come from one number
        assert (kept[step:] & kept[:-step]).double().mean().item() == pytest.approx((1 - p) ** 2, abs=0.01)


def test_the_cpus_dropout_follows_the_seed_and_does_nothing_in_evaluation():
    values = torch.randn(3, 5)
    torch.manual_seed(1)
    first, second = cpu_dropout.drop_on_cpu(values, 0.5), cpu_dropout.drop_on_cpu(values, 0.5)
    torch.manual_seed(1)
    assert torch.equal(cpu_dropout.drop_on_cpu(values, 0.5), first) and not torch.equal(first, second)
    assert (
        cpu_dropout.drop_on_cpu(values, 0.5, training=False) is values
        and cpu_dropout.drop_on_cpu(values, 0.0) is values
    )
    assert cpu_dropout.drop_on_cpu(values, 1.0).abs().sum() == 0


@pytest.mark.parametrize("config_class", T5S)
def test_a_sped_up_t5_is_the_same_model_without_dropout(config_class):
    model, rows = make_t5(config_class, "eager"), make_rows(6)
    expected_loss, expected = compute(model, pad_batch(rows))
    cpu_dropout.speed_up_cpu(model)
    loss, gradients = compute(model, pad_batch(rows))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)


def test_every_dropout_of_a_sped_up_t5_is_the_cheap_one_and_the_library_keeps_its_own(monkeypatch, tmp_path):
    model, batch = make_t5(T5Config, dropout=0.5), pad_batch(make_rows(6))
    stock = torch.nn.functional.dropout
    cpu_dropout.speed_up_cpu(model)
    assert torch.nn.functional.dropout is stock and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    for name in ("dropout", "scaled_dot_product_attention"):
        monkeypatch.setattr(torch.nn.functional, name, None)  # not called any more
    drawn, draw = [], cpu_dropout.drop_on_cpu
    monkeypatch.setattr(cpu_dropout, "drop_on_cpu", lambda *args: drawn.append(args[1]) or draw(*args))
    assert compute(model, batch)[0] != compute(model, batch)[0]
    # A layer's attention (decoder: two) and feed-forward with what follows each, and both ends of each stack.
    assert drawn == [0.5] * 2 * (2 * (2 + 2) + 2 + 2 * (2 + 2 + 2) + 2)
    model.eval()
    assert compute(model, batch)[0] == compute(model, batch)[0]
    model.save_pretrained(tmp_path)
    assert "eager_on_cpu" not in (tmp_path / "config.json").read_text()


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("piece", [3, 1024])
def test_the_fused_loss_has_the_value_and_gradients_of_the_plain_one(smoothing, piece, monkeypatch):
    monkeypatch.setattr(fast_batches, "LOSS_PIECE", piece)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(4, 7, 16, requires_grad=True)
    labels = torch.randint(0, 50, (4, 7))
    labels[1, 3:] = -100
    plain = token_loss_sum(head(hidden), labels, smoothing) / 25
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    fused_loss = fast_batches.FusedLoss(head, smoothing)
    assert head(hidden).shape == (4, 7, 50)  # without labels it is the layer it was
    with fused_loss.labelled(labels):
        outputs = SimpleNamespace(logits=head(hidden))
        fused, over_labels = fused_loss(outputs, labels, 25), fused_loss(outputs, labels)
    assert head(hidden).shape == (4, 7, 50)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)
    assert over_labels.item() == pytest.approx(plain.item() * 25 / labels.ne(-100).sum().item(), rel=1e-6)
    for found, gradient in zip(torch.autograd.grad(fused, [hidden, head.weight]), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


def test_it_works_under_autocast_in_bf16_with_a_frozen_layer_and_where_nothing_is_asked():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(4, 7, 16, requires_grad=True)
    labels = torch.randint(0, 50, (4, 7))
    plain = token_loss_sum(head(hidden), labels)
    expected = torch.autograd.grad(plain, hidden)[0]
    head.weight.requires_grad_(False)
    fused_loss = fast_batches.FusedLoss(head)
    with fused_loss.labelled(labels), torch.autocast("cpu", torch.bfloat16):
        fused = head(hidden)
    assert fused.dtype == torch.float32 and fused.item() == pytest.approx(plain.item(), rel=1e-2)
    assert (torch.autograd.grad(fused, hidden)[0] - expected).norm() < 0.02 * expected.norm()
    with fused_loss.labelled(torch.full((4, 7), -100)):
        nothing = head(hidden)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, hidden)[0].eq(0).all()


def test_after_an_error_the_layer_makes_logits_again():
    head, hidden = torch.nn.Linear(4, 5, bias=False), torch.randn(1, 2, 4)
    fused_loss = fast_batches.FusedLoss(head)
    with pytest.raises(RuntimeError, match="in the model"), fused_loss.labelled(torch.tensor([[1, 2]])):
        raise RuntimeError("in the model")
    assert head(hidden).shape == (1, 2, 5)


def test_a_layer_that_is_more_than_a_matrix_keeps_its_logits():
    for layer in (torch.nn.Linear(32, 96, bias=True), torch.nn.Sequential(torch.nn.Linear(32, 96, bias=False))):
        model = make_causal("llama")
        model.set_output_embeddings(layer)
        assert fast_batches.fuse_loss(model, shift=True) is None
    assert fast_batches.fuse_loss(make_causal("gemma2", "eager")) is None  # caps its logits


@pytest.mark.parametrize("model_type", fast_batches.FUSABLE)
def test_every_causal_model_that_is_fused_has_the_loss_of_its_logits(model_type):
    model = make_causal(model_type)
    ids = torch.randint(5, 90, (3, 11))
    labels = ids.clone()
    labels[0, :6] = -100
    expected = token_loss_sum(model(input_ids=ids).logits, shift_labels(labels)).item()
    fused_loss = fast_batches.fuse_loss(model, shift=True)
    with fused_loss.labelled(labels):
        outputs = model(input_ids=ids)
        found, over_labels = fused_loss(outputs, labels, 1).item(), fused_loss(outputs, labels).item()
    assert found == pytest.approx(expected, rel=1e-6)
    assert over_labels == pytest.approx(expected / shift_labels(labels).ne(-100).sum().item(), rel=1e-6)


# ------------------------------------------------------------------------------------------- causal models, packed


def first_fit_decreasing(lengths, capacity) -> int:
    """Number of bins of the textbook's first fit, longest first."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fit = next((i for i, room in enumerate(rooms) if room >= length), None)
        if fit is None:
            rooms.append(capacity)
            fit = len(rooms) - 1
        rooms[fit] -= length
    return len(rooms)


def check_bins(bins, lengths, capacity) -> None:
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in chosen) <= capacity for chosen in bins)


@pytest.mark.parametrize("seed", range(40))
def test_packing_holds_every_row_once_and_needs_no_more_bins_than_first_fit_decreasing(seed):
    dice = random.Random(seed)
    capacity = dice.choice((1, 2, 10, 64, 100, 512, 1024))
    longest = dice.choice((capacity, max(1, capacity // 2), max(1, capacity // 5)))
    lengths = [min(longest, max(1, int(dice.lognormvariate(3, 1)))) for _ in range(dice.randint(0, 300))]
    bins = fast_batches.pack_lengths(lengths, capacity)
    check_bins(bins, lengths, capacity)
    assert len(bins) <= first_fit_decreasing(lengths, capacity)


def test_packing_fills_bins_to_the_last_token():
    assert fast_batches.pack_lengths([3, 7, 5, 5, 1, 9], 10) == [[5, 4], [1, 0], [2, 3]]
    assert fast_batches.pack_lengths([10, 10], 10) == [[0], [1]]
    assert fast_batches.pack_lengths([], 10) == []


def test_packing_a_hundred_thousand_rows_leaves_under_a_hundredth_empty():
    dice = random.Random(0)
    lengths = [min(1024, max(8, int(dice.lognormvariate(5, 0.8)))) for _ in range(100_000)]
    bins = fast_batches.pack_lengths(lengths, 1024)
    check_bins(bins, lengths, 1024)
    assert sum(lengths) > 0.99 * 1024 * len(bins)


def make_examples(count: int = 24, longest: int = 40):
    """A datasets.Dataset of examples of uneven length, the first third of each without labels."""
    dice, rows = random.Random(1), []
    for _ in range(count):
        ids = [dice.randint(1, 95) for _ in range(dice.randint(3, longest))]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 3) + ids[len(ids) // 3 :], "source": "?"})
    return datasets.Dataset.from_list(rows)


@dataclass
class PaddingCollator:
    """Single rows, padded as run_clm_instruct.py pads them."""

    pad_token_id: int = 0
    multiple: int = 1

    def __call__(self, rows: list[dict]) -> dict:
        batch = {"input_ids": pad([r["input_ids"] for r in rows], 0), "labels": pad([r["labels"] for r in rows], -100)}
        return batch | {"attention_mask": pad([[1] * len(r["input_ids"]) for r in rows], 0), "use_cache": False}


@pytest.mark.parametrize("use_cpu, attention", [(True, "sdpa"), (False, "sdpa"), (True, "eager")])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_packed_rows_have_the_summed_loss_and_the_gradients_of_single_rows(model_type, use_cpu, attention):
    model, examples = make_causal(model_type, attention), make_examples()
    fused = fast_batches.fuse_loss(model, shift=True)
    expected_loss, expected = compute(model, PaddingCollator()(list(examples)), fused)
    rows, collator, check = fast_batches.pack_causal(model, examples, 64, PaddingCollator(0, 8), use_cpu)
    packed = collator([rows[i] for i in range(len(rows))])
    assert packed["input_ids"].shape[1] == 64 and len(rows) < len(examples) / 1.5
    loss, gradients = compute(model, packed, fused)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)
    assert compute(model, PaddingCollator()(list(examples)), fused)[0] == pytest.approx(expected_loss, rel=1e-6)
    assert check.measure(model, torch.device("cpu")) < 1e-5


def test_packed_rows_hold_every_example_whole_and_say_how_full_they_are():
    examples = make_examples()
    rows = fast_batches.PackedRows(examples, 50)
    found = []
    for row, chosen in zip((rows[i] for i in range(len(rows))), rows.bins, strict=True):
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0] + [len(row["input_ids"])]
        assert len(starts) == len(chosen) + 1 and starts[-1] <= 50
        for start, end in zip(starts, starts[1:], strict=False):
            assert row["position_ids"][start:end] == list(range(end - start))
            found.append((row["input_ids"][start:end], row["labels"][start:end]))
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in examples)
    tokens = sum(map(len, examples["input_ids"]))
    assert rows.tokens == tokens
    assert str(rows) == f"24 examples in {len(rows)} rows of 50, {tokens / len(rows) / 50:.1%} full"


def test_sdpa_goes_by_example_on_the_cpu_alone_under_a_name_of_its_own(tmp_path):
    def choose(use_cpu, attention="sdpa", model_type="llama"):
        model = make_causal(model_type, attention)
        _, collator, _ = fast_batches.pack_causal(model, make_examples(), 64, PaddingCollator(0, 8), use_cpu)
        return model, collator

    model, collator = choose(use_cpu=True)
    assert model.config._attn_implementation == "sdpa_by_example" and collator.by_example
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    model.save_pretrained(tmp_path)
    assert "sdpa_by_example" not in (tmp_path / "config.json").read_text()
    for others in (
        {"use_cpu": False},
        {"use_cpu": True, "attention": "eager"},
        {"use_cpu": True, "model_type": "gpt2"},
    ):
        model, collator = choose(**others)
        assert model.config._attn_implementation == others.get("attention", "sdpa") and not collator.by_example
    model = make_causal("llama")
    model.config._attn_implementation_internal = "flash_attention_2"  # not installed here
    _, collator, _ = fast_batches.pack_causal(model, make_examples(), 64, PaddingCollator(0, 8), use_cpu=False)
    assert (collator.flatten, collator.multiple, collator.by_example) == (True, 1, False)


@pytest.mark.parametrize("model_type", fast_batches.FUSABLE)
def test_attention_by_example_has_the_logits_and_gradients_of_the_mask(model_type, monkeypatch):
    model = make_causal(model_type).double().eval()
    _, collator, _ = fast_batches.pack_causal(model, make_examples(), 64, PaddingCollator(), use_cpu=True)
    dice = random.Random(1)
    rows = []
    for lengths in ([7, 1, 12], [20], [3, 9]):  # the last two with padding
        ids = [dice.randint(1, 49) for _ in range(sum(lengths))]
        positions = [position for length in lengths for position in range(length)]
        rows.append({"input_ids": ids, "labels": ids, "position_ids": positions})
    batch = collator(rows)
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 8, 20, 40, 43, 52, 60]
    found = run_and_differentiate(model, batch)
    seen = []
    monkeypatch.setattr(
        fast_batches,
        "sdpa_attention_forward",
        lambda *args, **kwargs: seen.append(args[4]) or sdpa_attention_forward(*args, **kwargs),
    )
    expected = run_and_differentiate(model, batch | {"cu_seq_lens_q": None})
    assert len(seen) == 2 and seen[0] is not None
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)


def run_and_differentiate(model, batch: dict) -> list[torch.Tensor]:
    """The logits where something is asked, and the gradients of their summed squares."""
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["labels"] != -100]
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def test_packing_is_refused_where_the_attention_lets_examples_see_each_other(capsys):
    model = make_causal("llama").train()
    *_, check = fast_batches.pack_causal(model, make_examples(), 64, PaddingCollator(), use_cpu=True)
    args = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, process_index=0)
    check.on_train_begin(args, None, None, model=model)
    assert "packed or alone the same logits" in capsys.readouterr().out and model.training
    # transformers 5.23 makes no block-diagonal mask while it keeps a cache, and does not say so
    sound = check.pack
    check.pack = lambda rows: sound(rows) | {"use_cache": True, "cu_seq_lens_q": None}
    with pytest.raises(fast_batches.UsageError, match="sdpa_by_example. lets packed examples see each other"):
        check.on_train_begin(args, None, None, model=model)


def test_where_no_row_holds_two_examples_there_is_nothing_to_check():
    model = make_causal("llama")
    *_, check = fast_batches.pack_causal(model, make_examples(longest=3), 3, PaddingCollator(), use_cpu=True)
    assert check.measure(model, torch.device("cpu")) == 0.0


def test_flattened_rows_hold_the_same_tokens_and_positions():
    packed = fast_batches.PackedRows(make_examples(), 64)
    filler = {"input_ids": [1], "attention_mask": [1], "labels": [-100]}  # of the trainer's last batch: no positions
    rows = [packed[0], packed[1], filler]
    flat = fast_batches.PackedRowsCollator(0, flatten=True)(rows)
    assert flat["input_ids"].shape[0] == 1 and "attention_mask" not in flat
    for name in ("input_ids", "labels"):
        assert flat[name][0].tolist() == [x for row in rows for x in row[name]]
    starts = (flat["position_ids"][0] == 0).sum().item()
    assert starts == sum(len(packed.bins[i]) for i in (0, 1)) + 1
