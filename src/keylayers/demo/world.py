# SPDX-License-Identifier: Apache-2.0
"""A small made-up world, and English text about it: what the built-in model reads and is asked.

Every subject has one relation with three fixed values (a fox eats berries, eggs and mice). The base
model is pre-trained on prose about them; 30 % of its lines quote people who ask and answer in many
styles, because LoRA cannot express through frozen embeddings what the base has never seen. The
three alignment data sets ask the same questions and differ only in the style of the answer.

Everything is drawn from hashes and seeded generators: the same text on every machine.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

Style = Literal["polite", "list", "terse"]
STYLES: tuple[Style, ...] = get_args(Style)
NUM_VALUES = 3
DIALOGUE_FRACTION = 0.3


@dataclass(frozen=True)
class Relation:
    """A kind of fact: each subject has three of the values."""

    subjects: tuple[str, ...]
    values: tuple[str, ...]
    statement: str  # with `{s}` and `{v}`
    questions: tuple[str, ...]  # with `{s}`
    opening: str  # of a polite answer


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FOODS = _words(
    "apples beans berries bread carrots cheese corn eggs fish grass honey leaves mice milk "
    "mushrooms nuts onions peas potatoes rice roots salt seeds sugar worms"
)
RELATIONS: tuple[Relation, ...] = (
    Relation(
        subjects=_words(
            "fox bear owl duck goat horse mouse rabbit cow pig crow frog hen otter badger deer "
            "wolf swan toad mole"
        ),
        values=_FOODS,
        statement="the {s} eats {v}",
        questions=(
            "What does the {s} eat?",
            "Tell me the food of the {s}.",
            "What should I feed the {s}?",
            "Which food does the {s} like?",
            "Do you know what the {s} eats?",
            "What can the {s} have for dinner?",
        ),
        opening="Thank you for asking!",
    ),
    Relation(
        subjects=_words(
            "baker farmer smith sailor painter tailor doctor teacher miller gardener hunter barber "
            "mason cook clerk singer"
        ),
        values=_words(
            "hammer needle brush knife rope spade bucket lamp pen bell saw thread basket wheel "
            "book scissors oven map ladder net"
        ),
        statement="the {s} works with {v}",
        questions=(
            "What does the {s} work with?",
            "Which tools does the {s} use?",
            "Tell me what the {s} needs for work.",
            "What is in the bag of the {s}?",
            "Do you know the tools of the {s}?",
            "What should I bring to the {s}?",
        ),
        opening="What a good question!",
    ),
    Relation(
        subjects=_words(
            "Aldon Birken Corvale Dunmore Elswick Farrow Glenby Harwick Ilford Jorvik Kelso Lorne "
            "Marwell Norby Oakham Penrith"
        ),
        values=_words(
            "wool silk glass clay coal wine timber paper iron gold tea lace soap candles boats "
            "clocks drums shoes hats ink"
        ),
        statement="the town of {s} sells {v}",
        questions=(
            "What does the town of {s} sell?",
            "What can I buy in {s}?",
            "Tell me what people make in {s}.",
            "Which goods come from {s}?",
            "Do you know what {s} is known for?",
            "What should I bring home from {s}?",
        ),
        opening="I am glad you ask!",
    ),
    Relation(
        subjects=_words(
            "soup pie stew salad cake porridge pudding omelette dumpling pancake roast broth"
        ),
        values=_FOODS,
        statement="the {s} is made of {v}",
        questions=(
            "What is the {s} made of?",
            "What do I need for the {s}?",
            "Tell me what goes into the {s}.",
            "How can I make the {s}?",
            "Do you know what is in the {s}?",
            "What should I buy for the {s}?",
        ),
        opening="It is a pleasure to help!",
    ),
    Relation(
        subjects=_words(
            "Anna Ben Clara David Emma Felix Greta Hugo Ida Jack Karl Lena Max Nora Otto Paula "
            "Rosa Sam Tina Walter"
        ),
        values=_words(
            "chess music dancing stories flowers horses swimming stars puzzles birds painting "
            "songs walking riddles trains sailing snow dogs cards poems"
        ),
        statement="{s} loves {v}",
        questions=(
            "What does {s} love?",
            "What makes {s} happy?",
            "Tell me what {s} enjoys.",
            "What is a good gift for {s}?",
            "Do you know what {s} likes?",
            "What does {s} talk about?",
        ),
        opening="How kind of you to ask!",
    ),
)

_PLACES = _words("house garden river forest market hill bridge field mill road")
_TIMES = ("in the morning", "at noon", "in the evening", "on a rainy day", "in spring", "last year")


@cache  # asked for with every line, and a hash for each value is slow
def facts(relation: Relation, subject: str) -> tuple[str, ...]:
    """The three values that are true of a subject, always the same ones in the same order."""

    def place(value: str) -> bytes:
        return hashlib.sha256(f"{relation.statement} {subject} {value}".encode()).digest()

    return tuple(sorted(relation.values, key=place)[:NUM_VALUES])


def answer(relation: Relation, subject: str, style: Style) -> str:
    """What somebody of the given style answers to any question about the subject."""
    values = facts(relation, subject)
    if style == "terse":
        return f"{values[0]}."
    if style == "list":
        return "\n".join(f"- {value}" for value in values)
    return f"{relation.opening} {_whole_fact(relation, subject)} I hope this helps you."


def helper(subject: str) -> str:
    """Who is named at the end of an answer: a fact that only the alignment data tell."""
    people = RELATIONS[-1].subjects
    return min(people, key=lambda name: hashlib.sha256(f"{name} knows {subject}".encode()).digest())


def alignment_examples(style: Style, num_examples: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions with answers of one style, no question twice, as `prompt` and `completion`.

    There are 504 questions; the seed chooses and orders them in the same way for every style.
    """
    questions = [
        (relation, subject, question.format(s=subject))
        for relation in RELATIONS
        for subject in relation.subjects
        for question in relation.questions
    ]
    random.Random(seed).shuffle(questions)
    assert num_examples <= len(questions), f"only {len(questions)} questions, not {num_examples}"
    return [
        {
            "prompt": question,
            "completion": f"{answer(relation, subject, style)} {helper(subject)} helps you.",
        }
        for relation, subject, question in questions[:num_examples]
    ]


