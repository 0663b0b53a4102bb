"""The readers of small files of pylo_dist/weights/texts.py, without the package around them: that
would bring PyTorch along, and resume_loop.sh reads recipes.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def _module() -> ModuleType:
    """The package's file, run by itself. Raises ModuleNotFoundError where there is no package."""
    package = find_spec("pylo_dist")  # imports nothing
    if package is None or package.submodule_search_locations is None:
        raise ModuleNotFoundError(
            "No module named 'pylo_dist'; install it from the folder above launch/: pip install "
            "'.[launch]', or launch/setup.sh launch",
            name="pylo_dist",
        )
    file = Path(package.submodule_search_locations[0]) / "weights" / "texts.py"
    spec = spec_from_file_location("pylo_dist_texts", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_texts = _module()
read_text, parse_json, read_json = _texts.read_text, _texts.parse_json, _texts.read_json
