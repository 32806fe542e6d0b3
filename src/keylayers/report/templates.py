# SPDX-License-Identifier: Apache-2.0
"""The Jinja templates below page/: HTML reports, a study's page and the model card."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_templates(**settings: Any) -> Environment:
    """The templates; `settings` are further arguments of Jinja's Environment."""
    return Environment(
        loader=PackageLoader("keylayers.report", "page"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )
