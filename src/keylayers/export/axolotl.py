# SPDX-License-Identifier: Apache-2.0
r"""axolotl: YAML for LoRA, or for a full fine-tune with `unfrozen_parameters`.

Checked against functions of axolotl 0.18.0 (commit 067b021), not in a whole run. It escapes the
dots in `unfrozen_parameters` itself and matches from the start of a name, so `\.` would match
nothing and freeze the whole model. `lora_target_linear` is left out because it would add every
linear layer to the selection.
"""

from collections.abc import Collection, Sequence
from typing import Any

from keylayers.export.settings import Files, Settings, yaml_text
from keylayers.ranking.targets import by_block


def export(settings: Settings) -> Files:
    """The part of the config that selects what is trained."""
    content: dict[str, Any] = {"base_model": settings.model}
    if settings.fine_tune == "full":
        content["unfrozen_parameters"] = _unfrozen(settings.names, settings.selection.stacked or ())
        content["gradient_checkpointing"] = True
        content["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    else:
        content |= {"adapter": "lora", **settings.lora_options("lora_r", "lora_")}
        targets = settings.selection.lora_targets
        content |= {f"lora_{name}": value for name, value in targets.items() if value}
    return {"axolotl.yaml": yaml_text(content)}


def _unfrozen(names: Sequence[str], stacked: Collection[str]) -> list[str]:
    """Patterns of the parameters of `names`; names that differ only in their block share one."""
    parameters = [name if name in stacked else f"{name}.(weight|bias)" for name in names]
    patterns = []
    for (prefix, suffix), indices in by_block(parameters).items():
        number = indices[0] if len(indices) == 1 else f"({'|'.join(indices)})"
        patterns.append(f"^{prefix}{number}{suffix}$")
    return patterns
