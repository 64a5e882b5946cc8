# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""plan_run.py against figures worked out by hand, against torch's own counts, and against memory really taken."""

import json
import shlex
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, HfArgumentParser, LlamaConfig, T5Config

import deepspeed_checks
import plan_run as tool
import run_clm_instruct
import run_summarization
import zero_adafactor

LLAMA = 6_738_415_616  # parameters of Llama-2-7B
TINY = ["--model", "tiny", "--max_source_length", "16", "--max_target_length", "8"]


def parse(*flags):
    return tool.parse_args(["--model", "tiny", *map(str, flags)])


def plan_llama(kind, offload="", gpus=4, optimizer="adamw", taken=(0, 0), **changed):
    """The parts for Llama-2-7B, whose pass takes `taken` bytes: with gradients, without."""
    args = parse("--num_gpus", gpus, "--optimizer", optimizer)
    vars(args).update(changed)
    passes = {(dtype, False): taken for dtype in tool.DTYPES}
    numbers = {"parameters": LLAMA, "largest": (1000, 4096), "hidden": 4096, "factors": 1e6, "passes": passes}
    return tool.plan(("", kind, offload), numbers, args, False)


def whole(parts):
    return sum(parts[name] for name in ("weights", "master", "gradients", "state"))


# ----------------------------------------------------------------------------------------------- known values


@pytest.mark.parametrize(
    "name, parameters",
    [("llama2-7b", LLAMA), ("llama3-8b", 8_030_261_248), ("t5-small", 60_506_624), ("t5-large", 737_668_096)]
    + [("t5-11b", 11_307_321_344)],
)
def test_the_parameters_are_the_published_ones_and_nothing_is_loaded(name, parameters):
    assert sum(map(tool.math.prod, tool.list_shapes(tool.load_config(name)))) == parameters


def test_fp32_adamw_in_one_process_keeps_16_bytes_a_parameter():
    assert whole(plan_llama("autocast", gpus=1)) == 16 * LLAMA
    # ... and four processes with a copy each have DistributedDataParallel's buckets beside them.
    assert plan_llama("autocast")["buffers"] == 4 * LLAMA


def test_pure_bf16_keeps_4_bytes_a_parameter_and_2_where_it_steps_in_the_backward_pass():
    assert whole(plan_llama("pure", gpus=1, optimizer="zero_adafactor")) == 4 * LLAMA + 1e6
    assert whole(plan_llama("in_backward", gpus=1, optimizer="zero_adafactor")) == 2 * LLAMA + 1e6


@pytest.mark.parametrize("gpus", [1, 4, 64])
def test_the_zero_stages_share_what_the_paper_says(gpus):
    """Rajbhandari et al., https://arxiv.org/abs/1910.02054, figure 1: K = 12 for AdamW in mixed precision."""
    assert whole(plan_llama(1, gpus=gpus)) == pytest.approx(4 * LLAMA + 12 * LLAMA / gpus)
    assert whole(plan_llama(2, gpus=gpus)) == pytest.approx(2 * LLAMA + 14 * LLAMA / gpus)
    assert whole(plan_llama(3, gpus=gpus)) == pytest.approx(16 * LLAMA / gpus)


def test_the_optimizers_differ_in_their_state_alone():
    states = {name: plan_llama(2, optimizer=name)["state"] for name in tool.OPTIMIZERS}
    # Under ZeRO the stock Adafactor no longer factors; ZeroAdafactor keeps all factors on every rank.
    assert states == {"adamw": 8 * LLAMA / 4, "adafactor": 4 * LLAMA / 4, "zero_adafactor": 1e6}


def test_the_buffers_are_the_ones_the_ds_config_asks_for():
    assert plan_llama(2)["buffers"] == 2 * 2 * 2e8  # two buckets of bf16
    assert plan_llama(3)["buffers"] == 2 * 1e9 + 4 * 4096**2  # gathered weights, a bucket of hidden x hidden
    assert plan_llama(2, "optimizer")["buffers"] == 2 * 2 * 2e8 + 2 * 1000 * 4096  # and the largest gradient


