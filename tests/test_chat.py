# SPDX-License-Identifier: Apache-2.0
"""The loss counts the answers with what closes them, and nothing else."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from keylayers.data import chat
from keylayers.data.chat import IGNORED
from keylayers.data.formats import Conversation
from keylayers.data.templates import BUILT_IN, ChatTemplate, resolve_template
from keylayers.errors import DataError
from tiny_files import CHAT_TEMPLATE as MARKED
from tiny_files import tiny_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is it? It is a fox!",
    "### Instruction:\nWrite a poem.\n\n### Response:\nRoses are red,\n\nviolets are blue.  Two.",
    "User: hello there\nBot: good day\n[INST] one two three [/INST] four </x>\n\n\n",
]
BARE = (
    "{% for m in messages %}{{ 'Bot:' if m['role'] == 'assistant' else 'User:' }}"
    "{{ m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"
)


def unmarked(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


OUTSIDE = "{% generation %}{{ m['content'] }}{% endgeneration %}</s>"
# A template, and an answer with what closes it; the last one also ends with a stop token.
TEMPLATES = {
    "marked": (MARKED, "{}</s>"),
    "unmarked": (unmarked(MARKED), "{}</s>"),
    "stop outside": (unmarked(MARKED).replace("{{ m['content'] }}</s>", OUTSIDE), "{}</s>"),
    "line end inside": (MARKED.replace("</s>", "{{ '</s>\n' }}"), "{}</s>\n"),
    "marked without a stop": (MARKED.replace("</s>", "{{ '\n' }}"), "{}\n"),
    "plain words without markers": (BARE, "{}\n"),
    "no prompt for generation (Llama-2)": (
        "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
        " {} </s>",
    ),
    "built-in alpaca": ("alpaca", "{}</s>"),
    "built-in chatml": ("chatml", "{}<|im_end|></s>"),
}
TURNS = [
    ("user", "What is it?"),
    ("assistant", "It is a fox!\n\nTwo  blanks."),
    ("user", "hello"),
    ("assistant", "good day, naïve 🦊"),
]

# A template that cannot be used, and the message.
BROKEN = [
    ("{% for %}", "'t' must render every conversation, it failed with: Expected"),
    ("{{ raise_exception('No system role') }}", "failed with: No system role"),
    ("{{ 1 / 0 }}", "it failed with: division by zero"),
    ("{{ messages[0]['text'] + 'a' }}", "it failed with: 'dict object' has no attr"),
    ("", "it rendered nothing; fix the template, or choose another `--chat-template`: alpaca or"),
    ("{{ messages[0]['content'] }}", "render the whole answer, it lost 'good day"),
    (  # the turns before the answer are not rendered the same without it
        "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "must show where the answer 'good day.*markers",
    ),
    (MARKED.replace("== 'assistant'", "== 'user'"), "show where the answer"),  # marks elsewhere
    (BARE, "set the tokenizer's `eos_token`"),
]


def build_tokenizer(*, trim_offsets=True, start=False, eos="</s>"):
    tokenizer = tiny_tokenizer(CORPUS)
    tokenizer.chat_template, tokenizer.eos_token = None, eos
    processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if start:
        first = ("<s>", tokenizer.bos_token_id)
        processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def encode(turns, tokenizer, template, max_length=10_000):
    if template in BUILT_IN:
        template = resolve_template(tokenizer, template)
    elif isinstance(template, str):
        template = ChatTemplate("t", template, "file")
    conversation = turns if isinstance(turns, Conversation) else Conversation(messages(turns))
    [found] = chat.encode_all([conversation], tokenizer, template, max_length)
    return found


def labelled_runs(encoded, tokenizer):
    """What the loss counts, as the text of every unbroken run of labelled tokens."""
    ids, labels = encoded.row["input_ids"], encoded.row["labels"]
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    runs = (list(run) for _, run in groupby(labels, lambda label: label == -100))
    return [
        tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run[0] != -100
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["blanks trimmed", "blanks kept"])
def tokenizer(request):
    return build_tokenizer(trim_offsets=request.param)


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_loss_counts_every_answer_with_its_closing_tokens(tokenizer, case):
    template, closed = TEMPLATES[case]
    stop = "" if "</s>" in closed else "</s>"
    for turns in (TURNS, [("assistant", "hello"), *TURNS[2:]]):
        encoded = encode(turns, tokenizer, template)
        first, last = (closed.format(text) for role, text in turns if role == "assistant")
        assert labelled_runs(encoded, tokenizer) == [first, last + stop]
        assert not encoded.is_last_answer_only
        assert not encoded.is_truncated
        if case in ("marked", "unmarked", "built-in alpaca", "built-in chatml"):  # all have a stop
            text = BUILT_IN.get(template, template)
            in_use = tokenizer.apply_chat_template(messages(turns), chat_template=text)
            assert encoded.row["input_ids"] == in_use["input_ids"]
            without_offsets = ByT5Tokenizer()
            encoded = encode(turns, without_offsets, template)
            assert labelled_runs(encoded, without_offsets) == [first, last]


TEXT = st.text(st.sampled_from("ab c\n\t.é🦊ß'1"), min_size=1, max_size=12)


@pytest.mark.parametrize("template", [MARKED, unmarked(MARKED)], ids=["marked", "unmarked"])
@given(st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3))
def test_any_text_is_labelled_to_the_character(tokenizer, template, pairs):
    turns = [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]
    encoded = encode(turns, tokenizer, template)
    assert labelled_runs(encoded, tokenizer) == [said + "</s>" for _, said in pairs]


def test_words_without_blanks_in_any_token_are_labelled_like_any_other():
    """The closing line end is in no token; transformers' own mask then runs on to the end."""
    words = ["[UNK]", "</s>", "<|user|>", "<|assistant|>", "q", "a", "r", "b"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]", extra_special_tokens=words[2:4]
    )
    turns = [("user", "q"), ("assistant", "a a"), ("user", "r"), ("assistant", "b")]
    encoded = encode(turns, tokenizer, TEMPLATES["line end inside"][0])
    counted = [words[label] if label >= 0 else "-" for label in encoded.row["labels"]]
    assert counted == ["-", "-", "-", "a", "a", "</s>", "-", "-", "-", "b", "</s>"]


