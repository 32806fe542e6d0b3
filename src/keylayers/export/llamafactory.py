# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory: YAML with a list of full names. Checked with its 0.9.6.dev0 (commit ff6d4d12).

It accepts neither a regular expression nor parameters of experts, and its full fine-tuning can only
select whole blocks.
"""

from keylayers.export.settings import Files, Settings, refuse, yaml_text


def export(settings: Settings) -> Files:
    """The part of the config that selects what is trained."""
    if settings.fine_tune == "full":
        refuse("llamafactory", "without LoRA it can only train whole blocks; use `update` lora")
    if settings.selection.lora_targets.get("target_parameters"):
        refuse(
            "llamafactory",
            "it cannot name experts or the dense feed-forwards of such a model; choose peft or trl",
        )
    content = {
        "model_name_or_path": settings.model,
        "finetuning_type": "lora",
        **settings.lora_options(),
        "lora_target": list(settings.names),
    }
    return {"llamafactory.yaml": yaml_text(content)}
