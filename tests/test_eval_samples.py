# SPDX-License-Identifier: Apache-2.0
"""Samples: how a model is asked, and that none is taken twice."""

import pytest

QUESTIONS = [("What is 2 + 2?", "4"), ("What is 3 * 3?", 9), ("Half of 1?", "\\frac{1}{2}")]


@pytest.fixture(scope="module")
def base(tiny):
    """The tiny model, ready to be measured."""
    from keylayers.evaluation.options import ComparedOptions
    from keylayers.evaluation.subjects import each_model, subjects_of
    from keylayers.model.options import ModelOptions

    model = ModelOptions(model=str(tiny / "model"))
    return next(each_model(subjects_of(model, ComparedOptions()), model, None))


def sampled(base, path, num_samples, stop_after=None, batch_size=2, **options):
    """All samples of the file after one run, and how many answers the run generated."""
    from keylayers.evaluation import sampling
    from keylayers.evaluation.options import ProblemOptions
    from keylayers.evaluation.problems import Problem

    problems = [Problem(text, f"\\boxed{{{answer}}}") for text, answer in QUESTIONS]
    asked = ProblemOptions(
        problems=("mine",), samples=num_samples, max_new_tokens=6, ask="Say.", **options
    )
    generated = []
    generate = base.model.generate

    def counted(**kwargs):
        if len(generated) == stop_after:
            raise KeyboardInterrupt
        generated.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    base.model.generate = counted
    file = sampling.SampleFile(path, {"of": "a test"})
    try:
        sampling.sample_answers(
            problems,
            base,
            asked,
            file,
            batch_size=batch_size,
            seed=3,
            on_step=lambda step, loss: None,
        )
    except KeyboardInterrupt:
        pass
    finally:
        del base.model.generate
    return file.found, sum(generated)


def test_a_run_that_was_killed_goes_on_with_the_samples_it_would_have_taken(base, tmp_path):
    whole, num = sampled(base, tmp_path / "whole.jsonl", 4, temperature=1.0)
    assert num == len(whole) == 12
    assert len({one.text for one in whole.values()}) > 6  # it does sample
    path = tmp_path / "killed.jsonl"
    part, first = sampled(base, path, 4, stop_after=3, temperature=1.0)
    assert 0 < len(part) < 12
    with path.open("ab") as file:
        file.write(b'{"problem": "torn')  # what a kill in the middle of a line leaves
    found, second = sampled(base, path, 4, temperature=1.0)
    assert found == whole
    assert first + second == 12
    assert sorted(path.read_text().splitlines()) == sorted(
        (tmp_path / "whole.jsonl").read_text().splitlines()
    )


def test_more_samples_are_added_to_those_that_are_there(base, tmp_path):
    path = tmp_path / "more.jsonl"
    few, _ = sampled(base, path, 2, temperature=1.0)
    many, num = sampled(base, path, 4, temperature=1.0)
    assert num == 6
    assert few.items() <= many.items()
    assert sampled(base, path, 4, temperature=1.0)[1] == 0


def test_without_temperature_the_answer_is_that_of_the_likeliest_tokens(base, tmp_path):
    import torch

    found, _ = sampled(base, tmp_path / "greedy.jsonl", 1, batch_size=3)
    text, _ = QUESTIONS[0]
    prompt = base.chat_tokenizer().apply_chat_template(
        [{"role": "user", "content": f"{text}\n\nSay."}],
        add_generation_prompt=True,
        return_dict=False,
    )
    ids = list(prompt)
    for _ in range(6):  # one token after another, without padding, cache or batch
        with torch.no_grad():
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    (own,) = [one for one in found.values() if one.problem == _hash(text, "4")]
    assert own.text == base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    assert own.num_tokens == 6
    assert own.is_cut


def _hash(text, answer):
    from keylayers.evaluation.problems import Problem

    return Problem(text, f"\\boxed{{{answer}}}").sha256()


def test_a_file_of_something_else_is_not_overwritten(base, tmp_path):
    from keylayers.errors import OutputError
    from keylayers.evaluation.sampling import SampleFile

    path = tmp_path / "mine.jsonl"
    path.write_text("one\ntwo\n")
    with pytest.raises(OutputError, match="must hold samples that `keylayers eval` wrote"):
        SampleFile(path, {})
    assert path.read_text() == "one\ntwo\n"


OWN = {
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(5, 200)),
    "bad_words_ids": [[token] for token in range(5, 200)],
    "typical_p": 0.1,
    "epsilon_cutoff": 0.2,
}


@pytest.mark.parametrize(("name", "value"), OWN.items())
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_settings_of_the_models_own_file_change_no_sample(
    base, tmp_path, monkeypatch, name, value, temperature
):
    import copy

    plain, _ = sampled(base, tmp_path / "plain.jsonl", 1, temperature=temperature)
    own = copy.deepcopy(base.model.generation_config)
    setattr(own, name, value)
    monkeypatch.setattr(base.model, "generation_config", own)
    found, _ = sampled(base, tmp_path / "own.jsonl", 1, temperature=temperature)
    assert found == plain
    assert base.model.generation_config is own


def test_what_decides_samples_and_verdicts_is_in_their_hash(base, tmp_path, monkeypatch):
    import copy
    from dataclasses import replace

    from keylayers.evaluation import answers
    from keylayers.evaluation.options import EvalOptions, ProblemOptions
    from keylayers.evaluation.problems import Problem, ProblemSet
    from keylayers.model.options import ModelOptions
    from keylayers.runs.eval_jobs import ProblemJob

    problems = tuple(Problem(text, f"\\boxed{{{answer}}}") for text, answer in QUESTIONS)
    options = EvalOptions(ModelOptions(model="m"), problems=ProblemOptions(problems=("mine",)))
    job = ProblemJob(ProblemSet("mine", problems, ""), options, tmp_path)
    found = [job.inputs_sha256(base), job.inputs_sha256(base)]
    assert found[0] == found[1]
    # a template that asks in the same way, but closes an answer by another token
    text = base.template.text.replace("{{ m['content'] }}</s>", "{{ m['content'] }}<s>")
    found.append(job.inputs_sha256(replace(base, template=replace(base.template, text=text))))
    own = copy.deepcopy(base.model.generation_config)
    own.eos_token_id = [2, 9]
    with monkeypatch.context() as patched:
        patched.setattr(base.model, "generation_config", own)
        found.append(job.inputs_sha256(base))
    monkeypatch.setattr(answers, "CHECKER", "math-verify 99")
    found.append(job.inputs_sha256(base))
    assert len(set(found[1:])) == 4
