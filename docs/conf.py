"""How Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import os

import mopefuse

project = "mopefuse"
author = "the mopefuse authors"
release = mopefuse.__version__
html_show_copyright = False
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"mopefuse {release}"
templates_path: list[str] = []
exclude_patterns = ["_build"]

# Markdown. Straight quotes: `--set` must not become a dash.
smartquotes = False
myst_heading_anchors = 3

# The notebook is committed without outputs and executed when the pages are built.
nb_execution_mode = os.environ.get("DOCS_NOTEBOOK", "auto")
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_execution_timeout = 600
nb_output_stderr = "remove"  # progress

# The Python reference. Public names are imported on first use, so autodoc needs them resolved.
for name in mopefuse.__all__:
    setattr(mopefuse, name, getattr(mopefuse, name))
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False
default_role = "code"

# Every internal reference must resolve; other libraries' documentation cannot be reached offline.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!mopefuse\.).*"), ("py:class", r"mopefuse\..*")]
linkcheck_ignore = [r"https://github.com/mopefuse/.*"]
