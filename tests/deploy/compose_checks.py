"""docker-compose.yaml as an operator runs it, on an engine of this machine: `make test-compose`.

Not one of the tests of `make test`: it needs a Docker engine, and takes minutes. Tests run in the order of the file,
each on what the one before left running.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from openpi_flash.v1 import policy_pb2_grpc
from openpi_flash_client import FlashTransportPolicy, GrpcPolicy, PolicyError

from tests.deploy.support import Robot, compose_build, run, say, wait_until
from tests.interop.robots import robots
from tests.support import stub_request

PROJECT = "openpi-flash-test"  # with volumes of its own
SERVICES = ("action", "planner", "gateway", "edge")
IMAGES = ("gateway", "edge", "action-jax-cpu", "planner-cpu", "tools", "action-torch")
BASE = "python:3.11-slim-bookworm"
ACTIONS = (15, 8)
pytestmark = pytest.mark.timeout(3600)


def compose(*arguments: str, **options: Any) -> str:
    return run("docker", "compose", "--project-name", PROJECT, *arguments, **options)


def container(service: str) -> dict[str, Any]:
    identifier = compose("ps", "--all", "--quiet", service).strip()
    return json.loads(run("docker", "inspect", identifier))[0]


@pytest.fixture(scope="module")
def images() -> None:
    """All images: those of the laptop, and the action service in PyTorch of the GPU form."""
    started = time.monotonic()
    for command in (["build"], ["--profile", "openpi", "build", "openpi-action"]):
        compose_build("--project-name", PROJECT, *command)
    say(f"images built in {time.monotonic() - started:.0f} s")


@pytest.fixture(scope="module")
def stack(images: None) -> Iterator[None]:
    compose("down", "--volumes", "--remove-orphans")
    started = time.monotonic()
    try:
        compose("up", "--detach", "--wait", "--wait-timeout", "300")
        say(f"up, checkpoint made and healthy in {time.monotonic() - started:.0f} s")
        yield
    except BaseException:
        print(compose("logs", "--no-color", "--tail", "60", check=False))
        raise
    finally:
        compose("--profile", "demo", "down", "--volumes", "--remove-orphans")


@pytest.fixture
def address() -> str:
    """An address of this machine as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return probe.getsockname()[0]


@pytest.fixture
def quic(stack: None, address: str) -> Iterator[Callable[[int], FlashTransportPolicy]]:
    with contextlib.ExitStack() as policies:
        log = compose("logs", "--no-color", "edge")
        fingerprint = re.findall(r"fingerprint=([0-9a-f]+)", log)[-1]

        def connect(port: int) -> FlashTransportPolicy:
            return policies.enter_context(FlashTransportPolicy(address, port, fingerprint=fingerprint))

        yield connect


@pytest.fixture
def grpc_policy(stack: None, address: str) -> Iterator[GrpcPolicy]:
    with GrpcPolicy(address, 50051, insecure_plaintext=True) as policy:
        yield policy


def test_sizes_of_images(images):
    """Printed; and none holds a compiler, a writable program, or a user that may do everything."""
    sizes = {name: json.loads(run("docker", "image", "inspect", name))[0] for name in [BASE, *map(image_name, IMAGES)]}
    base = sizes.pop(BASE)["Size"]
    for name, image in sizes.items():
        say(f"{name}: {image['Size'] / 1e6:.0f} MB, of which {base / 1e6:.0f} MB base image")
        assert image["Config"]["User"] == "10001:10001"
        assert image["Config"]["Labels"]["org.opencontainers.image.title"] == "openpi-flash"
        assert name.startswith("openpi-flash/tools") or image["Config"]["Healthcheck"]["Test"][0] == "CMD"
        look = "for name in cc gcc g++ clang rustc; do ! command -v $name || exit 1; done; ! touch /opt/openpi-flash/x"
        run("docker", "run", "--rm", "--entrypoint", "sh", name, "-c", look)


def image_name(name: str) -> str:
    return f"openpi-flash/{name}:latest"


def test_an_image_of_pytorch_serves(images):
    """On the CPU: the drivers of a GPU come from its machine."""
    script = "import openpi_flash_action.server, torch; print(torch.ones(2).sum().item(), torch.version.cuda)"
    image = image_name("action-torch")
    answer = run(
        "docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "python", image, "-c", script
    )
    assert re.match(r"2\.0 \d+\.\d+", answer), answer


def test_kernels_need_no_compiler(images):
    """Triton gets the library that launches kernels as if it had compiled it; there is a compiler for nothing else."""
    script = """
from subprocess import CalledProcessError
from triton.backends.nvidia import driver
from triton.runtime.build import compile_so_from_file, compile_so_from_src
source = driver.dirname + "/driver.c"
library = compile_so_from_file(source, "cuda_utils", ["/of/the/driver"], driver.include_dirs, driver.libraries)
code = open(library, "rb").read()
print(all(name in code for name in (b"libcuda.so.1", b"PyInit_cuda_utils", b"launch")))
try:
    compile_so_from_src("int x;", "other")
except CalledProcessError as error:
    print(error.returncode)
"""
    image = image_name("action-torch")
    command = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--entrypoint", "python", image, "-c", script]
    answer = run(*command)
    assert answer.startswith("True\n1\n"), answer
    assert "action-torch-compile has one" in answer


