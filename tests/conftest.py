"""The day that decides which techniques are tried together (test_pairs.py), the same in all processes of a run."""

import datetime
import os

os.environ.setdefault("EKE_COVERING", datetime.date.today().isoformat())
