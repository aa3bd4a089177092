"""Instructions and answers from a JSON-lines file, as rows of tokens for a causal language model.

Only answers are learned: a label of -100 says that a token is given and not asked for. Several examples share a row,
each with positions of its own, and none sees another.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

GIVEN = -100  # a label that the loss leaves out
FIELDS = ("instruction", "output")  # of each line; "input" may be there


@dataclass
class Example:
    """One instruction with its answer, as tokens."""

    tokens: list[int]
    labels: list[int]


def read(file: str | Path) -> list[dict[str, str]]:
    """Lines of ``{"instruction": ..., "input": ..., "output": ...}``; the input may be left out.

    Raises:
        ValueError: a line of another form, with its number; or none at all.
    """
    rows = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: no JSON: {error.msg}.") from None
        missing = [field for field in FIELDS if not isinstance(row, dict) or not isinstance(row.get(field), str)]
        if missing:
            raise ValueError(f"{file}, line {number}: no {missing[0]!r}. Each line needs {' and '.join(FIELDS)}.")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no examples.")
    return rows


def prompt(row: dict[str, str], tokenizer: Any) -> str:
    """What the model is given: by the tokenizer's own chat template, if it has one."""
    asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
    return f"Task: {asked}\nAnswer: "


def encode(row: dict[str, str], tokenizer: Any, length: int) -> Example | None:
    """Tokens and labels of one example; None where the answer would be cut off."""
    given = tokenizer(prompt(row, tokenizer))["input_ids"]
    if given and given[-1] == tokenizer.eos_token_id:
        given = given[:-1]  # some tokenizers end every text
    answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    if len(given) + len(answer) > length:
        return None
    return Example([*given, *answer], [*[GIVEN] * len(given), *answer])


def pack(examples: list[Example], length: int, pad: int) -> TensorDataset:
    """Put examples into rows of ``length`` tokens, longest first, each into the first row that has room.

    Returns:
        Tokens, labels, positions and the number of each token's example in its row, from 1; 0 is padding.
        All (rows, length), int64.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda one: -len(one.tokens)):
        size = len(example.tokens)
        place = next((i for i, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= size
    packed = []
    for row in rows:
        tokens = [token for one in row for token in one.tokens]
        labels = [label for one in row for label in one.labels]
        positions = [position for one in row for position in range(len(one.tokens))]
        numbers = [number for number, one in enumerate(row, start=1) for _ in one.tokens]
        rest = length - len(tokens)
        packed.append((tokens + [pad] * rest, labels + [GIVEN] * rest, positions + [0] * rest, numbers + [0] * rest))
    return TensorDataset(*(torch.tensor(part) for part in zip(*packed, strict=True)))


def attention_mask(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Who sees whom, to be added to attention's scores: earlier tokens of the same example.

    Args:
        numbers: (batch, length), as :func:`pack` gives them.
        dtype: Of the model.

    Returns:
        (batch, 1, length, length).
    """
    length = numbers.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=numbers.device).tril()
    same = numbers[:, None, :, None] == numbers[:, None, None, :]
    mask = torch.zeros(same.shape, dtype=dtype, device=numbers.device)
    return mask.masked_fill_(~(same & causal), torch.finfo(dtype).min)


class Instructions(LightningDataModule):
    """Training rows, and validation rows of a share of the examples that training does not see.

    Args:
        file: JSON lines.
        tokenizer: Hugging Face's, with an end-of-text token.
        length: Tokens of a row.
        batch: Rows of a batch.
        share: Of the examples, for validation.
        seed: Of what is drawn for it, and of the order.

    Raises:
        ValueError: as :func:`read`; or no example fits a row.
    """

    def __init__(self, file: str, tokenizer: Any, length: int, batch: int, share: float, seed: int) -> None:
        super().__init__()
        rows = read(file)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        examples = [encode(rows[i], tokenizer, length) for i in order]
        self.left_out = sum(one is None for one in examples)
        kept = [one for one in examples if one is not None]
        held = int(len(kept) * share)
        if len(kept) - held < 1:
            raise ValueError(f"{file}: none of {len(rows)} examples fits {length} tokens. Give a larger --length.")
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.train, self.held = pack(kept[held:], length, pad), pack(kept[:held], length, pad) if held else None
        self.batch, self.seed, self.examples = batch, seed, len(kept) - held

    def train_dataloader(self) -> DataLoader:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch, shuffle=True, generator=order)

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader(self.held, self.batch) if self.held is not None else []
