# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8"]
# ///
"""
What a training step did: real tokens, floating-point work, of a device's peak, memory.

Optional beside console.py, which prints them.
"""

import resource
import sys
import time

import torch

# Dense bf16 products a second, in 10^12, by what a GPU's name holds; the makers' data sheets.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10G": 70, "A10": 125, "L4": 121}
PEAKS |= {"RTX 4090": 165, "RTX 3090": 71}


def count_tokens(inputs: dict, pad: int | None) -> tuple:
    """Real tokens of a batch that stand in front of padding: of the sources, or of all, and of the targets."""
    ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
    if mask is not None:
        return mask.ne(0).sum(), labels.ne(-100).sum()
    # Packed rows have no mask: padding is a last example, by its positions, of nothing but the padding token.
    index, width = torch.arange(ids.shape[1], device=ids.device), ids.shape[1]
    start = (index * inputs["position_ids"].eq(0)).amax(dim=1)
    only = (index * ids.ne(pad)).amax(dim=1) < start
    return ids.numel() - ((width - start) * only).sum(), labels.ne(-100).sum()


def count_flop(model) -> tuple[float, float]:
    """FLOP a source and a target token (causal: 0 and any token): 6 a weight, 4 where it is frozen; no attention's."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(head)}
    encoder = model.get_encoder().parameters() if model.config.is_encoder_decoder else ()
    sources, sides = {id(p) for p in encoder} - {id(head)}, [0.0, 0.0]
    for p in model.parameters():
        if id(p) not in tables:
            sides[id(p) not in sources] += getattr(p, "ds_numel", p.numel()) * (6 if p.requires_grad else 4)
    return sides[0], sides[1]


def find_peak(device, dtype: torch.dtype) -> float:
    """FLOP/s of a device: a GPU's in bf16 as it is known, else the best of five matrix products."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((peak for part, peak in PEAKS.items() if part in name), None)
    if known and dtype != torch.float32:
        return known * 1e12
    side, best = 4096 if device.type == "cuda" else 1024, float("inf")
    matrix = torch.ones(side, side, device=device, dtype=dtype)  # no random numbers: they are the training's
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def measure_memory(device) -> float:
    """Most GB so far: of the GPU's memory, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
