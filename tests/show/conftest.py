"""Lets the tests import toy.py, which the browser tests copy beside their notebook."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
