# SPDX-License-Identifier: Apache-2.0
"""TRL's command line: a YAML file for `trl sft` and `trl dpo`. Checked with trl 1.16.

TRL reads a list with a single name as a regular expression. A full fine-tune uses PEFT's
`modules_to_save`, which also keeps a frozen copy of each module.
"""

from typing import Any

from keylayers.export.settings import Files, Settings, refuse, yaml_text


def export(settings: Settings) -> Files:
    """The part of the config that selects what is trained, without data and output folder."""
    content: dict[str, Any] = {"model_name_or_path": settings.model, "use_peft": True}
    if settings.fine_tune == "full":
        if settings.selection.is_of_mixture:
            refuse(
                "trl", "its full fine-tune of modules copies them, which PEFT cannot for experts"
            )
        content["lora_target_modules"] = "dummy-target-modules"  # in PEFT: no LoRA at all
        content["lora_modules_to_save"] = list(settings.names)
        return {"trl.yaml": yaml_text(content)}
    targets = settings.selection.lora_targets
    modules, parameters = targets["target_modules"], targets.get("target_parameters")
    if isinstance(modules, list) and len(modules) < 2:
        refuse(
            "trl",
            "in a mixture of experts it needs at least two modules other than experts and dense "
            "feed-forwards, since it reads a shorter list as a regular expression; choose peft",
        )
    content |= settings.lora_options("lora_r") | {"lora_target_modules": modules}
    if parameters:
        content["lora_target_parameters"] = parameters
    return {"trl.yaml": yaml_text(content)}
