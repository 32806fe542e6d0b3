# SPDX-License-Identifier: Apache-2.0
"""Which tokens carry the loss, under every chat template that TRL ships.

Every turn of the generated conversations has words of its own. An independent reader says which
of them must be learned: those of answers that are not marked, whatever the template adds to them.
"""

import json
import random
import re
from pathlib import Path

import pytest
import trl
from trl.data_utils import common_prefix_length

from keylayers.data.chat import IGNORED, encode_all, measure_all
from keylayers.data.formats import FORMATS, PAIRS
from keylayers.data.preferences import PREFERENCES
from keylayers.data.reading import Found
from keylayers.data.templates import BUILT_IN, resolve_template
from keylayers.data.unused import unused_parts
from keylayers.errors import DataError
from tiny_files import tiny_tokenizer

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


def talk(seed, has_system):
    """A row with turns, and the words that must be learned, may be learned, and must not be."""
    draw, count = random.Random(seed), iter(range(1000))

    def words(kind):
        return " ".join(
            f"{kind}{next(count):03d}{draw.choice(('', 'é', '☃', ' ß'))}" for _ in range(3)
        )

    turns, must, may = [], set(), set()
    if has_system:
        turns.append({"role": "system", "content": words("sys")})
    for number in range(draw.randint(1, 3)):
        turns.append({"role": "user", "content": words("ask")})
        said, thought = words("say"), words("mull")
        is_last = number == 2
        mark = {} if is_last else draw.choice(MARKS)
        form = draw.choice(("plain", "inline", "lines", "field", "parts", "empty"))
        turn = {"role": "assistant", "content": said, **mark}
        if form == "inline":
            turn["content"] = f"<think>{thought}</think>{said}"
        elif form == "lines":
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{said}"
        elif form == "field":
            turn["reasoning_content"] = thought
        elif form == "parts":
            turn["content"] = [{"type": "text", "text": said}]
        elif form == "empty" and number:
            turn["content"], said = "", ""
        if form not in ("inline", "lines", "field"):
            thought = ""
        turns.append(turn)
        if not mark:
            must |= set(re.findall(r"say\d+", said))
            may |= set(re.findall(r"mull\d+", thought))
    turns += [
        {"role": "user", "content": words("ask")},
        {"role": "assistant", "content": words("say")},
    ]
    must |= set(re.findall(r"say\d+", turns[-1]["content"]))
    return {"messages": turns}, must, may


def check(name, seed):
    row, must, may = talk(seed, has_system=seed % 2 == 0 and name not in WITHOUT_SYSTEM)
    (conversation,) = FORMATS["messages"][1](row)
    tokenizer = tokenizer_with(name)
    template = resolve_template(tokenizer, None)
    (example,) = encode_all([conversation], tokenizer, template, 10_000)
    ids, labels = example.row["input_ids"], example.row["labels"]
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    found = set(re.findall(r"(?:sys|ask|say|mull)\d+", learned))
    last = set(re.findall(r"say\d+", row["messages"][-1]["content"]))
    if example.is_last_answer_only:
        must &= last
    assert must <= found <= must | may, (must - found, found - must - may)
    is_known = example.num_lost or example.is_last_answer_only
    assert may <= found or is_known or not template.reads("reasoning_content")
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    assert tokenizer.decode(ids[end:]).strip() == ""
    stops = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert stops & {*labels[end - 3 : end]}  # it learns to stop


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_counts_the_words_of_learned_answers_and_no_others(name):
    for seed in range(4):
        check(name, seed)


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_on_many_conversations(name):
    for seed in range(4, 60):
        check(name, seed)


@pytest.mark.parametrize("name", WITHOUT_SYSTEM)
def test_a_template_without_a_system_turn_names_others_that_have_one(name):
    row, _, _ = talk(0, has_system=True)
    (conversation,) = FORMATS["messages"][1](row)
    tokenizer = tokenizer_with(name)
    template = resolve_template(tokenizer, None)
    with pytest.raises(DataError, match=r"System role not supported.*alpaca or chatml take any"):
        list(encode_all([conversation], tokenizer, template, 10_000))


