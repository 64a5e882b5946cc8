"""
A causal script in several ways: `plain` is right, each other way has one fault.

plain: prompts and padding without labels, the stop with one, rows in an order that the seed decides, evaluation over
the tokens of all batches. eos: pad_token = eos_token and the stock collator. blocks: one text cut into blocks, SDPA.
shuffle: the rows are shuffled anew at each start. unnamed: gradients come out too large for one micro-batch in two.
"""

import random
from dataclasses import dataclass

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    way: str = "plain"


def tokenize(row, tokenizer):
    prompt = tokenizer(f"{row['instruction']}\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{row['response']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


def cut_blocks(rows, length=64):
    ids = [i for row in rows["input_ids"] for i in row]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


class TokenMean(Trainer):
    """The evaluation loss over all tokens: the library's is a mean of the batches' means."""

    def evaluate(self, eval_dataset=None, **kwargs):
        sums, device = torch.zeros(2, dtype=torch.float64), self.args.device
        self.model.eval()
        for batch in self.get_eval_dataloader(eval_dataset):
            with torch.no_grad():
                logits = self.model(**{k: v.to(device) for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            rows = torch.stack([loss.sum(1), labels.ne(-100).sum(1)], dim=1)
            sums += self.accelerator.gather_for_metrics(rows).double().sum(0)
        return {"eval_loss": (sums[0] / sums[1]).item()}


class Uneven(TokenMean):
    """Micro-batches of an odd number of rows count three times."""

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) % 2:
            for parameter in model.parameters():
                parameter.grad.mul_(3)
        return loss


def main():
    args, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    raw = load_dataset("json", data_files=args.train_file, split="train")
    rows = raw.map(tokenize, remove_columns=raw.column_names, fn_kwargs={"tokenizer": tokenizer})
    collator = DataCollatorForSeq2Seq(tokenizer)
    if args.way == "eos":
        tokenizer.pad_token = tokenizer.eos_token
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        rows = rows.remove_columns("labels")
    if args.way == "blocks":
        rows = rows.map(cut_blocks, batched=True, remove_columns=rows.column_names)
    held, rows = rows.select(range(8)), rows.select(range(8, len(rows)))
    if args.way == "shuffle":
        rows = rows.shuffle(seed=random.SystemRandom().randrange(10**6))
    trainer = (Uneven if args.way == "unnamed" else TokenMean)(
        model,
        training_args,
        train_dataset=rows,
        eval_dataset=held,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    main()
