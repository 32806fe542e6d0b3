# SPDX-License-Identifier: Apache-2.0
"""A batch of conversations, each continued turn by turn."""

import hashlib
import json
from collections.abc import Callable, Sequence

from transformers import GenerationConfig

from keylayers.data.chat import render
from keylayers.data.formats import Message
from keylayers.evaluation.generation import (
    Ending,
    Speaker,
    plain_sampling,
    replies,
    seeded,
    stop_tokens,
)
from keylayers.evaluation.judge.answers import Answer, AnswerSettings, batches
from keylayers.evaluation.judge.questions import Question


def generate_answers(
    speaker: Speaker,
    questions: Sequence[Question],
    settings: AnswerSettings,
    known: frozenset[str],
    on_answer: Callable[[Answer], None],
) -> None:
    """Answer the questions whose key is not known, batch by batch.

    Args:
        speaker: Who answers.
        questions: All of them; they decide how batches are made.
        settings: How they are answered.
        known: Keys of the answers that are there already.
        on_answer: Told each new answer.

    Raises:
        ModelError: the model gives no probabilities to sample from.
        ConfigError: a batch does not fit into memory.
    """
    stops = stop_tokens(speaker)
    for temperature, batch in batches(questions, settings.options):
        keys = [settings.key(one) for one in batch]
        if known.issuperset(keys):
            continue
        said = _Conversations(speaker, batch)
        sampling = plain_sampling(temperature, settings.options.max_new_tokens, stops, speaker)
        for turn in range(max(len(one.turns) for one in batch)):
            with seeded(_seed(settings.options.answer_seed, batch, turn), speaker.model.device):
                said.continue_by_one_turn(turn, sampling)
        for index, key in enumerate(keys):
            if key not in known:
                on_answer(said.answer(index, key))


class _Conversations:
    """A batch of conversations, as far as they have got."""

    def __init__(self, speaker: Speaker, questions: Sequence[Question]) -> None:
        self._speaker = speaker
        self._questions = questions
        self._said: list[list[tuple[str, Ending, int]]] = [[] for _ in questions]

    def continue_by_one_turn(self, turn: int, sampling: GenerationConfig) -> None:
        asked = [index for index, one in enumerate(self._questions) if turn < len(one.turns)]
        prompts = [self._prompt(index, turn) for index in asked]
        for index, reply in zip(asked, replies(self._speaker, prompts, sampling), strict=True):
            self._said[index].append(reply)

    def answer(self, index: int, key: str) -> Answer:
        turns, endings, sizes = zip(*self._said[index], strict=True)
        name = self._questions[index].question_id
        return Answer(key, self._speaker.sha256, name, turns, endings, sizes)

    def _prompt(self, index: int, turn: int) -> list[int]:
        """Tokens of the conversation up to where the model is to answer."""
        messages = []
        for asked, (said, _, _) in zip(
            self._questions[index].turns[:turn], self._said[index], strict=True
        ):
            messages += [Message("user", asked), Message("assistant", said)]
        messages.append(Message("user", self._questions[index].turns[turn]))
        tokenizer = self._speaker.tokenizer
        text, _ = render(messages, tokenizer, self._speaker.template, prompt=True)
        # The rendered text holds all special tokens already.
        return list(tokenizer.encode(text, add_special_tokens=False))


def _seed(seed: int, batch: Sequence[Question], turn: int) -> int:
    """A seed for one turn of one batch that other batches have no part in."""
    said = json.dumps([seed, [one.turns for one in batch], turn])
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 1
