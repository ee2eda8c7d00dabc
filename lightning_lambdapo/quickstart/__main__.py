"""Make the built-in tiny policy: ``python -m lightning_lambdapo.quickstart DIRECTORY``.

Supervised training on demonstrations of three-term sums, each of whose two intermediate results is wrong with
probability 0.35, so that the policy knows how, and gets about 0.65 squared of the sums right.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_lambdapo.data.sources import arithmetic_prompt

SYMBOLS = "0123456789+=,;"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
ERROR_RATE = 0.35


def demonstration(generator: random.Random) -> tuple[str, str]:
    """A prompt and its worked solution, each result of which is off by one to three with probability 0.35."""
    a, b, c = (generator.randint(1, 19) for _ in range(3))

    def add(left: int, right: int) -> int:
        slip = generator.choice((-3, -2, -1, 1, 2, 3)) if generator.random() < ERROR_RATE else 0
        return max(left + right + slip, 0)

    first = add(a, b)
    total = add(first, c)
    return arithmetic_prompt(a, b, c), f"{a}+{b}={first},{first}+{c}={total};{total}"


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


def train(*, steps: int = 1500, rows: int = 96, lr: float = 3e-3, seed: int = 0) -> LlamaForCausalLM:
    """Train the tiny Llama from scratch on ``steps`` batches of fresh demonstrations."""
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
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.directory.exists() and any(arguments.directory.iterdir()):
        parser.error(f"{arguments.directory} is not empty; nothing is written over, choose another directory.")
    model = train(seed=arguments.seed)
    model.save_pretrained(arguments.directory)
    build_tokenizer().save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
