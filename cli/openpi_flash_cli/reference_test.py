"""docs/configuration.md against the code that it is made from."""

import re
from pathlib import Path

from openpi_flash_common.settings import EngineSettings, load_settings

from openpi_flash_cli.edge import find_binary
from openpi_flash_cli.reference import page

PAGE = Path(__file__).parents[2] / "docs/configuration.md"


def test_is_up_to_date():
    binary = find_binary()
    assert binary is not None
    assert PAGE.read_text() == page(binary), "run `make docs`"


def test_has_every_field_with_a_meaning():
    def leaves(node: dict, path: str = "") -> set[str]:
        return {
            leaf
            for name, value in node.items()
            for leaf in (leaves(value, f"{path}{name}.") if isinstance(value, dict) and value else {path + name})
        }

    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \| .*? \| (.+?) \| `OPENPI_", PAGE.read_text(), re.MULTILINE)
    fields = EngineSettings.model_validate(
        {
            "action": {"model_config_name": "pi05_droid", "checkpoint_dir": "/c"},
            "planner": {"checkpoint_dir": "/p"},
        }
    )
    assert leaves(fields.model_dump()) <= {name for name, _, _ in rows}
    assert all(kind and meaning for _, kind, meaning in rows)


def test_named_variables_are_the_ones_that_are_read():
    variables = re.findall(r"`gateway\.images\.quality` .* `(OPENPI_\w+)` \|$", PAGE.read_text(), re.MULTILINE)
    environ = {
        variables[0]: "35",
        "OPENPI_ACTION__MODEL_CONFIG_NAME": "pi05_droid",
        "OPENPI_ACTION__CHECKPOINT_DIR": "/c",
    }
    assert load_settings(environ=environ).gateway.images.quality == 35


def test_the_programs_options_are_there():
    text = PAGE.read_text()
    for option in ("--action-upstream", "--max-message-bytes", "<SERVER>", "--insecure-skip-verify"):
        assert f"| `{option}` |" in text
    assert "`~/.local/state/openpi-flash`" in text
