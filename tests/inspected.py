# SPDX-License-Identifier: Apache-2.0
"""Runs tasks of recipes/inspect with mock models, in inspect's own environment.

Reads one job as JSON from each line of standard input and answers with one line. `replies` of a
job are lists of [text that the last message holds, reply] for `model` and `grader`. Imports
nothing from keylayers.
"""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location

from inspect_ai import eval as run
from inspect_ai.model import ModelOutput, ModelUsage, get_model


def mock(replies, prompts):
    """A model that answers by what the last message holds; several replies come in turn."""
    num_asked = {}

    def answer(messages, tools, tool_choice, config):
        text = messages[-1].text
        prompts.append({"text": text, "turn": len(messages), "temperature": config.temperature})
        matching = [reply for key, reply in replies if key in text]
        number = num_asked[text] = num_asked.get(text, -1) + 1
        output = ModelOutput.from_content("mockllm", matching[number % len(matching)])
        # Without usage the mock counts tokens with a vocabulary that it downloads.
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output

    return get_model("mockllm/model", custom_outputs=answer, memoize=False)


def evaluate(file, task, arguments, replies, folder):
    """Scores, metrics and prompts of one task; without replies the number of its samples."""
    spec = spec_from_file_location("recipe", file)
    recipe = module_from_spec(spec)
    spec.loader.exec_module(recipe)
    made = getattr(recipe, task)(**arguments)
    if replies is None:
        return {"num_samples": len(made.dataset)}
    prompts = {"model": [], "grader": []}
    models = {role: mock(replies[role], prompts[role]) for role in prompts}
    (log,) = run(
        made,
        model=models["model"],
        model_roles={"grader": models["grader"]},
        log_dir=folder,
        display="none",
        max_connections=1,
    )
    if log.status != "success":
        raise RuntimeError(log.error)
    return {
        "log": log.location,
        "prompts": prompts,
        "values": [next(iter(one.scores.values())).value for one in log.samples],
        "metrics": {
            f"{score.name} {score.reducer or ''} {key}": one.value
            for score in log.results.scores
            for key, one in score.metrics.items()
        },
    }


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            found = evaluate(**json.loads(line))
        except Exception as error:
            found = {"error": str(error)}
        answers.write(json.dumps(found) + "\n")
        answers.flush()
