"""In the manner of TRL's sft.py: SFTTrainer on prompt and completion, the tokenizer by the model's name."""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str


args, training_args = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
rows = load_dataset("json", data_files=args.train_file, split="train")
rows = rows.map(lambda row: {"prompt": row["instruction"] + "\n", "completion": row["response"]})
rows = rows.select_columns(["prompt", "completion"])
parts = rows.train_test_split(8, shuffle=False)
SFTTrainer(model, args=training_args, train_dataset=parts["train"], eval_dataset=parts["test"]).train()
