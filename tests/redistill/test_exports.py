"""The names that `import redistill` exports, and that it does not import torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import redistill


@pytest.mark.parametrize("name", redistill.__all__)
def test_every_exported_name_exists(name):
    assert getattr(redistill, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = redistill.nothing


def test_importing_redistill_does_not_import_torch():
    """Processes that index a source import this package; torch would cost each of them seconds."""
    code = "import sys, redistill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
