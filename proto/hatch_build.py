"""Generates the Python stubs (messages, typing stubs, services) from the .proto files when the package is built."""

from pathlib import Path
from typing import Any

from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class GenerateStubs(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        out = root / "python"
        out.mkdir(exist_ok=True)
        sources = sorted(str(path.relative_to(root)) for path in root.glob("openpi_flash/**/*.proto"))
        well_known = str(Path(protoc.__file__).parent / "_proto")
        outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{root}", f"-I{well_known}", *outputs, *sources]) != 0:
            raise RuntimeError(f"protoc failed on {sources}")
        (out / "openpi_flash" / "v1" / "py.typed").touch()