def test_a_template_that_rewrites_earlier_answers_leaves_the_last_one_to_learn(tokenizer):
    answer = "{{ m['content'] }}</s>"
    thinking = unmarked(MARKED).replace(answer, "{{ 'hm ' if loop.last }}" + answer)
    encoded = encode(TURNS, tokenizer, thinking)
    assert labelled_runs(encoded, tokenizer) == ["hm " + TURNS[3][1] + "</s>"]
    assert encoded.is_last_answer_only


# As documented.
READ = {
    "alpaca": "Be brief.\n\n### Instruction:\nhello\n\n### Response:\ngood day, naïve 🦊</s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    "<|im_start|>assistant\ngood day, naïve 🦊<|im_end|></s>\n",
}


@pytest.mark.parametrize("template", BUILT_IN)
def test_built_in_templates_read_as_documented(tokenizer, template):
    encoded = encode([("system", "Be brief."), *TURNS[2:]], tokenizer, template)
    text = tokenizer.decode(encoded.row["input_ids"], clean_up_tokenization_spaces=False)
    assert text == READ[template]


def test_a_built_in_template_starts_and_ends_as_the_tokenizer_does():
    for start in (True, False):
        tokenizer = build_tokenizer(start=start)
        encoded = encode(TURNS, tokenizer, "alpaca")
        assert encoded.row["input_ids"].count(tokenizer.bos_token_id) == start
    tokenizer = build_tokenizer(eos="<|im_end|>")  # which does not end a ChatML answer twice
    encoded = encode(TURNS, tokenizer, "chatml")
    assert labelled_runs(encoded, tokenizer)[-1] == TURNS[3][1] + "<|im_end|>"


@pytest.mark.parametrize(("template", "message"), BROKEN)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(template, message):
    with pytest.raises(DataError, match=message) as caught:
        encode(TURNS, build_tokenizer(eos=None), template)
    assert "\n" not in str(caught.value)


def test_truncation_keeps_the_start_and_is_seen(tokenizer):
    whole, cut = (encode(TURNS, tokenizer, MARKED, length) for length in (10_000, 9))
    ids, labels = whole.row["input_ids"], whole.row["labels"]
    assert cut.row == {"input_ids": ids[:9], "labels": labels[:9]}
    assert (cut.is_truncated, cut.num_used_tokens, whole.num_used_tokens) == (True, 9, len(ids))
    first = next(i for i, label in enumerate(labels) if label >= 0)
    assert cut.num_prompt_tokens == whole.num_prompt_tokens == first
    short = encode(TURNS, tokenizer, MARKED, max_length=3)
    assert (short.num_label_tokens, short.is_usable) == (0, False)


@pytest.mark.parametrize("start", [True, False])
def test_plain_text_counts_whole_and_ends_and_has_one_start_token_at_most(start):
    tokenizer = build_tokenizer(start=start)
    for text in ("The fox.", "<s>" * start + "The fox."):
        encoded = encode(Conversation([], text=text), tokenizer, None)
        ids = encoded.row["input_ids"]
        assert tokenizer.decode(ids) == "<s>" * start + "The fox.</s>"
        assert encoded.row["labels"] == [IGNORED] * start + ids[start:]
        assert encoded.num_label_tokens == len(ids) - 1  # nothing predicts the first token


def test_the_models_own_template_is_used_unless_another_is_chosen(tmp_path):
    own = build_tokenizer()
    assert resolve_template(own, None).name == "alpaca"
    own.chat_template = MARKED
    assert resolve_template(own, None) == ChatTemplate("model", MARKED, "model")
    assert resolve_template(own, "alpaca").source == "built-in"
    own.chat_template = "{{ 1 / 0 }}"  # a failure in TRL, which looks for its form with marks
    assert resolve_template(own, None).text == "{{ 1 / 0 }}"
    own.chat_template = {"default": BARE, "tool_use": MARKED}
    assert resolve_template(own, None).text == BARE
    file = tmp_path / "mine.jinja"
    file.write_text(BARE, encoding="utf-8")
    assert resolve_template(own, str(file)) == ChatTemplate("mine.jinja", BARE, "file")
    own.chat_template = {"tool_use": MARKED, "rag": MARKED}
    with pytest.raises(ValueError, match="must have a default chat template"):
        resolve_template(own, None)
    with pytest.raises(ValueError, match="got 'chatlm', did you mean 'chatml'"):
        resolve_template(own, "chatlm")
