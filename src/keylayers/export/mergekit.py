# SPDX-License-Identifier: Apache-2.0
"""mergekit: a YAML file that keeps a fine-tune in exactly the selected modules.

Checked with mergekit 0.1.5 (https://github.com/arcee-ai/mergekit). Its filters match any part of a
tensor's name, the first that matches counts, and one that matches nothing is passed over. So a
filter is a module's full name with the final dot, which keeps `layers.1.` out of `layers.11.` and
`up_proj.` out of `up_proj_2.`.
"""

from typing import Any

from keylayers.errors import ConfigError
from keylayers.export.settings import Files, Settings, refuse, yaml_text

_HEAD = """\
# The fine-tune in {count} of {num_ranked} modules; everything else has the weights of the base.
#   mergekit-yaml mergekit.yaml merged{cache}
# ties, dare_ties, dare_linear and della take the same weights. linear copies instead of adding a
# difference, so nothing is rounded; only linear reads the weights of the base.
"""


def export(settings: Settings) -> Files:
    """The config of a merge of the base and the ranked update."""
    if settings.fine_tune == "full":
        refuse("mergekit", "nothing is trained: leave `update` out")
    if settings.selection.is_of_mixture:
        refuse("mergekit", "it has names of its own for the layers of a mixture of experts")
    filters = [f"{name}." for name in settings.names]
    base, tuned = _models(settings)

    def entry(model: str, inside: int, outside: int) -> dict[str, Any]:
        weights: list[dict[str, Any]] = [{"filter": own, "value": inside} for own in filters]
        return {"model": model, "parameters": {"weight": [*weights, {"value": outside}]}}

    content = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [entry(base, 0, 1), entry(tuned, 1, 0)],
    }
    _check_filters(filters, settings)
    cache = "" if settings.update.tuned else " --lora-merge-cache merged-adapter"
    head = _HEAD.format(count=len(filters), num_ranked=len(settings.ranked), cache=cache)
    return {"mergekit.yaml": head + yaml_text(content)}


def _models(settings: Settings) -> tuple[str, str]:
    """The base and the tuned model, in mergekit's form: `model@revision` and `model+adapter`."""
    update = settings.update.tuned or settings.update.adapter
    if update is None:
        raise ConfigError(
            "`to` mergekit needs the update that was ranked, an adapter or a tuned checkpoint, but "
            "the ranking names none that is there; export from the folder that `rank` wrote"
        )
    for name in (settings.model, update):
        if "+" in name or "@" in name:
            refuse("mergekit", f"it reads + and @ in {name!r} as separators; rename the folder")
    base = f"{settings.model}@{settings.revision}" if settings.revision else settings.model
    return base, update if settings.update.tuned else f"{base}+{update}"


def _check_filters(filters: list[str], settings: Settings) -> None:
    """Refuse names of which one contains another, such as those of two towers."""
    selected = set(settings.names)
    for name in settings.ranked:
        hit = next((own for own in filters if own in f"{name}."), None)
        if hit is not None and name not in selected:
            refuse("mergekit", f"its filter {hit!r} would match {name} too")
