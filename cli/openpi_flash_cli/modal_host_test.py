"""What the Modal apps read from the environment, and the token that they share with robots."""

import json

import pytest
from openpi_flash_common.settings import SettingsError, load_settings

from openpi_flash_cli import modal_host

RELAY = {"QUIC_RELAY_IP": "203.0.113.7", "QUIC_RELAY_KEY": "k"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (None, False, "")),
        (RELAY, (("203.0.113.7", 3479), False, "k")),
        (RELAY | {"QUIC_RELAY_IP": "203.0.113.7:53", "QUIC_RELAY_ONLY": "1"}, (("203.0.113.7", 53), True, "k")),
        (RELAY | {"QUIC_RELAY_ONLY": "false"}, (("203.0.113.7", 3479), False, "k")),
    ],
)
def test_relay(environ, expected):
    found = modal_host.relay_from(environ)
    assert (found["relay"], found["relay_only"], found["relay_key"]) == expected


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"QUIC_RELAY_ONLY": "1"}, "QUIC_RELAY_ONLY: is set, but"),
        (RELAY | {"QUIC_RELAY_ONLY": "maybe"}, "QUIC_RELAY_ONLY: expected"),
        (RELAY | {"QUIC_RELAY_IP": "1.2.3.4:x"}, "QUIC_RELAY_IP: expected"),
        ({"QUIC_RELAY_IP": "1.2.3.4"}, "QUIC_RELAY_KEY: not set"),
    ],
)
def test_relay_settings_that_contradict(environ, problem):
    with pytest.raises(SettingsError, match=problem):
        modal_host.relay_from(environ)


@pytest.fixture
def store(monkeypatch, tmp_path):
    from openpi_flash_client.portal_test import Store

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"action": {"model_config_name": "pi05_droid", "checkpoint_dir": "/c"}}))
    monkeypatch.setenv("INFERENCE_CONFIG_PATH", str(path))
    monkeypatch.setenv(modal_host.AUTH_VARIABLE, "")  # so that what is set by the code is taken back, too
    return Store()


def test_a_token_is_made_once_and_asked_for(store, monkeypatch):
    modal_host.require_token(store)
    token = store[modal_host.TOKEN_KEY]
    auth = load_settings().gateway.auth
    assert auth is not None
    assert auth.load_tokens() == {token}
    assert len(token) >= 32
    monkeypatch.setenv(modal_host.AUTH_VARIABLE, "")
    modal_host.require_token(store)  # another container
    assert store[modal_host.TOKEN_KEY] == token


def test_configured_tokens_are_kept(store, monkeypatch):
    monkeypatch.setenv(modal_host.AUTH_VARIABLE, '{"tokens": ["mine"]}')
    modal_host.require_token(store)
    assert modal_host.TOKEN_KEY not in store
    auth = load_settings().gateway.auth
    assert auth is not None
    assert auth.load_tokens() == {"mine"}
