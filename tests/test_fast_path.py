# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Packed batches and the loss without logits are the plain batch and the plain loss, in values and gradients."""

import random

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, MT5Config, T5Config, UMT5Config

import run_clm_instruct
import run_summarization as script

START, PAD = 0, 0


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


def make_t5(config_class, attention: str):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = config_class(**sizes, dropout_rate=0.0, decoder_start_token_id=START, pad_token_id=PAD)
    config._attn_implementation = attention
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    for block in (*model.encoder.block, *model.decoder.block):  # else the bias is the same at every distance
        if (attention := block.layer[0].SelfAttention).has_relative_attention_bias:
            torch.nn.init.normal_(attention.relative_attention_bias.weight)
    return model


def compute(model, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over tokens, and the gradients."""
    model.zero_grad()
    labels = batch["labels"]
    if hasattr(model.lm_head, "labels"):
        model.lm_head.labels = labels
        loss = model(**{k: v for k, v in batch.items() if k != "labels"} | add_starts(model, batch)).logits
        model.lm_head.labels = None
    else:
        loss = script.token_loss_sum(model(**batch).logits, labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def add_starts(model, batch: dict) -> dict:
    """decoder_input_ids of a padded batch, which the model would make from the labels."""
    if "decoder_input_ids" in batch:
        return {}
    return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


def assert_same_gradients(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm().clamp(min=1e-3), name


# ------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config_class", [T5Config, MT5Config, UMT5Config])
def test_a_packed_batch_has_the_loss_and_the_gradients_of_the_padded_one(config_class, attention):
    rows = make_rows(12) + [{"input_ids": [1], "attention_mask": [1], "labels": [-100]}]  # a filler row, too
    model = make_t5(config_class, attention)
    expected_loss, expected = compute(model, pad_batch(rows))
    script.keep_examples_apart(model)
    packed = script.PackingCollator(PAD, START, 8)(rows)
    assert len(packed["input_ids"]) < len(rows) and packed["input_ids"].shape[1] % 8 == 0
    loss, gradients = compute(model, packed)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(gradients, expected)
    padded_again, _ = compute(model, pad_batch(rows))  # plain masks pass the hooks as they are
    assert padded_again == expected_loss


def test_without_the_hooks_the_examples_of_a_row_would_see_each_other():
    rows, model = make_rows(12), make_t5(T5Config, "sdpa")
    expected, _ = compute(model, pad_batch(rows))
    packed = script.PackingCollator(PAD, START, None)(rows)
    for name in ("attention_mask", "decoder_attention_mask"):
        packed[name] = packed[name].ne(0).long()
    assert compute(model, packed)[0] != pytest.approx(expected, rel=1e-4)


def test_every_example_is_packed_once_with_its_start_token_and_its_number():
    rows = make_rows(9, seed=4)
    packed = script.PackingCollator(PAD, START, None)(rows)
    found = []
    for ids, numbers, starts, places, labels in zip(*packed.values(), strict=True):
        for number in range(1, int(numbers.max()) + 1):
            source, target = ids[numbers == number].tolist(), labels[places == number].tolist()
            assert starts[places == number].tolist() == [START, *target[:-1]]
            found.append((source, target))
        assert (ids[numbers == 0] == PAD).all() and (labels[places == 0] == -100).all()
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in rows)


@pytest.mark.parametrize("count", [16, 32, 64])
def test_at_least_95_percent_of_the_source_positions_are_real(count):
    dice = np.random.default_rng(0)
    real = computed = targets = target_positions = 0
    for _ in range(20):
        sizes = np.stack([dice.lognormal(3.9, 0.6, count).clip(4, 180), dice.integers(3, 16, count)], axis=1).astype(
            int
        )
        rows = script.pack_examples(sizes)
        assert sorted(i for row in rows for i in row) == list(range(count))
        sums = np.array([sizes[row].sum(axis=0) for row in rows])
        real, computed = real + sums[:, 0].sum(), computed + len(rows) * sums[:, 0].max()
        targets, target_positions = targets + sums[:, 1].sum(), target_positions + len(rows) * sums[:, 1].max()
    assert real / computed >= 0.95 and targets / target_positions >= 0.9


@pytest.mark.parametrize("sizes", [[(5, 1)], [(5, 1), (900, 3)], [(7, 2)] * 6])
def test_odd_batches_are_packed_too(sizes):
    rows = script.pack_examples(np.array(sizes))
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))


# ------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpus_dropout_drops_a_share_of_p_scales_the_rest_and_its_gradient_alike(p, dtype):
    torch.manual_seed(0)
    values = torch.ones(100_001, dtype=dtype, requires_grad=True)
    dropped = script.drop_on_cpu(values, p)
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
    first, second = script.drop_on_cpu(values, 0.5), script.drop_on_cpu(values, 0.5)
    torch.manual_seed(1)
    assert torch.equal(script.drop_on_cpu(values, 0.5), first) and not torch.equal(first, second)
    assert script.drop_on_cpu(values, 0.5, training=False) is values and script.drop_on_cpu(values, 0.0) is values
    assert script.drop_on_cpu(values, 1.0).abs().sum() == 0


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("piece", [3, 1024])
def test_the_fused_loss_has_the_value_and_gradients_of_the_plain_one(smoothing, piece, monkeypatch):
    monkeypatch.setattr(script, "LOSS_PIECE", piece)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(4, 7, 16, requires_grad=True)
    labels = torch.randint(0, 50, (4, 7))
    labels[1, 3:] = -100
    plain = script.token_loss_sum(head(hidden), labels, smoothing) / 25
    expected = torch.autograd.grad(plain, [hidden, head.weight])
    assert script.fuse_loss_into_head(head, smoothing)
    assert head(hidden).shape == (4, 7, 50)  # without labels it is the layer it was
    head.labels = labels
    fused = head(hidden) / 25
    assert fused.item() == pytest.approx(plain.item(), rel=1e-6)
    for found, gradient in zip(torch.autograd.grad(fused, [hidden, head.weight]), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


def test_it_works_under_autocast_in_bf16_with_a_frozen_layer_and_where_nothing_is_asked():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 50, bias=False), torch.randn(4, 7, 16, requires_grad=True)
    labels = torch.randint(0, 50, (4, 7))
    plain = script.token_loss_sum(head(hidden), labels)
    expected = torch.autograd.grad(plain, hidden)[0]
    head.weight.requires_grad_(False)
    script.fuse_loss_into_head(head, 0.0)
    head.labels = labels
    with torch.autocast("cpu", torch.bfloat16):
        fused = head(hidden)
    assert fused.dtype == torch.float32 and fused.item() == pytest.approx(plain.item(), rel=1e-2)
    assert (torch.autograd.grad(fused, hidden)[0] - expected).norm() < 0.02 * expected.norm()
    head.labels = torch.full((4, 7), -100)
    nothing = head(hidden)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, hidden)[0].eq(0).all()


def test_a_layer_that_is_more_than_a_matrix_keeps_its_logits():
    assert not script.fuse_loss_into_head(torch.nn.Linear(4, 5, bias=True), 0.0)
    assert not script.fuse_loss_into_head(torch.nn.Sequential(), 0.0)


@pytest.mark.parametrize("model_type", run_clm_instruct.FUSABLE)
def test_every_causal_model_that_is_fused_has_the_loss_of_its_logits(model_type):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **heads))
    ids = torch.randint(5, 90, (3, 11))
    labels = ids.clone()
    labels[0, :6] = -100
    expected = script.token_loss_sum(model(input_ids=ids).logits, run_clm_instruct.shift_labels(labels))
    head = model.get_output_embeddings()
    assert run_clm_instruct.fuse_loss_into_head(head, 0.0, run_clm_instruct.shift_labels)
    head.labels = labels
    assert model(input_ids=ids).logits.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("model_type", run_clm_instruct.FUSABLE)
def test_attention_by_example_has_the_logits_and_gradients_of_the_mask(model_type, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 50, "head_dim": 8, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    monkeypatch.setitem(run_clm_instruct.ALL_ATTENTION_FUNCTIONS, "sdpa", run_clm_instruct.attend_by_example)
    dice = random.Random(1)
    rows = []
    for lengths in ([7, 1, 12], [20], [3, 9]):  # the last two with padding
        ids = [dice.randint(1, 49) for _ in range(sum(lengths))]
        positions = [position for length in lengths for position in range(length)]
        rows.append({"input_ids": ids, "labels": ids, "position_ids": positions})
    batch = run_clm_instruct.InstructCollator(0, packed=True, by_example=True)(rows)
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 8, 20, 40, 43, 52, 60]
    found = run_and_differentiate(model, batch)
    seen = []
    masked = batch | {"cu_seq_lens_q": None}
    monkeypatch.setitem(
        run_clm_instruct.ALL_ATTENTION_FUNCTIONS,
        "sdpa",
        lambda *args, **kwargs: seen.append(args[4]) or run_clm_instruct.attend_by_example(*args, **kwargs),
    )
    expected = run_and_differentiate(model, masked)
    assert len(seen) == 2 and seen[0] is not None
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9)


def run_and_differentiate(model, batch: dict) -> list[torch.Tensor]:
    """The logits where something is asked, and the gradients of their summed squares."""
    model.zero_grad()
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["labels"] != -100]
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]
