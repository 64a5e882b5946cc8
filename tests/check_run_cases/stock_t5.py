"""In the manner of Hugging Face's run_summarization.py: Seq2SeqTrainer, its collator, the model's own loss."""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str


def tokenize(rows, tokenizer):
    features = tokenizer(rows["review_body"], max_length=64, truncation=True)
    features["labels"] = tokenizer(text_target=rows["review_headline"], max_length=12, truncation=True)["input_ids"]
    return features


args, training_args = HfArgumentParser((Arguments, Seq2SeqTrainingArguments)).parse_args_into_dataclasses()
tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path)
rows = load_dataset("csv", data_files=args.train_file, split="train")
rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names, fn_kwargs={"tokenizer": tokenizer})
collator = DataCollatorForSeq2Seq(tokenizer, model=model)
Seq2SeqTrainer(model, training_args, train_dataset=rows, data_collator=collator, processing_class=tokenizer).train()