def test_offload_moves_master_gradients_and_state_to_the_host_with_pinned_buffers_of_powers_of_two():
    share, gib = LLAMA / 4, 2**30
    parts = plan_llama(3, "optimizer")
    assert whole(parts) == 2 * share and parts["step"] == 0
    # Of each rank: master and Adam's two, fp32 gradients in sub-groups of 1e9 and 0.68e9 elements, bf16 gradients.
    steady = 12 * share + (4 + 4) * gib + 4 * gib
    assert parts["host"] == pytest.approx(4 * (steady + tool.PROCESS))
    parts = plan_llama(3, "all")
    assert whole(parts) == 0 and parts["host"] == pytest.approx(4 * (steady + 4 * gib + tool.PROCESS))
    parts = plan_llama(2, "optimizer")
    steady = 12 * share + 8 * gib + 4 * gib + 2**23  # in one piece; bf16 weights; the largest gradient, 8.2 MB
    assert whole(parts) == 2 * LLAMA and parts["host"] == pytest.approx(4 * (steady + tool.PROCESS))


def test_the_host_holds_an_fp32_copy_a_process_while_loading_and_one_in_all_under_zero_3():
    assert plan_llama(2)["host"] == pytest.approx(4 * (4 * LLAMA + tool.PROCESS))
    assert plan_llama(3)["host"] == pytest.approx(4 * LLAMA + 4 * tool.PROCESS)
    assert plan_llama("pure", optimizer="zero_adafactor")["host"] == pytest.approx(4 * (2 * LLAMA + tool.PROCESS))


def test_the_peak_is_what_stays_and_the_larger_of_backward_pass_and_step():
    small, large = plan_llama(2, taken=(0, 1e9)), plan_llama(2, taken=(0, 19e9))
    # Beside the rank's bf16 gradients a flat copy of them, and one of that in fp32; stage 1 drops the others' first.
    assert small["step"] == 6 * LLAMA / 4 and plan_llama(1)["step"] == 0
    assert plan_llama(3)["step"] == 6 * (1e9 + 1000 * 4096 / 4)  # of the largest sub-group
    assert small["gpu"] == pytest.approx((whole(small) + small["step"]) * tool.RESERVED + tool.CONTEXT)
    assert large["gpu"] == pytest.approx((whole(large) + 19e9 + 8e8) * tool.RESERVED + tool.CONTEXT)


def test_gradients_come_while_activations_go_except_in_a_further_pass():
    taken = (4 * LLAMA + 1e9, 6e9)
    assert plan_llama("autocast", gpus=1, taken=taken)["activations"] == pytest.approx(1e9)
    more = plan_llama("autocast", gpus=1, taken=taken, gradient_accumulation_steps=2)
    assert more["activations"] == 6e9


# --------------------------------------------------------------------------------------------------- counting


def test_the_meter_counts_a_linear_layer_as_by_hand():
    with FakeTensorMode(), tool.MemoryMeter() as meter:
        x, weight = torch.zeros(100, 10), torch.nn.Parameter(torch.zeros(30, 10))
        assert meter.live == 4 * (1000 + 300)
        meter.watch(torch.nn.ParameterList([weight]))
        y = torch.nn.functional.linear(x, weight).relu()  # the product is freed, its positive part is kept
        meter.mark("forward")
        assert meter.live == 4 * (1300 + 3000) and meter.marks["forward"] == 4 * (1300 + 6000)
        y.view(-1).sum().backward()
        assert meter.grads == 4 * 300
        del x, y
    assert meter.live == 4 * (300 + 300)


def test_the_fused_attention_keeps_output_and_a_sum_a_row_but_no_scores():
    with FakeTensorMode(), tool.MemoryMeter() as meter:
        query, key = (torch.zeros(2, 4, rows, 8, dtype=torch.bfloat16, requires_grad=True) for rows in (64, 32))
        before = meter.live
        result = tool.fused_attention(query, key, key)
        assert result.shape == query.shape and meter.live - before == 2 * 4 * 64 * (8 * 2 + 4)
        result.backward(torch.empty_like(result))
    assert query.grad.shape == query.shape and key.grad.shape == key.shape


@pytest.mark.parametrize("name", tool.OPTIMIZERS)
def test_the_state_counted_is_the_one_planned(name):
    shapes = [(300, 200), (4, 50, 60), (70,)]
    state, step = tool.track_optimizer(name, shapes, torch.float32)
    wanted = 8 * 72070 if name == "adamw" else 4 * (300 + 200 + 4 * 50 + 4 * 60 + 70)
    assert wanted <= state <= wanted + 4 * 3 * 2  # and a few numbers: AdamW's step, Adafactor's RMS
    assert tool.count_factors(shapes) == 4 * (300 + 200 + 4 * 50 + 4 * 60 + 70)
    assert (step == 0) == (name == "adamw") and step < 4 * 4 * 60000  # the fused AdamW has no temporaries


