# SPDX-License-Identifier: Apache-2.0
"""ILA: the gates that gradient descent learns on what a fine-tune added.

    minimise over s   E[ L(θ_0 + sigmoid(s) ⊙ Δθ_t) ]        score_i = s_i

Source: Shi, Lu, Dong, Zhang, Zhang, Wu: "Understanding Layer Significance in LLM Alignment", COLM
    2025, arXiv:2410.17875. We have only its abstract and reviews; the formula, the initial scores
    (4, 2, 1) and the dropped constraint `‖γ‖ < H` are from memory of its text.
Differs: we do not know the paper's optimiser and learning rate; plain SGD is the default because it
    ranks better than Adam by the mask curve (experiments/LOG.md). Stage 1 ends when two windows of
    the training loss agree.
Cost: per mask step one forward and one backward pass for activations; the memory of the frozen
    model.
Blind to: the constraint that the relaxation drops. At a stationary point of stage 1 the gradient at
    γ = 1 is zero, so the scores follow curvature and noise; and modules that can replace each
    other share the credit by chance.
"""

from keylayers.scores.learning import learn_scores
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import IlaOptions
from keylayers.scores.task import Task


def ila(task: Task, options: IlaOptions) -> ModuleScores:
    """The learned score of each update's module, as published."""
    return learn_scores(task, options, initial_score=options.initial_score)
