"""Lets tests import the techniques beside them by name, as a command line does that builds one from its class path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