@pytest.mark.parametrize("name", ["tiny-llama", "t5"])
def test_the_operations_are_those_torch_counts_but_for_the_masked_half(name, tmp_path):
    llama, source, target = name == "tiny-llama", 48, 16
    config = tool.load_config("tiny")
    if llama:
        config = LlamaConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
        config.num_key_value_heads, config.vocab_size = 2, 1000
    config._attn_implementation = "eager"
    args = parse("--max_source_length", source, "--max_target_length", target, "--max_seq_length", source)
    args.per_device_train_batch_size = 1
    model = tool.build_model(config, torch.float32)
    with FlopCounterMode(display=False) as counter:
        tool.run_step(model, *tool.make_batch(config, args), False)
    masked = 12 * 64 * 2 * (source if llama else target) ** 2 / 2
    assert tool.count_flops(config, args) + masked == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_checkpointing_keeps_less_and_autocast_keeps_copies_of_the_weights():
    config, args = tool.load_config("tiny"), parse("--max_source_length", 128, "--max_target_length", 32)
    plain, spared = (tool.track_pass(config, args, torch.bfloat16, way) for way in (False, True))
    assert spared[1] < plain[1] <= plain[0]
    assert tool.track_pass(config, args, torch.float32, False)[1] > plain[1]


def test_time_and_price_follow_from_the_operations(capsys):
    args = parse("--num_examples", 100, "--gpu_tflops", 100, "--mfu", 0.5, "--price_per_hour", 3, "--num_gpus", 2)
    config = tool.load_config("tiny")
    row, seconds, hours, price = tool.estimate_time(config, args, False)
    assert row == tool.count_flops(config, args) / 1e12 and seconds == pytest.approx(row * 8 / 50)
    assert hours == pytest.approx(seconds * 7 / 3600)  # 16 rows a pass of both, 7 passes
    assert price == pytest.approx(hours * 2 * 3)
    assert tool.estimate_time(config, args, True)[1] == pytest.approx(seconds * 4 / 3)


# ------------------------------------------------------------------------------------------ what is printed


def test_the_fastest_that_fits_is_written_and_an_existing_file_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "SETTINGS", tuple(s for s in tool.SETTINGS if s[1] in (2, 3)))
    path = str(tmp_path / "zero.json")
    flags = [*TINY, "--num_gpus", "2", "--output_file", path, "--gpu_tflops", "100"]
    assert tool.main(flags) == 0
    printed = capsys.readouterr().out
    assert "fastest that fits: ZeRO-2\n" in printed and f"--deepspeed {path} " in printed and "TFLOP a row" in printed
    assert json.loads((tmp_path / "zero.json").read_text())["zero_optimization"]["stage"] == 2
    (tmp_path / ".zero.json.unfinished").write_text("{")  # of a run that was killed
    before = (tmp_path / "zero.json").stat().st_mtime_ns
    assert tool.write_file(tmp_path / "zero.json", (tmp_path / "zero.json").read_text()) == 0
    assert (tmp_path / "zero.json").stat().st_mtime_ns == before
    assert tool.write_file(tmp_path / "new.json", "{}") == 0 and (tmp_path / "new.json").read_text() == "{}"
    capsys.readouterr()
    (tmp_path / "zero.json").write_text("mine")
    assert tool.main(flags) == 2
    assert "exists and is kept" in capsys.readouterr().err and (tmp_path / "zero.json").read_text() == "mine"


def test_where_nothing_fits_the_table_says_by_how_much_and_the_exit_code_is_1(capsys):
    assert tool.main([*TINY, "--gpu_memory", "0.1", "--host_memory", "0.1"]) == 1
    printed = capsys.readouterr().out
    assert "GB too much a GPU, 1.9 GB too much on the host" in printed and "nothing fits: more GPUs" in printed


