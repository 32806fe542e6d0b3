# SPDX-License-Identifier: Apache-2.0
"""ms-swift: a YAML file of arguments for `swift sft`. Checked with 4.6.0.dev0 (3602360a).

It matches `trainable_parameters` with the start of each name: the final dot makes sure that
`...layers.1.mlp.up_proj.` matches that module only.
"""

from typing import Any

from keylayers.export.settings import Files, Settings, refuse, yaml_text
from keylayers.ranking.targets import target_regex


def export(settings: Settings) -> Files:
    """The part of the arguments that selects what is trained."""
    if settings.selection.is_of_mixture:
        refuse("ms-swift", "in a mixture of experts PEFT widens regular expressions; choose peft")
    content: dict[str, Any] = {"model": settings.model, "tuner_type": settings.fine_tune}
    if settings.fine_tune == "full":
        content["freeze_parameters_ratio"] = 1
        content["trainable_parameters"] = [f"{name}." for name in settings.names]
    else:
        content |= settings.lora_options() | {"target_regex": target_regex(settings.names)}
    return {"ms-swift.yaml": yaml_text(content)}
