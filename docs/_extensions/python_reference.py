"""The directive `public-api`: what `layerwise.__all__` names, from its docstrings.

Each name is looked up by itself: the package finds them when they are first used, so listing it would find none.
"""

import inspect

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import layerwise

SHORT = {"Config": "Config(**sections)"}
"""Signatures that say it better: the options of a configuration fill a page of their own."""


class PublicApi(SphinxDirective):
    """Functions first, in the order of the package's own example, then what they take and give."""

    def run(self) -> list[nodes.Node]:
        public = {name: getattr(layerwise, name) for name in layerwise.__all__ if not name.startswith("_")}
        functions = [name for name, value in public.items() if inspect.isfunction(value)]
        classes = [name for name in public if name not in functions]
        text = "\n".join(
            (
                "## Functions\n",
                *(f"```{{eval-rst}}\n.. autofunction:: layerwise.{name}\n```\n" for name in functions),
                "## What they take and give\n",
                *(f"```{{eval-rst}}\n.. autoclass:: layerwise.{SHORT.get(name, name)}\n```\n" for name in classes),
            )
        )
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("public-api", PublicApi)
    return {"parallel_read_safe": True}
