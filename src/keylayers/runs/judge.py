# SPDX-License-Identifier: Apache-2.0
"""Models answer questions and a judge rates or compares the answers, from options to files.

    OUTPUT/answers/*.jsonl      what each model said, a file a model
    OUTPUT/judgements/*.jsonl   what the judge replied or refused, a file a mode
    OUTPUT/judgement.json       options, models, counts and results of the last run

The first two only grow: what stands there is neither generated nor asked for again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from keylayers.environment import environment
from keylayers.evaluation.generation import Speaker
from keylayers.evaluation.judge.answers import Answer, AnswerSettings, kept_answers
from keylayers.evaluation.judge.asking import Asked, ask_all, kept_replies
from keylayers.evaluation.judge.client import JudgeClient, Reply
from keylayers.evaluation.judge.conversations import generate_answers
from keylayers.evaluation.judge.cost import Estimate, estimate
from keylayers.evaluation.judge.lines import LineFile
from keylayers.evaluation.judge.models import JudgedModel, OpenModels, find_models
from keylayers.evaluation.judge.options import JudgeOptions
from keylayers.evaluation.judge.questions import QuestionSet, read_questions
from keylayers.evaluation.judge.requests import JudgeRequest, Said, requests_for, unique
from keylayers.evaluation.judge.results import pairwise_results, single_results
from keylayers.evaluation.judge.verdicts import read_rating, read_verdict
from keylayers.files import one_at_a_time, output_folder, write_json
from keylayers.progress import Progress, Silent
from keylayers.report.judge import estimate_line

JUDGEMENT = "judgement.json"
ANSWERS = "answers"
NUM_EXAMPLES = 3  # replies that could not be read, for the record


@dataclass(frozen=True)
class JudgePlan:
    """What a run would do.

    Attributes:
        asked: The questions.
        labels: The models.
        num_turns: Answers to give, turn by turn, of all models.
        num_turns_kept: Those that are there already.
        estimate: What judging costs at most.
    """

    asked: QuestionSet
    labels: tuple[str, ...]
    num_turns: int
    num_turns_kept: int
    estimate: Estimate


def plan_judge(options: JudgeOptions, output: Path) -> JudgePlan:
    """What a run would do and cost; nothing is written in `output`, generated or asked.

    Weights are read only to see whose the answers in `output` are, if there are any.

    Raises:
        KeylayersError: a bad option, question file or model.
    """
    has_answers = (output / ANSWERS).is_dir()
    job = _Job.of(options, output, is_hashed=has_answers)
    answers = {one.label: job.kept(one)[0] if has_answers else {} for one in job.models}
    requests = list(unique(job.requests(answers)))
    num_turns = sum(len(one.turns) for one in job.asked.questions)
    return JudgePlan(
        asked=job.asked,
        labels=tuple(answers),
        num_turns=num_turns * len(job.models),
        num_turns_kept=sum(len(one.turns) for found in answers.values() for one in found.values()),
        estimate=job.estimate(requests),
    )


def judge(options: JudgeOptions, output: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Let the models answer, let the judge judge, and write down what came of it.

    Args:
        options: Everything that decides the result.
        output: Folder of answers, replies and record; one of an earlier run is continued.
        progress: Where to report to.

    Returns:
        The record, as in judgement.json.

    Raises:
        KeylayersError: a bad option, question file, model, endpoint or output. Answers and replies
            until then are kept.
    """
    progress = progress or Silent()
    with JudgeClient(options.endpoint) as client, output_folder(output):
        job = _Job.of(options, output)
        with one_at_a_time(output):
            answers = _answers(job, client, progress)
            requests = job.requests(answers)
            once = list(unique(requests))
            progress.note(estimate_line(asdict(job.estimate(once))))
            at_once = options.endpoint.judge_requests_at_once
            found = ask_all(client, once, job.replies_file, at_once, progress)
            record = _record(job, answers, requests, found)
            write_json(output / JUDGEMENT, record)
    return record


@dataclass(frozen=True)
class _Job:
    """What all parts of a run share."""

    options: JudgeOptions
    output: Path
    asked: QuestionSet
    models: Sequence[JudgedModel]

    @staticmethod
    def of(options: JudgeOptions, output: Path, *, is_hashed: bool = True) -> "_Job":
        asked = read_questions(options.answers)
        template = options.answers.chat_template
        models = find_models(options.judged, template, is_hashed=is_hashed)
        return _Job(options, output, asked, models)

    @property
    def replies_file(self) -> Path:
        return self.output / "judgements" / f"{self.options.endpoint.mode}.jsonl"

    def answers_file(self, model: JudgedModel) -> Path:
        """Named by what the model is, so that its name, which is anybody's, makes no path."""
        return self.output / ANSWERS / f"{model.kind}-{model.identity[:16]}.jsonl"

    def settings(self, model: JudgedModel) -> AnswerSettings:
        return AnswerSettings.of(self.options.answers, self.options.judged, model.template.text)

    def kept(self, model: JudgedModel) -> tuple[dict[int | str, Answer], int]:
        """Question -> answer of a model that is there already, and the number of damaged lines."""
        found, num_damaged = kept_answers(self.answers_file(model), model.identity)
        settings = self.settings(model)
        kept = {}
        for one in self.asked.questions:
            answer = found.get(settings.key(one))
            if answer is not None and len(answer.turns) == len(one.turns):
                kept[one.question_id] = answer
        return kept, num_damaged

    def requests(self, answers: Mapping[str, Mapping[int | str, Answer]]) -> list[JudgeRequest]:
        """All requests, for answers that are there or still to be given."""
        said: Said = {
            label: {name: one.turns for name, one in found.items()}
            for label, found in answers.items()
        }
        return requests_for(self.asked, list(answers), said, self.options.endpoint)

    def estimate(self, once: Sequence[JudgeRequest]) -> Estimate:
        kept, _ = kept_replies(self.replies_file)
        count = _counter(self.models[0].tokenizer)
        limit = self.options.answers.max_new_tokens
        return estimate(once, frozenset(kept), count, limit, self.options.endpoint)


