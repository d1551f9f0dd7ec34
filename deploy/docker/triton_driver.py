"""`triton_driver.py OUT`: compiles Triton's driver.c into OUT with its own flags, on a machine without a GPU."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import _build


def main(out: Path) -> None:
    source = Path(driver.dirname) / "driver.c"
    with tempfile.TemporaryDirectory() as folder:
        make_driver(Path(folder), source.read_text())
        out.mkdir(exist_ok=True)
        _build("cuda_utils", str(source), str(out), [folder], driver.include_dirs, driver.libraries, [])


def make_driver(folder: Path, source: str) -> None:
    """A libcuda.so.1 to link with: it has every function that the source names, and none does anything."""
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w+", source)))
    stubs = folder / "driver.c"
    stubs.write_text("".join(f"void {name}(void) {{}}\n" for name in functions))
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", stubs]
    subprocess.run(command, check=True)  # noqa: S603 - no input of anybody's


if __name__ == "__main__":
    main(Path(sys.argv[1]))