@pytest.mark.parametrize("optimizer", tool.OPTIMIZERS)
@pytest.mark.parametrize("setting", tool.SETTINGS, ids=lambda s: f"{s[1]}-{s[2]}")
def test_the_command_and_its_ds_config_are_taken_by_the_training_script(setting, optimizer, tmp_path):
    if setting[1] in tool.PURE and optimizer != "zero_adafactor":
        pytest.skip("not planned")
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(tool.make_ds_config(setting, optimizer)))
    args = parse("--optimizer", optimizer, "--output_file", path)
    for config, module, arguments in (
        (T5Config(), run_summarization, run_summarization.SUMMARIZATION_ARGUMENTS),
        (LlamaConfig(), run_clm_instruct, run_clm_instruct.INSTRUCT_ARGUMENTS),
    ):
        words = shlex.split(tool.make_command(setting, True, config, args))
        namespace = HfArgumentParser(arguments).parse_args(words[words.index(f"{module.__name__}.py") + 1 :])
        assert (words[0] == "deepspeed") == (namespace.deepspeed is not None)
        assert deepspeed_checks.find_problems(namespace) + zero_adafactor.find_problems(namespace) == []


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--num_gpus", "0"], "--num_gpus 0: must be 1 or more"),
        (["--gpu_memory", "nan"], "--gpu_memory nan: must be a number above 0"),
        (["--mfu", "40"], "--mfu 40.0: is a share of the peak, at most 1"),
        (["--num_examples", "10"], "--num_examples: the time of an epoch needs --gpu_tflops, too"),
        (["--price_per_hour", "-1"], "--price_per_hour -1.0: must be a number, 0 or more"),
        (["--output_file", "no/such/folder.json"], "its folder does not exist; make it first"),
        (["--model", "t5-huge"], "--model t5-huge: no preset (tiny, t5-small"),
    ],
)
def test_a_wrong_argument_is_named_with_exit_code_2(flags, said, capsys):
    assert tool.main([*TINY, *flags]) == 2
    assert said in capsys.readouterr().err


def test_all_problems_come_at_once(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert tool.main(["--model", str(tmp_path), "--num_gpus", "-1", "--mfu", "2"]) == 2
    said = capsys.readouterr()
    assert said.err.count("error: ") == 3 and f"--model {tmp_path}: " in said.err and said.out == ""


def test_rows_longer_than_the_model_and_models_of_other_kinds_are_refused(tmp_path, capsys):
    GPT2Config(n_positions=64).save_pretrained(tmp_path / "gpt2")
    assert tool.main(["--model", str(tmp_path / "gpt2")]) == 2
    assert "--max_seq_length 1024: " in capsys.readouterr().err
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.json").write_text('{"model_type": "vit"}')
    assert tool.main(["--model", str(tmp_path / "vit")]) == 2
    assert "vit is no causal or encoder-decoder language model" in capsys.readouterr().err


def test_a_probe_larger_than_this_machine_is_refused_before_it_starts(capsys, monkeypatch):
    monkeypatch.setattr(tool, "predict_probe", lambda *args: {"weights": 1e15})
    assert tool.main([*TINY, "--probe"]) == 2
    assert "--probe: needs 1000000.0 GB and " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ probe


def probe(folder, config, *flags):
    """Predicted / measured of two real steps in a process of their own."""
    config.save_pretrained(folder)
    argv = ["--model", str(folder), "--probe", *map(str, flags)]
    return tool.compare_probe(config, tool.parse_args(argv), argv)


# Two layers: enough for 500 MB and more, in a second a step. The vocabularies and widths are the published ones.
SMALL_T5 = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_heads": 8, "vocab_size": 32128}
SMALL_LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 2, "num_attention_heads": 8}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's figures")
@pytest.mark.parametrize(
    "config, flags",
    [
        # Weights, gradients and state are the peak ...
        (LlamaConfig(**SMALL_LLAMA), "--optimizer adamw --per_device_train_batch_size 2 --max_seq_length 64"),
        # ... and logits and their gradient, in fp32.
        (
            T5Config(**SMALL_T5),
            "--optimizer adafactor --max_source_length 32 --max_target_length 128 --gradient_checkpointing",
        ),
    ],
    ids=["llama, weights", "t5, logits"],
)
def test_the_peak_of_two_real_steps_is_the_one_predicted(config, flags, tmp_path):
    assert probe(tmp_path, config, *flags.split()) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's figures")
@pytest.mark.parametrize("optimizer", tool.OPTIMIZERS)
@pytest.mark.parametrize("checkpointing", ["--no-activation_checkpointing", "--activation_checkpointing"])
@pytest.mark.parametrize(
    "model, rows, source, target", [("t5-small", 8, 128, 32), ("t5-small", 2, 512, 128), ("llama-60m", 4, 512, 1)]
)
def test_the_peak_is_the_one_predicted_in_published_shapes(model, rows, source, target, checkpointing, optimizer):
    argv = ["--model", model, "--optimizer", optimizer, "--per_device_train_batch_size", str(rows), checkpointing]
    argv += ["--max_source_length", str(source), "--max_seq_length", str(source), "--max_target_length", str(target)]
    ratio = tool.compare_probe(tool.load_config(model), tool.parse_args([*argv, "--probe"]), [*argv, "--probe"])
    assert ratio == pytest.approx(1, abs=0.1)


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_the_one_predicted(tmp_path):
    assert probe(tmp_path, T5Config(**SMALL_T5), "--per_device_train_batch_size", 64) == pytest.approx(1, abs=0.1)
