"""Continuous batching: texts join and leave the calls of one program.

There is no thread of its own. Whoever waits for a token of a text makes the next call for all texts, and the others wait for
it. A call has the next token of every text that is being answered, and pieces of prompts, so that a long prompt delays answers
by a piece at a time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lissom.generation.choice import Choice
from lissom.generation.sampling import Sampling
from lissom.generation.slots import Region, Slots

PIECE = 128
"""The most tokens of prompts in one call."""
BESIDE = 64
"""The same where texts are being answered, which wait for the call."""


class Reader(Protocol):
    """Reads tokens of several sequences in one call."""

    sequences: int

    def read(self, parts: Sequence[tuple[Region, Sequence[int]]]) -> torch.Tensor:
        """The logits after the last token of each part, [parts, vocabulary]."""
        ...

    def new_slots(self) -> Slots:
        """The slots of an empty pool."""
        ...


@dataclass(eq=False)
class Text:
    """A prompt and its answer.

    Attributes:
        ids: tokens of the prompt, then of the answer.
        most: tokens of the answer.
        choice: how its tokens are chosen.
        sampling: which tokens end it, and what changes its logits.
        region: its slots while it is read or answered.
        new: tokens of the answer that nobody took yet.
        is_finished: the answer is complete, or was cancelled.
        error: what ended it.
        end: the tokens of the prompt and the whole answer.
    """

    ids: list[int]
    most: int
    choice: Choice
    sampling: Sampling
    region: Region | None = None
    new: deque[int] = field(default_factory=deque)
    is_finished: bool = False
    error: BaseException | None = None
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.end = len(self.ids) + self.most

    @property
    def held(self) -> int:
        """The number of its tokens that are in its slots."""
        return 0 if self.region is None else len(self.region.tokens)

    @property
    def unread(self) -> int:
        """The number of its tokens that are not."""
        return len(self.ids) - self.held

    def piece(self, size: int) -> list[int]:
        """The tokens for the next call, at most so many. Pieces end at the same tokens whether the start is shared or not."""
        return self.ids[self.held : self.held // size * size + size]

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token.

        Args:
            logits: [1, vocabulary].
        """
        read = [] if self.sampling.process is None else self.ids  # nothing else reads the text
        token = self.choice.pick(self.choice.process(torch.tensor([read]), logits))
        if token in self.sampling.stop:
            self.is_finished = True
            return
        self.ids.append(token)
        self.new.append(token)
        if len(self.ids) == self.end:  # nothing else: another thread may have cancelled the text meanwhile
            self.is_finished = True


class Batching:
    """The texts of a pool, and the calls that read and answer them."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._slots = reader.new_slots()
        self._waiting: deque[Text] = deque()
        self._running: list[Text] = []
        self._lock = threading.Lock()  # of the queues
        self._turn = threading.Lock()  # of the calls

    @property
    def waiting(self) -> int:
        """Texts that wait for room."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are read or answered."""
        return sum(not text.is_finished for text in self._running)

    @property
    def reserved(self) -> int:
        """Slots of texts that are read or answered; those of finished ones are free before the next call."""
        with self._lock:
            finished = [text.region.size for text in self._running if text.is_finished and text.region is not None]
            return self._slots.reserved - sum(finished)

    def submit(self, text: Text) -> Text:
        """Add a text, which is answered as soon as there is room."""
        with self._lock:
            self._waiting.append(text)
        return text

    def cancel(self, text: Text) -> None:
        """End a text; nothing happens to one that is finished."""
        with self._lock:
            text.is_finished = True
            if text in self._waiting:
                self._waiting.remove(text)

    def tokens(self, text: Text) -> Iterator[int]:
        """The tokens of a text's answer, as they are computed. Raises what ended it, if anything did."""
        while True:
            is_finished = text.is_finished  # before the last tokens are taken, which another thread may be adding
            while text.new:
                yield text.new.popleft()
            if is_finished:
                break
            with self._turn:
                if not text.new and not text.is_finished:
                    self._call()
        if text.error is not None:
            raise text.error

    def step(self) -> bool:
        """Make one call; returns whether texts are left."""
        with self._turn:
            self._call()
        with self._lock:
            return bool(self._waiting) or self.running > 0

    def _call(self) -> None:
        """Make one call for the texts whose turn it is."""
        with self._lock:
            self._admit()
            running = list(self._running)
        chosen = _next_tokens(running)
        if not chosen:
            return
        try:
            logits = self._reader.read([(text.region, ids) for text, ids in chosen.items() if text.region is not None])
            for text, row in zip(chosen, logits.split(1), strict=True):
                if not text.unread and not text.is_finished:
                    _take(text, row)
        # What a program raises ends the texts of the call, and no others.
        except BaseException as error:
            for text in chosen:
                text.error, text.is_finished = error, True
            if not isinstance(error, Exception):
                raise

    def _admit(self) -> None:
        """Take back the slots of finished texts, and give some to texts that wait, in order, while there is room."""
        for text in [text for text in self._running if text.is_finished]:
            self._running.remove(text)
            assert text.region is not None
            self._slots.release(text.region)
        while self._waiting and len(self._running) < self._reader.sequences:
            text = self._waiting[0]
            region = self._slots.take(text.ids, text.end)
            if region is None:
                return
            text.region = region
            self._running.append(self._waiting.popleft())


def _next_tokens(running: Sequence[Text]) -> dict[Text, list[int]]:
    """The tokens of the next call: those of all answers, and pieces of prompts in order, as many as there is room for."""
    chosen = {text: text.ids[-1:] for text in running if text.unread == 1}
    size = room = BESIDE if chosen else PIECE
    for text in running:
        if (text.unread > 1 and room == size) or 1 < text.unread <= room:
            chosen[text] = text.piece(size)
            room -= len(chosen[text])
    return chosen


def _take(text: Text, logits: torch.Tensor) -> None:
    """Choose the next token of a text. What its processor raises ends this text, and no other."""
    try:
        text.take(logits)
    except Exception as error:
        text.error, text.is_finished = error, True