def test_a_robot_with_the_stock_client(stack, stock_python, observation_with_noise):
    calls = 3
    with robots(stock_python, ["policy", "broker"], 8000, observation_with_noise[1], calls) as (policy, broker):
        actions = policy.result()["actions"]
        assert len(set(actions)) == 1
        assert len(bytes.fromhex(actions[0])) == np.prod(ACTIONS) * 8
        assert broker.result()["actions"] == [actions[0]] * calls


def test_the_same_actions_on_every_transport(stack, quic, grpc_policy, stock_python, observation_with_noise):
    observation, path = observation_with_noise
    with robots(stock_python, ["policy"], 8000, path, 1) as (robot,):
        over_websocket = robot.result()["actions"][0]
    over_grpc = grpc_policy.infer(observation)["actions"]
    over_quic = quic(5555).infer(observation)["actions"]
    assert over_grpc.shape == ACTIONS
    assert over_grpc.tobytes().hex() == over_quic.tobytes().hex() == over_websocket


def test_generated_stubs_and_reflection(stack, address, observation):
    with grpc.insecure_channel(f"{address}:50051") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"openpi_flash.v1.PolicyService", "grpc.health.v1.Health"} <= set(database.get_services())
        pool = descriptor_pool.DescriptorPool(database)
        assert "Infer" in pool.FindServiceByName("openpi_flash.v1.PolicyService").methods_by_name
        answer = policy_pb2_grpc.PolicyServiceStub(channel).Infer(stub_request(observation, seed=7), timeout=30)
    assert tuple(answer.tensors["actions"].shape) == ACTIONS
    assert answer.timing.model_ms > 0


def test_every_mode_and_the_planner_alone(stack, quic, grpc_policy, stock_python, observation_with_noise):
    observation, path = observation_with_noise
    over_quic = quic(5555)
    for policy in (grpc_policy, over_quic):
        default = policy.infer(observation)
        assert default["actions"].shape == ACTIONS
        assert default["subtask"]["status"] == "fresh", default["subtask"]
        alone = policy.infer(observation, mode="action_only")
        assert alone["actions"].shape == ACTIONS
        assert "subtask" not in alone
        subtask = policy.infer(observation, mode="subtask_only")
        assert subtask["subtask"]["text"] == default["subtask"]["text"]
        assert "actions" not in subtask
        with pytest.raises(PolicyError, match="mode"):
            policy.infer(observation, mode="both")
    assert quic(5556).infer(observation)["subtask"]["text"] == default["subtask"]["text"]
    path.with_suffix(".json").write_text(json.dumps([{}]))
    with robots(stock_python, ["requests"], 8002, path, 1) as (robot,):
        (answer,) = robot.result()["answers"]
    assert answer["subtask"]["text"] == default["subtask"]["text"]
    assert "actions" not in answer


def test_what_is_reachable_from_outside(stack, address):
    for port in (8000, 8002, 50051):
        socket.create_connection((address, port), 5).close()
    for port in (8001, 50052, 50053, 9090, 9091, 9092, 9093):
        with pytest.raises(OSError):
            socket.create_connection((address, port), 5)
    with urllib.request.urlopen("http://127.0.0.1:8001/health", timeout=5) as answer:
        assert json.load(answer)["status"] == "ok"
    # A robot that came into a container of its network does not even find the models there.
    lookup = "import socket; socket.create_connection(('action', 50052), 5)"
    demo = ("run", "--rm", "--no-deps", "--entrypoint", "python", "demo", "-c", lookup)
    assert "gaierror" in compose(*demo, check=False)


def test_the_demo(stack):
    output = compose("run", "--rm", "demo")
    for transport in ("ws://gateway", "grpc://gateway", "quic://edge"):
        assert transport in output


def test_containers_are_confined(stack):
    for service in SERVICES:
        compose(
            "exec", "-T", service, "sh", "-c", "test $(id -u) = 10001 && ! touch /usr/x && ! touch /opt/openpi-flash/x"
        )


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_dies_comes_back_under_a_robot_that_goes_on(stack, quic, grpc_policy, observation, service):
    """SIGKILL from outside the container, as when memory runs out: Docker starts the service again by itself."""
    over_quic = quic(5555)
    policies = {"QUIC": over_quic, "gRPC": grpc_policy}
    calling = {
        name: Robot(lambda policy=policy: policy.infer(observation, timeout_s=2)) for name, policy in policies.items()
    }
    try:
        wait_until(lambda: all(len(robot.answers) > 5 for robot in calling.values()), "answers before the death")
        state = container(service)["State"]
        kill = f"import os; os.kill({state['Pid']}, 9)"
        command = ("docker", "run", "--rm", "--pid", "host", "--user", "0", "--entrypoint", "python")
        run(*command, image_name("gateway"), "-c", kill)
        died = time.monotonic()
        wait_until(lambda: is_healthy_again(service, state["StartedAt"]), f"{service} healthy again")
        back = time.monotonic()
        wait_until(lambda: all(robot.answers[-1] > back for robot in calling.values()), "answers after it")
    finally:
        for robot in calling.values():
            robot.stop()
    silences = ", ".join(f"{name} {robot.silence_s():.1f} s" for name, robot in calling.items())
    say(f"{service}: healthy {back - died:.1f} s after its death; longest time without an answer: {silences}")
    if service == "planner":
        assert not any(robot.errors for robot in calling.values())  # it costs an action its subtask, and nothing else
    if service == "edge":
        assert not calling["gRPC"].errors


def is_healthy_again(service: str, started_before: str) -> bool:
    state = container(service)["State"]
    return state["StartedAt"] != started_before and state.get("Health", {}).get("Status") == "healthy"


def test_docker_kill_and_up_again(stack, grpc_policy, observation):
    """`docker kill` says that a container is to stay down; `docker compose up` is what brings it back."""
    for service in SERVICES:
        run("docker", "kill", container(service)["Id"])
    started = time.monotonic()
    compose("up", "--detach", "--wait", "--wait-timeout", "300")
    say(f"up again after `docker kill` of all in {time.monotonic() - started:.0f} s")
    assert grpc_policy.infer(observation, timeout_s=30)["actions"].shape == ACTIONS


def test_down_drains(stack, grpc_policy, observation):
    """Every service ends by itself, with status 0, and no robot gets less than an answer or a refusal."""
    robot = Robot(lambda: grpc_policy.infer(observation, timeout_s=2))
    wait_until(lambda: len(robot.answers) > 5, "answers")
    watch = ["docker", "events", "--filter", "event=die", "--format", "{{json .Actor.Attributes}}"]
    with subprocess.Popen(watch, stdout=subprocess.PIPE, text=True) as events:
        time.sleep(1)  # it says nothing when it has begun
        started = time.monotonic()
        compose("down")
        say(f"down in {time.monotonic() - started:.1f} s")
        robot.stop()
        events.terminate()
        output, _ = events.communicate()
    ends = [json.loads(line) for line in output.splitlines()]
    own = [end for end in ends if end.get("com.docker.compose.project") == PROJECT]
    assert {end["com.docker.compose.service"]: end["exitCode"] for end in own} == dict.fromkeys(SERVICES, "0")
    assert robot.errors
    assert not [error for error in robot.errors if "INTERNAL" in error or "cancel" in error.lower()], robot.errors


def test_a_second_up_needs_nothing_new(stack, address, observation):
    started = time.monotonic()
    compose("up", "--detach", "--wait", "--wait-timeout", "300")
    say(f"second up in {time.monotonic() - started:.0f} s")
    with GrpcPolicy(address, 50051, insecure_plaintext=True) as policy:
        assert policy.infer(observation)["actions"].shape == ACTIONS


def test_the_form_of_the_gpu_server_prepares_first_and_asks_for_gpus():
    """As far as it goes on a machine without a GPU: what Compose makes of the file."""
    profiles = ("--profile", "openpi", "--profile", "openpi-planner")
    services = json.loads(compose(*profiles, "config", "--format", "json"))["services"]
    assert not services.keys() & set(SERVICES)
    for slot, preparation in (("action", "prepare-checkpoint"), ("planner", "prepare-planner-checkpoint")):
        service = services[f"openpi-{slot}"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert service["depends_on"][preparation]["condition"] == "service_completed_successfully"
        assert service["networks"]["backend"]["aliases"] == [slot]
        assert service["networks"].keys() == {"backend", "outward"}
        assert any(volume["target"] == "/etc/openpi-flash/config.json" for volume in service["volumes"])


def test_what_is_not_set_is_left_to_the_command():
    def command(**environment: str) -> list[str]:
        text = compose("--profile", "openpi", "config", "--format", "json", env={**os.environ, **environment})
        return json.loads(text)["services"]["prepare-checkpoint"]["command"]

    output = "--output-dir=/cache/checkpoints/pi05_base"
    assert command() == ["prepare-checkpoint", output]
    named = command(OPENPI_CHECKPOINT_HF_REPO="lab/jax", OPENPI_CHECKPOINT_ASSETS_URI="gs://lab/assets")
    assert named == ["prepare-checkpoint", output, "--hf-repo=lab/jax", "--assets-uri=gs://lab/assets"]


def test_a_registry_may_be_named():
    def images(**environment: str) -> set[str]:
        return set(compose("config", "--images", env={**os.environ, **environment}).split())

    assert "openpi-flash/gateway:latest" in images()
    named = images(OPENPI_REGISTRY="registry.example.com", OPENPI_TAG="v1")
    assert "registry.example.com/openpi-flash/gateway:v1" in named
    assert all(name.startswith("registry.example.com/openpi-flash/") for name in named)
