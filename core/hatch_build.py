"""Puts the templates of the checkout into the wheel, whether it is built from the checkout or from an sdist."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Templates(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # eke finds them in the checkout
        core = Path(self.root)
        inside = core / "templates"  # of an sdist, where this hook put them
        source = inside if inside.exists() else core.parent / "templates"
        home = "eke/_templates" if self.target_name == "wheel" else "templates"
        for file in sorted(source.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                build_data["force_include"][str(file)] = f"{home}/{file.relative_to(source).as_posix()}"
