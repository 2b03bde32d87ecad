"""Sphinx's configuration: `python -m sphinx -W -b html docs build/site`.

What is not written here is generated before the pages are read, into docs/generated: the reference from
docstrings, the stored results, the benchmarks, the notebooks.
"""

import os
import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # the notebooks' pictures

metadata = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
project = "stochsolvers"
author = copyright = "The stochsolvers developers"
release = version = metadata["version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "_site.docstrings",
    "_site.generate",
]
repository_url = metadata["urls"]["Repository"]

# Markdown: the examples run in the tests, which compare what they print; the notebooks run here
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
suppress_warnings = [
    "mystnb.unknown_mime_type",
    "ref.python",  # fields of one name in several classes, which Napoleon makes links
]

# the reference
highlight_language = "none"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"stochsolvers {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_site", "build", "**/.ipynb_checkpoints"]
copybutton_exclude = ".linenos, .gp, .go"
