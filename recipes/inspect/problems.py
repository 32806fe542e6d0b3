# SPDX-License-Identifier: Apache-2.0
r"""Problems with an answer (GSM8K, MATH-500, AIME): pass@k and majority vote over k samples.

    inspect eval problems.py -T data=math500.jsonl -T samples=8 --model hf/base

The file has JSON lines with `problem` or `question`, and `answer`; GSM8K's "... #### 18" is
understood. math-verify compares the last box, or what follows "answer is", with the wanted answer.
A number elsewhere in the text is no answer. Samples of one problem are inspect's epochs: `pass_at`
is the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374), and the majority vote counts equal
answers as one.

Blind to: the order of letters in words. math-verify reads `\text{live}` as a product of letters.
"""

from collections import Counter

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import (
    CORRECT,
    INCORRECT,
    Score,
    Scorer,
    ScoreReducer,
    Target,
    accuracy,
    pass_at,
    score_reducer,
    scorer,
    stderr,
    value_to_float,
)
from inspect_ai.solver import TaskState, generate, prompt_template
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

ASK = "{prompt}\n\nReason step by step, and put your final answer in \\boxed{{}}."
SECONDS = 5  # for parsing one answer, and for one comparison
ANSWERS = (
    LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),
    ExprExtractionConfig(try_extract_without_anchor=False),
)


@task
def problems(data: str, samples: int = 1, temperature: float | None = None, ask: str = ASK) -> Task:
    """Problems of a file, each sampled several times.

    Args:
        data: File of problems (JSON lines).
        samples: Answers to each problem. pass@k is shown for k = 1, 2, 4 and so on, and for all.
        temperature: Default: 0 for one sample, 0.7 for several.
        ask: The prompt, with {prompt} for the problem.
    """
    if samples > 1 and temperature == 0:
        raise ValueError("`temperature` must be above 0 for several samples, which would be equal")
    if temperature is None:
        temperature = 0.0 if samples == 1 else 0.7
    counts = {2**power for power in range(samples.bit_length())} | {samples}
    return Task(
        json_dataset(data, _sample),
        solver=[prompt_template(ask), generate()],
        scorer=math_verified(),
        epochs=Epochs(samples, [*(pass_at(k) for k in sorted(counts)), majority_vote()]),
        config=GenerateConfig(temperature=temperature),
    )


@scorer(metrics=[accuracy(), stderr()])
def math_verified() -> Scorer:
    """Whether the answer equals the target; no answer counts as wrong."""

    async def score(state: TaskState, target: Target) -> Score:
        text = state.output.completion
        # A model that boxes twice has changed its mind; math-verify would accept either box.
        last = text[text.rfind("\\boxed") :] if "\\boxed" in text else text
        found = parse(last, ANSWERS, parsing_timeout=SECONDS)
        if not found:
            return Score(value=INCORRECT, answer=None, explanation=f"no answer in: {text}")
        is_right = verify(_wanted(target.text), found, timeout_seconds=SECONDS)
        # All right answers are one vote, however they are written: 1/2 and 0.5.
        answer = target.text if is_right else str(found[0])
        return Score(value=CORRECT if is_right else INCORRECT, answer=answer, explanation=text)

    return score


@score_reducer(name="majority_vote")
def majority_vote() -> ScoreReducer:
    """1 if the most frequent answer is right, 0 if not; a tie of n answers counts 1/n if one is.

    inspect's own `mode` and `majority` vote on right and wrong, so a right answer would lose to
    several wrong ones that all differ.
    """
    as_float = value_to_float()

    def reduce(scores: list[Score]) -> Score:
        votes = Counter(one.answer for one in scores if one.answer is not None)
        if not votes:
            return Score(value=0.0, explanation="no answers")
        most = max(votes.values())
        winners = {answer for answer, count in votes.items() if count == most}
        right = {one.answer for one in scores if as_float(one.value) == 1 and one.answer in winners}
        return Score(value=len(right) / len(winners), answer=", ".join(sorted(winners)))

    return reduce


def _sample(record: dict) -> Sample:
    """A problem; a ValueError for a record without one, or with an unreadable answer."""
    problem = record.get("problem") or record.get("question")
    answer = str(record.get("answer") or "").rpartition("####")[2].strip().strip("$.").strip()
    if not problem or not answer or not _wanted(answer):
        raise ValueError(f"every row must have a problem and an answer, got {record}")
    return Sample(input=problem, target=answer)


def _wanted(answer: str) -> list:
    return parse(f"\\boxed{{{answer}}}", ANSWERS, parsing_timeout=SECONDS)
