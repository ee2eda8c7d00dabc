"""Make a tiny policy: ``python -m lightning_lambdapo.quickstart DIRECTORY [--task TASK]``.

Supervised training on demonstrations with slips. The built-in policy is that of the task ``sums``: three-term sums in
which each of the two results is wrong with probability 0.35. The policy gets about 0.65 squared of them right.
For the task ``short_sorting`` there are only problems, because its policy is a model that exists already.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_lambdapo.quickstart.tasks import TASKS, task_rows

SYMBOLS = "0123456789+=,;"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
TRAIN_ROWS, TEST_ROWS = 5000, 600


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk, padding_side="left"
    )


def train(
    task: str = "sums", *, steps: int = 1500, rows: int = 96, lr: float = 3e-3, seed: int = 0
) -> LlamaForCausalLM:
    """Train the tiny Llama from scratch on ``steps`` batches of fresh demonstrations.

    Raises:
        ValueError: the task has no demonstrations.
    """
    demonstration = TASKS[task].demonstration
    if demonstration is None:
        raise ValueError(f"The task {task} has problems alone, and no demonstrations to train a policy on.")
    tokenizer = build_tokenizer()
    generator = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        ids, labels = [], []
        for prompt, solution in (demonstration(generator) for _ in range(rows)):
            head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, solution))
            ids.append(torch.tensor([*head, *tail, tokenizer.eos_token_id]))
            labels.append(torch.tensor([*[-100] * len(head), *tail, tokenizer.eos_token_id]))
        inputs = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = model(inputs).logits[:, :-1]  # right padding: causal attention never sees it
        loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}")  # noqa: T201
    return model


def main() -> None:
    """Train and save a policy where the task has demonstrations, and problems for training and test as JSONL."""
    parser = argparse.ArgumentParser(prog="python -m lightning_lambdapo.quickstart", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--task", choices=TASKS, default="sums")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.directory.exists() and any(arguments.directory.iterdir()):
        parser.error(f"{arguments.directory} is not empty, and nothing is overwritten; choose another directory.")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if TASKS[arguments.task].demonstration is not None:
        train(arguments.task, seed=arguments.seed).save_pretrained(arguments.directory)
        build_tokenizer().save_pretrained(arguments.directory)
    rows = task_rows(arguments.task, TRAIN_ROWS + TEST_ROWS, seed=arguments.seed)
    for name, part in (("train", rows[TEST_ROWS:]), ("test", rows[:TEST_ROWS])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (arguments.directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
