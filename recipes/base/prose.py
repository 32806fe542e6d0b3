# SPDX-License-Identifier: Apache-2.0
"""English text about the demo's made-up world (`keylayers.demo.world`), which the base is made of.

30 % of the lines quote people who ask and answer in many styles, because LoRA cannot express
through frozen embeddings what the base has never seen. Everything is drawn from a seeded generator.
"""

import random
from collections.abc import Callable, Sequence

from keylayers.demo.world import RELATIONS, STYLES, Relation, answer, capitalised, facts, whole_fact

DIALOGUE_FRACTION = 0.3
PLACES = ("house", "garden", "river", "forest", "market", "hill", "bridge", "field", "mill", "road")
TIMES = ("in the morning", "at noon", "in the evening", "on a rainy day", "in spring", "last year")


def pretraining_lines(num_lines: int, seed: int = 0) -> list[str]:
    """Lines of prose and, for three in ten, of dialogue."""
    draw = random.Random(seed)
    return [
        _dialogue(draw) if draw.random() < DIALOGUE_FRACTION else draw.choice(PROSE)(draw)
        for _ in range(num_lines)
    ]


def _plain_fact(draw: random.Random) -> str:
    return whole_fact(*_draw_subject(draw))


def _single_fact(draw: random.Random) -> str:
    relation, subject = _draw_subject(draw)
    value = draw.choice(facts(relation, subject))
    statement = relation.statement.format(s=subject, v=value)
    return f"{capitalised(draw.choice(TIMES))}, {statement}."


def _two_facts(draw: random.Random) -> str:
    first, second = _plain_fact(draw), _plain_fact(draw)
    return f"{first} {draw.choice(('But', 'And', 'Still,', 'Also,'))} {_lowered(second)}"


def _story(draw: random.Random) -> str:
    name = draw.choice(RELATIONS[-1].subjects)
    relation, subject = _draw_subject(draw)
    value = facts(relation, subject)[0]
    place, time = draw.choice(PLACES), draw.choice(TIMES)
    return f"{capitalised(time)}, {name} went to the {place} and thought of {subject} and {value}."


def _dialogue(draw: random.Random) -> str:
    """Somebody asks, somebody answers; the words before the answer say in which style."""
    relation, subject = _draw_subject(draw)
    asker, speaker = draw.sample(RELATIONS[-1].subjects, 2)
    question = draw.choice(relation.questions).format(s=subject)
    style = draw.choice((*STYLES, None))
    if style is None:
        return f'{asker} asked: "{question}" {speaker} said: "{whole_fact(relation, subject)}"'
    manner = {"polite": "kindly said", "list": "wrote a list", "terse": "only said"}[style]
    return f'{asker} asked: "{question}" {speaker} {manner}: "{answer(relation, subject, style)}"'


PROSE: Sequence[Callable[[random.Random], str]] = (_plain_fact, _single_fact, _two_facts, _story)


def _draw_subject(draw: random.Random) -> tuple[Relation, str]:
    relation = draw.choice(RELATIONS)
    return relation, draw.choice(relation.subjects)


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:] if text.startswith("The ") else text