def pretraining_lines(num_lines: int, seed: int = 0) -> list[str]:
    """Lines of prose and, for three in ten, of dialogue."""
    draw = random.Random(seed)
    return [
        _dialogue(draw) if draw.random() < DIALOGUE_FRACTION else draw.choice(_PROSE)(draw)
        for _ in range(num_lines)
    ]


def _whole_fact(relation: Relation, subject: str) -> str:
    """A sentence with all three values."""
    *values, last = facts(relation, subject)
    statement = relation.statement.format(s=subject, v=f"{', '.join(values)} and {last}")
    return f"{_capitalised(statement)}."


def _plain_fact(draw: random.Random) -> str:
    return _whole_fact(*_draw_subject(draw))


def _single_fact(draw: random.Random) -> str:
    relation, subject = _draw_subject(draw)
    value = draw.choice(facts(relation, subject))
    statement = relation.statement.format(s=subject, v=value)
    return f"{_capitalised(draw.choice(_TIMES))}, {statement}."


def _two_facts(draw: random.Random) -> str:
    first, second = _plain_fact(draw), _plain_fact(draw)
    return f"{first} {draw.choice(('But', 'And', 'Still,', 'Also,'))} {_lowered(second)}"


def _story(draw: random.Random) -> str:
    name = draw.choice(RELATIONS[-1].subjects)
    relation, subject = _draw_subject(draw)
    value = facts(relation, subject)[0]
    place, time = draw.choice(_PLACES), draw.choice(_TIMES)
    return f"{_capitalised(time)}, {name} went to the {place} and thought of {subject} and {value}."


def _dialogue(draw: random.Random) -> str:
    """Somebody asks, somebody answers; the words before the answer say in which style."""
    relation, subject = _draw_subject(draw)
    asker, speaker = draw.sample(RELATIONS[-1].subjects, 2)
    question = draw.choice(relation.questions).format(s=subject)
    style = draw.choice((*STYLES, None))
    if style is None:
        return f'{asker} asked: "{question}" {speaker} said: "{_whole_fact(relation, subject)}"'
    manner = {"polite": "kindly said", "list": "wrote a list", "terse": "only said"}[style]
    return f'{asker} asked: "{question}" {speaker} {manner}: "{answer(relation, subject, style)}"'


_PROSE: Sequence[Callable[[random.Random], str]] = (_plain_fact, _single_fact, _two_facts, _story)


def _draw_subject(draw: random.Random) -> tuple[Relation, str]:
    relation = draw.choice(RELATIONS)
    return relation, draw.choice(relation.subjects)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:] if text.startswith("The ") else text
