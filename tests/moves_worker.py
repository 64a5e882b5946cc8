# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
One rank of the tests of moved checkpoints: runs a training script's main() once for each case, in one process.

    torchrun --nproc_per_node 2 moves_worker.py CASES.json

CASES.json: a list of {"script": "run_summarization", "argv": [...]}. The first rank prints an error's one line.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def forget_last_run() -> None:
    """What accelerate, transformers and DeepSpeed keep for the process of the run that was."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gc.collect()


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    code = 0
    if any("--deepspeed" in case["argv"] for case in json.loads(Path(sys.argv[1]).read_text())):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled on first use, 50 s
        deepspeed.init_distributed("gloo")
    for case in json.loads(Path(sys.argv[1]).read_text()):
        script = importlib.import_module(case["script"])
        try:
            script.main(case["argv"])
        except script.UsageError as error:
            code = 2
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"error: {error}", flush=True)
        forget_last_run()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
