"""One input of a fuzzing target: files and arguments. A file of JSON keeps it."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """`action`: what the target does with it.

    `files`: {path in the case's folder: bytes, or None for a folder}, laid over a copy of the
    prepared folder that `base` names ("": none). `arguments`: of the action."""

    action: str
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    base: str = ""

    def lay_out(self, folder: Path, bases: Mapping[str, Path]) -> None:
        """Makes `folder`, which must not exist, with the files of the case."""
        if self.base:
            shutil.copytree(bases[self.base], folder)
        else:
            folder.mkdir()
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None and not path.is_dir():
                path.unlink(missing_ok=True)
                path.mkdir()
            elif content is None or path.is_dir():
                continue  # a folder stays one
            else:
                path.write_bytes(content)

    def save(self, path: Path) -> None:
        files = {
            name: None if content is None else base64.b64encode(content).decode()
            for name, content in self.files.items()
        }
        path.write_text(
            json.dumps({"action": self.action, "arguments": self.arguments, "base": self.base, "files": files})
        )

    @classmethod
    def read(cls, path: Path) -> Case:
        stored = json.loads(path.read_text())
        files = {
            name: None if content is None else base64.b64decode(content) for name, content in stored["files"].items()
        }
        return cls(stored["action"], files, tuple(stored["arguments"]), stored["base"])
