# SPDX-License-Identifier: Apache-2.0
"""Which tokens carry the loss, under every chat template that TRL ships.

Every turn of the generated conversations has words of its own. An independent reader says which
of them must be learned: those of answers that are not marked, whatever the template adds to them.
"""

import random
import re
from pathlib import Path

import pytest
import trl
from trl.data_utils import common_prefix_length

from commands import file_for
from keylayers.data.chat import IGNORED, encode_all, measure_all
from keylayers.data.formats import FORMATS
from keylayers.data.preferences import PREFERENCES
from keylayers.data.prepare import unused_parts
from keylayers.data.reading import Found
from keylayers.data.templates import BUILT_IN, Renderer, resolve_template
from keylayers.errors import DataError
from keylayers.training.options import TrainingOptions
from keylayers.training.run import make_trainer, new_adapter
from prepared import learned, prepare
from tiny_files import tiny_model, tiny_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))} | BUILT_IN
SPECIAL = re.compile(r"<\|[A-Za-z0-9_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>")
WITHOUT_SYSTEM = ("gemma", "gemma_training")  # they raise an error
MARKS = [{}, {}, {}, {"weight": 0}, {"train": False}, {"loss": False}]


def tokenizer_with(name):
    """A tokenizer with this template as its own, and the special tokens that it writes."""
    tokenizer, text = tiny_tokenizer(), TEMPLATES[name]
    marks = list(dict.fromkeys(SPECIAL.findall(text)))
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = text
    return tokenizer


def encoded(name, turns):
    """What becomes of a conversation: tokenizer and template, what they do not use, the example."""
    tokenizer = tokenizer_with(name)
    template = resolve_template(tokenizer, None)
    [conversation] = FORMATS["messages"][1]({"messages": turns})
    unused = unused_parts(Found("messages", [conversation], 0, ()), template)
    [example] = encode_all([conversation], tokenizer, template, 10_000)
    return tokenizer, template, unused, example


def talk(seed, has_system):
    """Turns whose words say which kind they are of."""
    draw, count = random.Random(seed), iter(range(1000))

    def words(kind):
        return " ".join(
            f"{kind}{next(count):03d}{draw.choice(('', 'é', '☃', ' ß'))}" for _ in range(3)
        )

    turns = [{"role": "system", "content": words("sys")}] if has_system else []
    for number in range(draw.randint(1, 3)):
        said, thought = words("say"), words("mull")
        forms = [
            {"content": said},
            {"content": f"<think>{thought}</think>{said}"},
            {"content": f"<think>\n{thought}\n</think>\n\n{said}"},
            {"content": said, "reasoning_content": thought},
            {"content": [{"type": "text", "text": said}]},
            {"content": "" if number else said},
        ]
        turns.append({"role": "user", "content": words("ask")})
        turns.append({"role": "assistant", **draw.choice(forms), **draw.choice(MARKS)})
    last = {"role": "assistant", "content": words("say")}
    return [*turns, {"role": "user", "content": words("ask")}, last]


def words_of(turns, *kinds):
    return set(re.findall(rf"(?:{'|'.join(kinds)})\d+", str(turns)))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 60), marks=pytest.mark.long)], ids=["few", "many"]
)
def test_the_loss_counts_the_words_of_learned_answers_and_no_others(name, seeds):
    for seed in seeds:
        turns = talk(seed, has_system=seed % 2 == 0 and name not in WITHOUT_SYSTEM)
        tokenizer, template, _, example = encoded(name, turns)
        ids, labels = example.row["input_ids"], example.row["labels"]
        assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
        to_learn = [turn for turn in turns if not turn.keys() & {"weight", "train", "loss"}]
        if example.is_last_answer_only:
            must = words_of(turns[-1], "say")
        else:
            must = words_of(to_learn, "say")
        may = words_of(to_learn, "mull")
        found = words_of(learned(example.row, tokenizer), "sys", "ask", "say", "mull")
        assert must <= found <= must | may, (must - found, found - must - may)
        is_known = example.num_lost or example.is_last_answer_only
        assert may <= found or is_known or not template.reads("reasoning_content")
        end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        assert tokenizer.decode(ids[end:]).strip() == ""
        stops = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        assert stops & {*labels[end - 3 : end]}  # it learns to stop


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_template_without_a_system_turn_names_others_that_have_one(name):
    with pytest.raises(DataError, match=r"System role not supported.*alpaca or chatml take any"):
        encoded(name, talk(0, has_system=True))


def said(words, **more):
    return {"role": "assistant", "content": words, **more}


