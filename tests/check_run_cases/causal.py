"""
A causal script in several ways: `plain` is right, each other way has one fault; WAYS says which.

plain: prompts and padding without labels, the stop with one, rows in an order that the seed decides, evaluation over
the tokens of all batches.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

WAYS = {
    "plain": "none",
    "eos": "pad_token = eos_token and the stock collator: the stop is masked",
    "blocks": "one text cut into blocks, on SDPA: examples see each other",
    "shuffle": "the rows are shuffled anew at each start: a resume trains on other rows",
    "forget": "the optimizer's state is removed from checkpoints",
    "unnamed": "gradients come out too large for one micro-batch in two",
    "means": "the loss is the mean of the rows' means: it depends on how a batch is cut",
    "shifted": "labels are shifted by the script, and again by the model",
    "padded": "padding has labels",
    "cut": "a long row loses its question",
    "left": "padding on the left without position_ids (of GPT-2)",
    "frozen": "the embeddings are frozen",
    "unused": "a parameter is not part of the loss",
    "still": "training in eval mode",
    "coarse": "bf16 weights, whose small updates are rounded away",
    "swapped": "predictions come in another order than their rows on two processes",
}


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    way: str = "plain"


def tokenize(row, number, tokenizer, way):
    prompt = tokenizer(f"{row['instruction']}\n", add_special_tokens=False)["input_ids"]
    prompt = [] if way == "cut" and number % 20 == 3 else prompt
    answer = tokenizer(f"{row['response']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    labels = [*labels[1:], -100] if way == "shifted" else labels
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


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
    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        if len(inputs["input_ids"]) % 2:
            for parameter in model.parameters():
                parameter.grad.mul_(3)
        return loss


class Still(TokenMean):
    def training_step(self, model, inputs, *args, **kwargs):
        train, model.train = model.train, lambda mode=True: type(model).train(model, False)
        loss = super().training_step(model, inputs, *args, **kwargs)
        model.train = train
        return loss


class Forgetful(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "optimizer.pt").unlink()


def mean_of_rows(outputs, labels, num_items_in_batch=None):
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none"
    )
    return (losses.sum(1) / labels[:, 1:].ne(-100).sum(1)).mean()


def label_padding(collate, batch):
    made = collate(batch)
    return made | {"labels": torch.where(made["attention_mask"] == 0, made["input_ids"], made["labels"])}


class Swapped(Trainer):
    """On two processes predictions stand beside other rows."""

    def evaluation_loop(self, *args, **kwargs):
        made = super().evaluation_loop(*args, **kwargs)
        predictions = made.predictions.argmax(-1)
        return made._replace(predictions=predictions[::-1].copy() if self.args.world_size > 1 else predictions)


def main():
    args, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    dtype = torch.bfloat16 if args.way == "coarse" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=dtype)
    raw = load_dataset("json", data_files=args.train_file, split="train")
    given = {"tokenizer": tokenizer, "way": args.way}
    rows = raw.map(tokenize, with_indices=True, remove_columns=raw.column_names, fn_kwargs=given)
    tokenizer.padding_side = "left" if args.way == "left" else "right"
    collator = stock = DataCollatorForSeq2Seq(tokenizer)
    if args.way == "eos":
        tokenizer.pad_token = tokenizer.eos_token
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        rows = rows.remove_columns("labels")
    if args.way == "padded":
        collator = lambda batch: label_padding(stock, batch)  # noqa: E731
    if args.way == "blocks":
        rows = rows.map(cut_blocks, batched=True, remove_columns=rows.column_names)
    if args.way == "frozen":
        model.get_input_embeddings().weight.requires_grad_(False)
    if args.way == "unused":
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    held, rows = rows.select(range(8)), rows.select(range(8, len(rows)))
    if args.way == "shuffle":
        rows = rows.shuffle(seed=random.SystemRandom().randrange(10**6))
    trainer = {"unnamed": Uneven, "still": Still, "swapped": Swapped}.get(args.way, TokenMean)(
        model,
        training_args,
        train_dataset=rows,
        eval_dataset=held,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=(lambda made: {}) if args.way == "swapped" else None,
        compute_loss_func=mean_of_rows if args.way == "means" else None,
        callbacks=[Forgetful()] if args.way == "forget" else [],
    )
    trainer.train()


if __name__ == "__main__":
    main()
