"""The directive `options`: a table of every option, from the configuration itself, so that no page can lag behind it."""

from collections.abc import Iterator
from itertools import groupby

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from layerwise.config import Config, Option, options


class Options(SphinxDirective):
    """One table for each section of the configuration."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(tables()), allow_section_headings=True)


def tables() -> Iterator[str]:
    """The tables, in Markdown."""
    for section, members in groupby(options(), key=lambda option: option.key.rpartition(".")[0]):
        yield f"\n## {f'`{section}`' if section else 'The run'}\n"
        if section:
            yield f"{Config.model_fields[section].annotation.__doc__}\n"
        yield "| option | flag | meaning | default | may change |"
        yield "| --- | --- | --- | --- | --- |"
        yield from map(row, members)


MAY_CHANGE = {"shape": "in a new run", "training": "with `--from-stage`", "place": "at any time"}


def row(option: Option) -> str:
    flag = f"`{option.flag}`" if option.flag else ""
    meaning = option.help.replace("|", "\\|")
    return f"| `{option.key}` | {flag} | {meaning} | {shown(option.default)} | {MAY_CHANGE[option.scope]} |"


def shown(default: object) -> str:
    """As it would be typed; nothing where there is no default value."""
    if default in (None, "", ()):
        return ""
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