def call(**mark):
    function = {"name": "add_all", "arguments": {"first": "say-call"}}
    made = {"type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [made], **mark}


def said(words, **mark):
    return {"role": "assistant", "content": words, **mark}


ASKED = {"role": "user", "content": "ask-one"}
RESULT = {"role": "tool", "name": "add_all", "content": "ask-tool"}
NOT_LEARNED = {"weight": 0}
# Turns of tools, or one after the other, which templates mark as one or in parts; what is learned.
AGENTS = {
    "calls": ([ASKED, call(), RESULT, said("say-end")], {"say-call", "say-end"}),
    "masked call": (
        [ASKED, call(**NOT_LEARNED), RESULT, said("say-one"), ASKED, said("say-end")],
        {"say-one", "say-end"},
    ),
    "masked after a call": (
        [ASKED, call(), RESULT, said("say-one", **NOT_LEARNED), ASKED, said("say-end")],
        {"say-call", "say-end"},
    ),
    "masked before another": (
        [ASKED, said("say-one", **NOT_LEARNED), said("say-end")],
        {"say-end"},
    ),
    "masked first": ([said("say-one", **NOT_LEARNED), ASKED, said("say-end")], {"say-end"}),
}
REFUSED = "must render what tools say|must render every call|must alternate|show where the answer"


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_of_agents_are_learned_as_marked_or_refused(name):
    tokenizer = tokenizer_with(name)
    template = resolve_template(tokenizer, None)
    for turns, expected in AGENTS.values():
        (conversation,) = FORMATS["messages"][1]({"messages": turns})
        found, refusal = None, ""
        try:
            unused_parts(Found("messages", [conversation], 0, ()), template)
            (example,) = encode_all([conversation], tokenizer, template, 10_000)
            labels = [label for label in example.row["labels"] if label != IGNORED]
            found = set(re.findall(r"(?:say|ask)-[a-z]+", tokenizer.decode(labels)))
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
    (preference,) = PREFERENCES["pairs"](row)
    (example,) = measure_all([preference], "dpo", tokenizer, template, 10_000)
    asked = tokenizer.apply_chat_template(
        example.row["prompt"], add_generation_prompt=True, return_dict=False
    )
    assert "ask-one" in tokenizer.decode(asked)
    for which, text in answers.items():
        whole = example.row["prompt"] + example.row[which]
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        learned = tokenizer.decode(ids[common_prefix_length(asked, ids) :])
        words = set(re.findall(r"say-[a-z]+", text))
        words -= {"say-hm"} if example.num_lost else set()
        assert words == set(re.findall(r"(?:say|ask)-[a-z]+", learned))


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_of_any_name_that_transformers_hands_on_is_not_said_to_be_unused(name, field):
    tokenizer = tokenizer_with(name)
    template = resolve_template(tokenizer, None)
    (conversation,) = FORMATS["messages"][1]({"messages": [ASKED, said("say", **{field: "hm"})]})
    assert unused_parts(Found("messages", [conversation], 0, ()), template) == ()
    (example,) = encode_all([conversation], tokenizer, template, 10_000)
    assert example.num_lost == 0


def test_a_template_that_reads_a_thought_and_leaves_it_out_is_counted():
    tokenizer = tokenizer_with("gemma4")
    template = resolve_template(tokenizer, None)
    row = {"messages": [ASKED, said("say", reasoning_content="hm-hm")]}
    (conversation,) = FORMATS["messages"][1](row)
    (example,) = encode_all([conversation], tokenizer, template, 10_000)
    assert example.num_lost == 1


def test_a_template_that_fails_with_an_error_of_python_is_left_as_it_is():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 1 / 0 }}"
    assert resolve_template(tokenizer, None).text == tokenizer.chat_template


MARKED = [name for name, text in TEMPLATES.items() if "generation %}" in text]


