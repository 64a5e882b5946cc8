# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23"]
# ///
"""
T5 on the CPU in less time: dropout masks drawn the cheap way, in its modules and its attention.

    speed_up_cpu(model)  # other models stay as they are

Tested with transformers 5.23.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

DROPS_IN_MODULES = ("t5", "mt5", "umt5")  # others call torch's function themselves


class DropWithBits(torch.autograd.Function):
    """
    Dropout whose mask is drawn as 16 random bits an element, and kept as a byte.

    torch draws a mask at 12 ns an element on one thread, whatever the number of threads (2.13, x86), and keeps it in
    fp32: a quarter of a packed T5 step on two cores. Four elements of one 64-bit number take 2 ns. p is rounded to
    1/65536; the seed is torch's own generator's.
    """

    @staticmethod
    def forward(ctx, values, p):
        count = values.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[:count].view(values.shape) >= round(p * 2**16) - 2**15
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p) if p < 1 else 0
        return torch.where(keep, values * ctx.scale, 0)

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(ctx.saved_tensors[0], gradient * ctx.scale, 0), None


def drop_on_cpu(values: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
    """torch.nn.functional.dropout by DropWithBits."""
    return DropWithBits.apply(values, p) if training and p else values


class CpuDropout(torch.nn.Dropout):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return drop_on_cpu(values, self.p, self.training)


def attend_on_cpu(module, query, key, value, attention_mask, scaling, dropout=0.0, position_bias=None, **kwargs):
    """
    T5's eager attention (as fast there as SDPA) with drop_on_cpu, for transformers' AttentionInterface.

    query, key, value: (rows, heads, tokens, width); returns (rows, tokens, heads, width) and the probabilities.
    """
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    for bias in (position_bias, attention_mask):
        weights = weights if bias is None else weights + bias
    weights = drop_on_cpu(torch.nn.functional.softmax(weights, dim=-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def speed_up_cpu(model) -> None:
    """Draw the dropout masks of a T5 on the CPU the cheap way: its modules and its attention are replaced."""
    if model.config.model_type not in DROPS_IN_MODULES:
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(parent, name, CpuDropout(child.p).train(child.training))
    AttentionInterface.register("eager_on_cpu", attend_on_cpu)
    AttentionMaskInterface.register("eager_on_cpu", eager_mask)
    model.set_attn_implementation("eager_on_cpu")