ASKED = {"role": "user", "content": "ask-one"}
FUNCTION = {"name": "add_all", "arguments": {"first": "say-call"}}
CALL = said("", tool_calls=[{"type": "function", "function": FUNCTION}])
RESULT = {"role": "tool", "name": "add_all", "content": "ask-tool"}
MASKED = said("say-one", weight=0)
END = said("say-end")
# Turns of tools, or one after the other, which templates mark as one or in parts; what is learned.
AGENTS = {
    "calls": ([ASKED, CALL, RESULT, END], {"say-call", "say-end"}),
    "masked call": (
        [ASKED, CALL | {"weight": 0}, RESULT, said("say-one"), ASKED, END],
        {"say-one", "say-end"},
    ),
    "masked after a call": ([ASKED, CALL, RESULT, MASKED, ASKED, END], {"say-call", "say-end"}),
    "masked before another": ([ASKED, MASKED, END], {"say-end"}),
    "masked first": ([MASKED, ASKED, END], {"say-end"}),
}
REFUSED = "must render turns and calls|must render every call|must alternate|show where the answer"


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_agents_are_learned_as_marked_or_refused(name):
    for turns, expected in AGENTS.values():
        found, refusal = None, ""
        try:
            tokenizer, _, _, example = encoded(name, turns)
            found = set(re.findall(r"(?:say|ask)-[a-z]+", learned(example.row, tokenizer)))
        except DataError as error:
            refusal = str(error)
        assert found == expected or re.search(REFUSED, refusal)


@pytest.mark.parametrize("name", TEMPLATES)
def test_trl_learns_both_answers_of_a_pair_whole(name):
    """What its trainers of preferences make of the rows that they get."""
    tokenizer = tokenizer_with(name)
    template = resolve_template(tokenizer, None)
    tokenizer.chat_template = template.text
    answers = {"chosen": "<think>say-hm</think>say-yes", "rejected": "say-no"}
    row = {"prompt": [ASKED], **{which: [said(text)] for which, text in answers.items()}}
    [preference] = PREFERENCES["pairs"](row)
    [example] = measure_all([preference], "dpo", tokenizer, template, 10_000)
    asked = tokenizer.apply_chat_template(
        example.row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert "ask-one" in tokenizer.decode(asked)
    for which, text in answers.items():
        whole = example.row["prompt"] + example.row[which]
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        counted = tokenizer.decode(ids[common_prefix_length(asked, ids) :])
        words = set(re.findall(r"say-[a-z]+", text)) - ({"say-hm"} if example.num_lost else set())
        assert words == set(re.findall(r"(?:say|ask)-[a-z]+", counted))


# A template that reads thoughts, the name of one, and how many it leaves out.
THOUGHTS = [
    *((name, field, 0) for name in ("qwen3", "gptoss") for field in ("thinking", "reasoning")),
    *((name, "reasoning_content", 0) for name in ("qwen3", "gptoss")),
    ("gemma4", "reasoning_content", 1),
]


@pytest.mark.parametrize(("name", "field", "num_lost"), THOUGHTS)
def test_a_thought_of_any_name_that_transformers_hands_on_is_used_or_counted_as_left_out(
    name, field, num_lost
):
    _, _, unused, example = encoded(name, [ASKED, said("say", **{field: "hm-hm"})])
    assert (unused, example.num_lost) == ((), num_lost)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "generation %}" in TEMPLATES[name]])
def test_labels_are_the_mask_of_transformers_where_it_has_one(name):
    """But for the tokens that close an answer, which some templates write after the marks."""
    turns = [{"role": "user", "content": "ask one"}, said("say é☃\n\ntwo  blanks, 1.5 or 'so'?")]
    tokenizer, template, _, example = encoded(name, turns)
    theirs = tokenizer.apply_chat_template(
        Renderer(template, tokenizer).in_form(turns),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    assert example.row["input_ids"][: len(ids)] == ids
    labels = example.row["labels"][: len(ids)]
    both = zip(ids, labels, mask, strict=True)
    differ = {token for token, label, other in both if (label != IGNORED) != bool(other)}
    assert differ <= {*tokenizer.all_special_ids}


@pytest.mark.filterwarnings("ignore")  # TRL's, about a trainer that is only built
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preference_objectives_count_the_answers_alone(objective, preferences):
    tokenizer, options = tiny_tokenizer(), TrainingOptions(objective=objective, batch_size=4)
    names = ["model.layers.0.self_attn.q_proj"]
    model = new_adapter(tiny_model(len(tokenizer)), names, options, num_steps=1)
    data = prepare(file_for(preferences, objective), 64, objective, tokenizer, held_out=2.0)
    trainer = make_trainer(model, tokenizer, data.train, options, num_steps=1)
    found = set()
    for batch in trainer.get_train_dataloader():
        for key in batch:
            if key.endswith("completion_mask"):
                both = zip(
                    batch[key.replace("completion_mask", "input_ids")], batch[key], strict=True
                )
                found |= {tokenizer.decode(row[mask == 1]) for row, mask in both}
            elif key.endswith("_labels"):
                found |= {tokenizer.decode(row[row != IGNORED]) for row in batch[key]}
    assert found
    assert all(re.fullmatch(r"The \w+ eats \w+\.</s>", answer) for answer in found)
