"""Entry point: parses the command line and maps errors to one readable line."""

import argparse
import importlib
import sys

COMMANDS = {
    "serve": ("serve", "run the configured services and the gateway on this machine"),
    "demo": ("demo", "make a tiny random checkpoint, serve it and drive it with camera-like pictures"),
    "test": ("latency", "time a running server: one warm-up and five timed calls"),
    "prepare-checkpoint": ("prepare", "fetch weights and normalisation statistics into a folder to serve"),
    "prepare-planner-checkpoint": ("prepare_planner", "fetch and unpack a planner's checkpoint into a folder to serve"),
    "bench": ("bench", "time the model on this machine, beside what the machine would allow"),
    "convert-checkpoint": ("convert", "turn an Orbax checkpoint of openpi into model.safetensors"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="openpi-flash", description="Real-time inference for openpi robot policies.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for command, (module_name, summary) in COMMANDS.items():
        modules[command] = importlib.import_module(f"openpi_flash_cli.{module_name}")
        parser_of_command = subparsers.add_parser(command, help=summary, description=f"{summary.capitalize()}.")
        modules[command].add_arguments(parser_of_command)
    arguments = parser.parse_args()
    try:
        sys.exit(modules[arguments.command].run(arguments))
    except KeyboardInterrupt:
        sys.exit(130)
    except expected_errors() as error:
        print(f"openpi-flash {arguments.command}: {error}", file=sys.stderr)
        sys.exit(1)


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message tells a person what to do; anything else is a fault of ours and shows its traceback."""
    from openpi_flash_client import PolicyError
    from openpi_flash_common.settings import SettingsError
    from openpi_flash_models.errors import ModelsError

    return (ModelsError, PolicyError, SettingsError, OSError)


if __name__ == "__main__":
    main()
