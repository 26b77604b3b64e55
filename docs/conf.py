"""Settings of the pages: `make docs`."""

import logging
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The API pages import the packages, and these the libraries; a GPU is not needed for that.
os.environ["DS_ACCELERATOR"] = "cpu"
warnings.filterwarnings("ignore")
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

project = "Headway"
author = "the Headway contributors"
copyright = "the Headway contributors; Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docs.extensions.commands",
    "docs.extensions.config_keys",
]
exclude_patterns = ["_build", "README.md"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types of other libraries, and names of ours on no page of the reference, have no place to link to.
nitpick_ignore_regex = [("py:.*", ".*")]

html_theme = "furo"
html_title = "Headway"
html_copy_source = False
html_show_sphinx = False
