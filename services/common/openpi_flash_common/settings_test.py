"""Settings from file and environment, and errors that a person can act on."""

import json

import pytest
from pydantic import BaseModel, ValidationError

from openpi_flash_common.settings import (
    ActionSettings,
    AuthSettings,
    EngineSettings,
    IntervalCadence,
    SettingsError,
    load_settings,
)

ACTION = {"model_config_name": "pi05_droid", "checkpoint_dir": "/checkpoint"}
PLANNER = {"checkpoint_dir": "/planner"}


def action(**changes):
    return {"action": {**ACTION, **changes}}


def planner(**changes):
    return {"planner": {**PLANNER, **changes}}


def load(settings, tmp_path, **environ):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    return load_settings(path, environ)


def problems(settings, tmp_path, **environ) -> list[str]:
    """The lines of the error, without the headline."""
    with pytest.raises(SettingsError) as caught:
        load(settings, tmp_path, **environ)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_defaults_are_the_documented_ones(tmp_path):
    settings = load({"action": ACTION}, tmp_path)
    assert (settings.mode, settings.slots) == ("action_only", ("action",))
    assert settings.action_transport.model_dump(mode="json") == {
        "websocket_port": 8000,
        "quic_port": 5555,
        "unix_socket_path": "/tmp/openpi-action.sock",  # noqa: S108
    }
    assert settings.planner_transport.model_dump(mode="json") == {
        "websocket_port": 8002,
        "quic_port": 5556,
        "unix_socket_path": "/tmp/openpi-planner.sock",  # noqa: S108
    }
    assert (settings.gateway.grpc_port, settings.action_address) == (50051, "127.0.0.1:50052")
    assert not settings.telemetry.metrics
    assert settings.telemetry.otlp_endpoint is None
    assert settings.data_home.is_absolute()


def test_the_mode_follows_from_what_is_configured(tmp_path):
    assert load({"planner": PLANNER}, tmp_path).mode == "planner_only"
    combined = load({"action": ACTION, "planner": PLANNER}, tmp_path)
    assert (combined.mode, combined.slots) == ("combined", ("action", "planner"))
    assert problems({}, tmp_path) == ["nothing to serve: at least one of the sections action and planner is needed"]


def test_the_environment_overrides_the_file(tmp_path):
    settings = load(
        {"action": ACTION, "log": {"level": "debug"}},
        tmp_path,
        OPENPI_ACTION__CHECKPOINT_DIR="gs://bucket/checkpoint",
        OPENPI_ACTION__NUM_STEPS="5",
        OPENPI_ACTION__WARM_UP__BATCH_SIZES="[1, 2]",
        OPENPI_ACTION__DEFAULT_PROMPT="[fold] the towel",
        OPENPI_GATEWAY__AUTH__TOKENS='["t"]',
        OPENPI_GATEWAY__TLS='{"cert_file": "a", "key_file": "b"}',
        OPENPI_TELEMETRY__METRICS="true",
        OPENPI_LOG__FORMAT="json",
        OPENPI_LOG__LEVEL="",
        OPENPI_DATA_HOME="/cache",
        OPENPI_PYTORCH_COMPILE_MODE="max-autotune",
    )
    assert settings.action is not None
    assert settings.gateway.tls is not None
    assert settings.action.checkpoint_dir == "gs://bucket/checkpoint"
    assert settings.action.num_steps == 5
    assert settings.action.warm_up.batch_sizes == (1, 2)
    assert settings.action.default_prompt == "[fold] the towel"
    assert str(settings.gateway.tls.key_file) == "b"
    assert settings.telemetry.metrics
    assert (settings.log.format, settings.log.level) == ("json", "debug")
    assert str(settings.data_home) == "/cache"
    assert settings.pytorch_compile_mode == "max-autotune"


def test_null_in_the_environment_takes_a_value_away(tmp_path):
    settings = load({"action": ACTION, "planner": PLANNER}, tmp_path, OPENPI_PLANNER="null")
    assert settings.mode == "action_only"


def test_the_environment_alone_is_enough():
    environ = {f"OPENPI_ACTION__{key.upper()}": value for key, value in ACTION.items()}
    assert load_settings(environ=environ).mode == "action_only"


def test_the_file_can_be_named_by_the_environment(tmp_path):
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps({"action": ACTION}))
    assert load_settings(environ={"INFERENCE_CONFIG_PATH": str(path)}).action == ActionSettings(**ACTION)


def test_variables_of_others_are_no_concern(tmp_path):
    # Kubernetes makes these for a service named openpi-flash.
    load({"action": ACTION}, tmp_path, OPENPI_FLASH_SERVICE_HOST="10.0.0.1", OPENPI_FLASH_PORT="tcp://10.0.0.1:80")


