"""How sphinx builds the site: sphinx-build -W --keep-going docs FOLDER. The pages are those of this
folder, the reference is the docstrings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "pylo_dist"
html_title = project
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
default_role = "code"  # `names` in docstrings
html_theme = "furo"
myst_heading_anchors = 3
autodoc_mock_imports = ["lightning"]  # asked for by one class, and large
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
