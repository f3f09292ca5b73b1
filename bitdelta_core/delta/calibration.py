"""Calibration text to token sequences, with the fine-tune's own tokenizer (the base's where it has none)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from bitdelta_core.errors import InvalidRequest

DEFAULT_TEXT = "calibration.txt"
_SHORT = 64
"""Tokens that a text has at least."""


def read_calibration(file: Path | None) -> bytes:
    """The bytes of a calibration file, or of the text that ships with this package."""
    if file is None:
        return files("bitdelta_core.delta").joinpath(DEFAULT_TEXT).read_bytes()
    if file.suffix not in (".txt", ".jsonl"):
        raise InvalidRequest(f"{file}: calibration text is .txt or .jsonl", param="calibration")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be read: {error.strerror}", param="calibration") from error


def sequences(text: bytes, tokenizer: Any, *, length: int, jsonl: bool) -> list[list[int]]:
    """Token sequences of at most `length`: plain text in consecutive pieces, jsonl one per line, cut off.

    A line of jsonl holds "text", "messages" for the tokenizer's chat template, or "prompt" and "completion", which the
    end of text follows.
    """
    if jsonl:
        found = [ids[:length] for ids in _lines(text, tokenizer)]
    else:
        start = _prefix(tokenizer)
        ids = tokenizer(_decoded(text), add_special_tokens=False, verbose=False)["input_ids"]
        room = length - len(start)
        found = [start + ids[i : i + room] for i in range(0, len(ids), room)]
    found = [ids for ids in found if len(ids) > 1]
    if not found:
        raise InvalidRequest("the calibration text has no sequence of two tokens or more", param="calibration")
    return found


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of sequences, shuffled anew each time round, the same for the same seed. Padding is token 0, masked."""

    found: list[list[int]]
    size: int
    seed: int = 0

    def parted(self, share: int) -> tuple[Batches, Batches]:
        """All but every so-manieth sequence, and these."""
        rest = [ids for i, ids in enumerate(self.found) if i % share]
        return replace(self, found=rest), replace(self, found=self.found[::share])

    def beside(self, other: Batches) -> Batches:
        """And as many tokens of the other's sequences, if there are so many, cut to about the length of these: what
        lies together in a batch is padded to the longest."""
        longest = max(_SHORT, *map(len, self.found))
        cut = [ids[:longest] for ids in other.found]
        wanted, before = sum(map(len, self.found)), itertools.accumulate(map(len, cut), initial=0)
        more = [ids for ids, count in zip(cut, before, strict=False) if count < wanted]
        return replace(self, found=[*self.found, *more])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(token ids [B, L] int64, mask [B, L] bool), without end."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        while True:
            while len(order) < self.size:
                order += torch.randperm(len(self.found), generator=generator).tolist()
            chosen, order = order[: self.size], order[self.size :]
            yield self._pad([self.found[i] for i in chosen])

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
        return ids, mask


def _lines(text: bytes, tokenizer: Any) -> Iterator[list[int]]:
    for number, line in enumerate(_decoded(text).splitlines(), 1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except ValueError as error:
            raise InvalidRequest(f"calibration line {number} is not JSON: {error}", param="calibration") from error
        if isinstance(body, dict) and isinstance(body.get("messages"), list):
            yield _chat(body["messages"], tokenizer, number)
        elif isinstance(body, dict) and isinstance(body.get("text"), str):
            yield tokenizer(body["text"])["input_ids"]
        elif isinstance(body, dict) and all(isinstance(body.get(key), str) for key in ("prompt", "completion")):
            yield _answered(body["prompt"], body["completion"], tokenizer)
        else:
            raise InvalidRequest(
                f'calibration line {number} has neither "text" nor "messages" nor "prompt" and "completion"',
                param="calibration",
            )


def _answered(prompt: str, completion: str, tokenizer: Any) -> list[int]:
    """Each for itself: where they meet, tokens are those of a prompt that was answered."""
    head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion))
    return [*_prefix(tokenizer), *head, *tail, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]


def _chat(messages: list[Any], tokenizer: Any, number: int) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidRequest(
            f'calibration line {number} has "messages", but the fine-tune has no chat template: give "text"',
            param="calibration",
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template is a program of its author's: it may raise anything
        raise InvalidRequest(
            f"calibration line {number}: the chat template fails: {error}", param="calibration"
        ) from error


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the calibration text is not UTF-8: {error}", param="calibration") from error


def _prefix(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, where this tokenizer puts one or has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