@pytest.mark.parametrize(
    ("settings", "environ", "expected"),
    [
        (action(chekpoint_dir="/x"), {}, "action.chekpoint_dir: unknown key; did you mean checkpoint_dir?"),
        ({"action": ACTION, "gatway": {}}, {}, "gatway: unknown key; did you mean gateway?"),
        ({"action": ACTION, "log": {"zzz": 1}}, {}, "log.zzz: unknown key; known keys are level, format"),
        (
            {"action": ACTION},
            {"OPENPI_ACTION__CHEKPOINT_DIR": "/x"},
            "OPENPI_ACTION__CHEKPOINT_DIR: unknown key; did you mean checkpoint_dir?",
        ),
        (action(), {"OPENPI_GATWAY__HOST": "h"}, "OPENPI_GATWAY__HOST: unknown key; did you mean gateway?"),
        ({"action": {"model_config_name": "x"}}, {}, "action.checkpoint_dir: required, but not set"),
        (action(), {"OPENPI_ACTION__NUM_STEPS": "many"}, "OPENPI_ACTION__NUM_STEPS: Input should be a valid integer"),
        (action(num_steps=101), {}, "action.num_steps: Input should be less than or equal to 100"),
        (action(backend="tf"), {}, "action.backend: Input should be 'auto', 'torch' or 'jax'"),
        (action(grpc_port=70000), {}, "action.grpc_port: Input should be less than or equal to 65535"),
        (action(), {"OPENPI_PYTORCH_COMPILE_MODE": "fast"}, "OPENPI_PYTORCH_COMPILE_MODE: Input should be 'default'"),
        (planner(cadence="often"), {}, 'planner.cadence: expected "every_request", "background" or'),
        (planner(cadence={"interval_ms": 0}), {}, "planner.cadence.interval_ms: Input should be greater"),
        (
            planner(generation_prompt_format="Task: {tsk}"),
            {},
            "planner.generation_prompt_format: must hold {task} and no other placeholder",
        ),
        (
            planner(action_prompt_template="{task}"),
            {},
            "planner.action_prompt_template: must hold {task} and {subtask} and no other placeholder",
        ),
        (
            planner(action_prompt_template="{task.__class__}{subtask}"),
            {},
            "planner.action_prompt_template: must hold {task} and {subtask} and no other placeholder",
        ),
        (planner(generation_prompt_format="{task"), {}, "planner.generation_prompt_format: not a valid template"),
        (
            {"action": ACTION, "gateway": {"action": {"client_key_file": "k"}}},
            {},
            "gateway.action: client_cert_file and client_key_file go together",
        ),
    ],
)
def test_each_problem_is_one_readable_line(settings, environ, expected, tmp_path):
    (problem,) = problems(settings, tmp_path, **environ)
    assert problem.startswith(expected)


def test_all_problems_are_told_at_once(tmp_path):
    found = problems({"action": {"num_steps": 0, "x": 1}}, tmp_path)
    assert [line.split(":")[0] for line in found] == [
        "action.model_config_name",
        "action.checkpoint_dir",
        "action.num_steps",
        "action.x",
    ]


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object"), (None, "No such file")]
)
def test_files_that_cannot_be_read(content, message, tmp_path):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        load_settings(path, {})


def test_a_cadence_of_every_kind(tmp_path):
    for given, parsed in [("background", "background"), ({"interval_ms": 500}, IntervalCadence(interval_ms=500))]:
        planner = load({"planner": {**PLANNER, "cadence": given}}, tmp_path).planner
        assert planner is not None
        assert planner.cadence == parsed
    from_environment = load({"planner": PLANNER}, tmp_path, OPENPI_PLANNER__CADENCE='{"interval_ms": 7}').planner
    assert from_environment is not None
    assert from_environment.cadence == IntervalCadence(interval_ms=7)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", "127.0.0.1:50052"),  # noqa: S104
        ("::", "[::1]:50052"),
        ("[::]", "[::1]:50052"),
        ("10.1.2.3", "10.1.2.3:50052"),
        ("robot.local", "robot.local:50052"),
    ],
)
def test_where_the_gateway_finds_the_action_service(host, address, tmp_path):
    assert load(action(host=host), tmp_path).action_address == address
    elsewhere = load({"action": ACTION, "gateway": {"action": {"address": "gpu:1"}}}, tmp_path)
    assert elsewhere.action_address == "gpu:1"
    assert elsewhere.planner_address is None
    planner = load({"planner": PLANNER, "gateway": {"planner": {"address": "a:1,b:2"}}}, tmp_path)
    assert (planner.action_address, planner.planner_address) == (None, "a:1,b:2")
    assert load({"planner": PLANNER}, tmp_path).planner_address == "127.0.0.1:50053"


def test_tokens_come_from_both_places_and_are_never_shown(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("one\n\n  two \n")
    auth = AuthSettings.model_validate({"tokens": ["three"], "tokens_file": str(file)})
    assert auth.load_tokens() == {"one", "two", "three"}
    assert "three" not in repr(auth)
    assert "hunter2" not in "".join(problems({"gateway": {"auth": {"tokens": "hunter2"}}}, tmp_path))


def test_auth_without_any_token_is_an_error(tmp_path):
    with pytest.raises(SettingsError, match="no token is configured"):
        AuthSettings().load_tokens()
    with pytest.raises(SettingsError, match=r"auth\.tokens_file: .*absent: No such file"):
        AuthSettings(tokens_file=tmp_path / "absent").load_tokens()


def test_settings_are_frozen_and_every_field_is_described(tmp_path):
    settings = load({"action": ACTION}, tmp_path)
    with pytest.raises(ValidationError):
        settings.action = None  # type: ignore[misc]
    undescribed = []
    sections: list[type[BaseModel]] = [EngineSettings]
    for section in sections:
        assert section.__doc__
        for name, field in section.model_fields.items():
            if not field.description:
                undescribed.append(f"{section.__name__}.{name}")
            sections += [kind for kind in _models(field.annotation) if kind not in sections]
    assert not undescribed
    assert len(sections) > 10


def _models(annotation) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _models(part)]
