"""`python -m openpi_flash_models.golden DIR`: prints by how much both backends differ from openpi's own numbers."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from openpi_flash_models.errors import ModelsError
from openpi_flash_models.golden.cases import check_cases
from openpi_flash_models.golden.compare import BACKENDS, Difference, GoldenModel
from openpi_flash_models.golden.planner import check_planners
from openpi_flash_models.golden.policies import check_policies
from openpi_flash_models.golden.transforms import check_transforms

MODEL_CHECKS: tuple[Callable[[GoldenModel], Iterator[Difference]], ...] = (check_cases, check_policies, check_planners)
"""Checks of one model's folder. A check yields nothing where the folder holds no files for it."""

FOLDER_CHECKS: tuple[Callable[[Path], Iterator[Difference]], ...] = (check_transforms,)
"""Checks of what needs no model, given DIR."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 within the tolerances, 1 beyond them or with nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m openpi_flash_models.golden", description=__doc__)
    parser.add_argument("dir", type=Path, help="one folder per model, each with config.json, weights and caseN.npz")
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    options = parser.parse_args(arguments)
    try:
        differences = list(run(options.dir, BACKENDS if options.backend == "both" else [options.backend]))
    except (ModelsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if not differences:
        print(f"{options.dir}: holds no golden data", file=sys.stderr)
        return 1
    print(table(differences))
    failed = [difference for difference in differences if not difference.passes]
    print(f"{len(differences) - len(failed)} of {len(differences)} comparisons within tolerance")
    return 1 if failed else 0


def run(folder: Path, backend_names: Sequence[str] = BACKENDS) -> Iterator[Difference]:
    """All differences of the models in `folder`, or of the one model that it is."""
    for check_folder in FOLDER_CHECKS:
        yield from check_folder(folder)
    for path in [folder] if (folder / "config.json").is_file() else sorted(folder.glob("*/config.json")):
        model = GoldenModel(path if path.is_dir() else path.parent, backend_names)
        for check_model in MODEL_CHECKS:
            yield from check_model(model)


def table(differences: Iterable[Difference]) -> str:
    """The worst difference of each quantity and subject, and where it was."""
    worst: dict[tuple[str, str, float], Difference] = {}
    for difference in differences:
        key = (difference.quantity, difference.subject, difference.tolerance)
        if key not in worst or difference.value > worst[key].value:
            worst[key] = difference
    header = ("quantity", "of", "largest difference", "tolerance", "", "where")
    rows = [header]
    for item in sorted(worst.values(), key=lambda item: (item.quantity, item.subject)):
        verdict = "ok" if item.passes else "TOO FAR"
        rows.append((item.quantity, item.subject, f"{item.value:.1e}", f"{item.tolerance:.0e}", verdict, item.where))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
