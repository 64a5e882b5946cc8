"""Scripts that check_run.py cannot check, by the first word after the script's name."""

import sys

way = sys.argv[1]
if way == "crash":
    raise RuntimeError("the moon is full")
if way == "input":
    input("your name? ")
if way == "flags":
    import argparse

    argparse.ArgumentParser(prog="bad.py").parse_args(sys.argv[2:])
if way == "untrained":
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=9))
    Trainer(model, TrainingArguments("out-of-bad"))
if way == "sleep":
    import time

    time.sleep(600)
if way == "unshrinkable":
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    class OddConfig(PreTrainedConfig):
        model_type = "odd"

    class OddModel(PreTrainedModel):
        config_class = OddConfig

        def __init__(self, config):
            super().__init__(config)
            assert config.hidden_layers_of_mine == 7, "this model wants seven layers"
            self.weight = torch.nn.Parameter(torch.ones(1))

    OddModel.from_pretrained("nowhere", config=OddConfig())
