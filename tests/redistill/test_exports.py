"""What `import redistill` offers, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

import redistill


@pytest.mark.parametrize("name", redistill.__all__)
def test_everything_announced_is_there(name):
    assert getattr(redistill, name) is not None


def test_nothing_else_is_invented():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = redistill.nothing


def test_importing_redistill_waits_for_no_torch():
    """Processes that index a source import this package; torch would cost each of them seconds."""
    code = "import sys, redistill; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