@pytest.mark.parametrize("name", MARKED)
def test_labels_are_the_mask_of_transformers_where_it_has_one(name):
    """But for the tokens that close an answer, which some templates write after the marks."""
    tokenizer = tokenizer_with(name)
    row = {
        "messages": [
            {"role": "user", "content": "ask one"},
            {"role": "assistant", "content": "say two"},
        ]
    }
    (conversation,) = FORMATS["messages"][1](row)
    template = resolve_template(tokenizer, None)
    (example,) = encode_all([conversation], tokenizer, template, 10_000)
    wants_parts = "image" in template.text
    messages = [
        {
            **turn,
            "content": [{"type": "text", "text": turn["content"]}]
            if wants_parts
            else turn["content"],
        }
        for turn in row["messages"]
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = encoded["assistant_masks"]
    ids = encoded["input_ids"]
    assert example.row["input_ids"][: len(ids)] == ids
    ours = [label != IGNORED for label in example.row["labels"][: len(ids)]]
    differ = [
        token for token, own, other in zip(ids, ours, mask, strict=True) if own != bool(other)
    ]
    assert set(differ) <= {*tokenizer.all_special_ids}


def test_text_that_begins_with_the_start_token_gets_no_second_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    rows = [{"text": text} for text in ("The fox eats eggs.", "<s>The fox eats eggs.")]
    conversations = [next(FORMATS["text"][1](row)) for row in rows]
    first, second = encode_all(conversations, tokenizer, None, 100)
    assert first.row == second.row
    assert first.row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert first.row["labels"][0] == IGNORED


ASK, SAY = "ask one ask two", "say one say two"
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]
# Format -> rows with the same question and answer
ROWS = {
    "messages": [{"messages": TURNS}],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]},
        {"conversations": TURNS},
    ],
    "lima": [{"conversations": [ASK, SAY]}],
    "self-instruct": [{"instruction": ASK, "instances": [{"input": "", "output": SAY}]}],
    "alpaca": [{"instruction": ASK, "input": "", "output": SAY}],
    "prompt-completion": [{names[0]: ASK, names[-1]: SAY} for names in PAIRS if len(names) == 2],
    "text": [{"text": SAY}],
}


def test_every_format_has_rows():
    assert {*ROWS} == {*FORMATS}


@pytest.mark.parametrize("template", BUILT_IN)
@pytest.mark.parametrize("format", ROWS)
def test_the_loss_counts_the_same_answer_in_every_format(format, template):
    tokenizer = tiny_tokenizer()
    chosen = None if format == "text" else resolve_template(tokenizer, template)
    end = "<|im_end|></s>" if template == "chatml" and format != "text" else "</s>"
    for row in ROWS[format]:
        (conversation,) = FORMATS[format][1](row)
        (example,) = encode_all([conversation], tokenizer, chosen, 1_000)
        learned = [label for label in example.row["labels"] if label != IGNORED]
        assert tokenizer.decode(learned) == SAY + end


@pytest.mark.filterwarnings("ignore")  # TRL's, about a trainer that is only built
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preference_objectives_count_the_answers_alone(objective, tiny, preferences):
    from commands import file_for
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare
    from keylayers.model.loading import load_model, load_tokenizer
    from keylayers.model.modules import map_modules
    from keylayers.model.options import ModelOptions
    from keylayers.training.options import TrainingOptions
    from keylayers.training.run import make_trainer, new_adapter

    path = file_for(preferences, objective)
    source = ModelOptions(model=str(tiny / "model"), dtype="float32")
    tokenizer, model = load_tokenizer(source), load_model(source)
    options = TrainingOptions(objective=objective, batch_size=4)
    names = [info.name for info in map_modules(model)]
    model = new_adapter(model, names, options, num_steps=1)
    data = prepare(DataOptions(data=str(path), held_out=2.0), tokenizer, 64, objective)
    trainer = make_trainer(model, tokenizer, data.train, options, num_steps=1)
    learned = set()
    for batch in trainer.get_train_dataloader():
        for key in batch:
            if key.endswith("completion_mask"):
                ids = batch[key.replace("completion_mask", "input_ids")]
                learned |= {
                    tokenizer.decode(row[mask == 1])
                    for row, mask in zip(ids, batch[key], strict=True)
                }
            elif key.endswith("_labels"):
                learned |= {tokenizer.decode(row[row != IGNORED]) for row in batch[key]}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {
        row[key] for row in rows for key in ("chosen", "rejected", "completion") if key in row
    }
    assert learned
    assert learned <= {f"{answer}</s>" for answer in answers}