def _counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _answers(
    job: _Job, client: JudgeClient, progress: Progress
) -> dict[str, dict[int | str, Answer]]:
    """Label -> question -> answer, generated where it is not there yet."""
    found = {}
    opener = OpenModels(job.options.judged)
    is_told = False
    for model in job.models:
        kept, num_damaged = job.kept(model)
        _note_damaged(job.answers_file(model), num_damaged, progress)
        if len(kept) < len(job.asked.questions):
            if not is_told and (reason := client.why_unreachable()):
                url = job.options.endpoint.base_url
                progress.note(
                    f"the judge at {url} cannot be reached yet: {reason}; the models answer first"
                )
            is_told = True
            kept |= _generated(
                job, model, opener, frozenset(one.key for one in kept.values()), progress
            )
        found[model.label] = kept
    _note_damaged(job.replies_file, kept_replies(job.replies_file)[1], progress)
    return found


def _generated(
    job: _Job,
    model: JudgedModel,
    opener: OpenModels,
    known: frozenset[str],
    progress: Progress,
) -> dict[int | str, Answer]:
    """Question -> answer, of those that are not known; each is on the disk once it is given."""
    found: dict[int | str, Answer] = {}
    num_new = len(job.asked.questions) - len(known)
    with (
        opener.opened(model) as opened,
        LineFile(job.answers_file(model)) as file,
        progress.stage(f"answers of {model.label}", num_new) as on_step,
    ):

        def keep(answer: Answer) -> None:
            file.add(answer.row())
            found[answer.question_id] = answer
            on_step(len(found), None)

        speaker = Speaker(opened, model.tokenizer, model.template, model.identity)
        generate_answers(speaker, job.asked.questions, job.settings(model), known, keep)
    return found


def _note_damaged(path: Path, count: int, progress: Progress) -> None:
    if count:
        progress.note(
            f"{count} damaged lines of {path} are left out, and asked for again if needed"
        )


def _record(
    job: _Job,
    answers: Mapping[str, Mapping[int | str, Answer]],
    requests: Sequence[JudgeRequest],
    found: Asked,
) -> dict[str, Any]:
    """What judgement.json holds."""
    endpoint, labels = job.options.endpoint, list(answers)
    results = single_results if endpoint.mode == "single" else pairwise_results
    read = read_rating if endpoint.mode == "single" else read_verdict
    replies = list(found.replies.values())
    unread = [one.text for one in replies if read(one) is None]
    return {
        "mode": endpoint.mode,
        "results": results(job.asked, labels, requests, found.replies),
        "questions": dict(job.asked.record),
        "models": [one.record() | _said(answers[one.label].values()) for one in job.models],
        "judge": {
            "url": endpoint.base_url,
            "model": endpoint.judge_model,
            "num_requests": len(replies) + len(found.refused),
            "num_replies": len(replies),
            "num_new_replies": found.num_new,
            "num_unread": len(unread),
            "num_cut": sum(one.is_cut for one in replies),
            "examples_unread": [text[:300] for text in unread[:NUM_EXAMPLES]],
            "refused": sorted(set(found.refused.values()))[:NUM_EXAMPLES],
            **_tokens(replies, job),
        },
        "replies_sha256": _replies_sha256(found.replies),
        "options": job.options.flat(),
        "environment": environment() | {"openai": metadata.version("openai")},
    }


def _said(answers: Any) -> dict[str, Any]:
    """How a model's answers ended, counted by turn."""
    endings = [ending for one in answers for ending in one.endings]
    return {
        "num_answers": len(endings),
        "num_answers_cut": endings.count("length"),
        "num_answers_without_room": endings.count("no room"),
        "num_answer_tokens": sum(sum(one.num_tokens) for one in answers),
    }


def _tokens(replies: Sequence[Reply], job: _Job) -> dict[str, Any]:
    """Tokens of all replies, of this run and of earlier ones, as far as the endpoint counted."""
    prompt = sum(one.prompt_tokens or 0 for one in replies)
    completion = sum(one.completion_tokens or 0 for one in replies)
    uncounted = sum(one.prompt_tokens is None or one.completion_tokens is None for one in replies)
    options, price = job.options.endpoint, None
    if options.judge_price_input is not None and options.judge_price_output is not None:
        price = (prompt * options.judge_price_input + completion * options.judge_price_output) / 1e6
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "num_without_token_counts": uncounted,
        "price": price,
    }


def _replies_sha256(replies: Mapping[str, Reply]) -> str:
    digest = hashlib.sha256()
    for key in sorted(replies):
        said = hashlib.sha256(replies[key].text.encode()).hexdigest()
        digest.update(f"{key} {said}\n".encode())
    return digest.hexdigest()
