"""Leave behind what running the template in place has left in it."""

import shutil
from pathlib import Path

for name in ("__pycache__", ".pytest_cache", "runs", ".venv"):
    for folder in list(Path(".").rglob(name)):
        shutil.rmtree(folder, ignore_errors=True)
