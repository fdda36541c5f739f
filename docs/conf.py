"""How the pages of docs/ become a site: `make docs`. Nothing is fetched, and a warning is an error."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

from layerwise.version import __version__  # noqa: E402

project = "layerwise"
author = "the layerwise maintainers"
copyright = "the layerwise maintainers"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "option_reference", "python_reference"]
exclude_patterns = ["_build"]
default_role = "literal"  # docstrings are written with single backticks
smartquotes = False  # options begin with two hyphens

myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 100

html_theme = "furo"
html_title = "layerwise"
