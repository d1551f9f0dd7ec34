"""The Helm chart with real pods on a real kubelet, called from outside the cluster: `make test-pods`.

The images are those of docker-compose.yaml, the checkpoint is the laptop's. Tests run in the order of the file, each on
what the one before left running.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from openpi_flash.v1 import policy_pb2_grpc
from openpi_flash_client import FlashTransportPolicy, GrpcPolicy

from tests.deploy.kubernetes.cluster import Cluster
from tests.deploy.kubernetes.node import NAME, Node, running_node
from tests.deploy.support import ROOT, Robot, compose_build, run, say, wait_until
from tests.interop.robots import robots
from tests.support import stub_request

TOOLS = Path(os.environ.get("KUBERNETES_TOOLS", "")).absolute()
CHART = ROOT / "deploy/helm/openpi-flash"
NAMESPACE = "robots"
RELEASE = "flash"
FULL = f"{RELEASE}-openpi-flash"
OF_RELEASE = f"app.kubernetes.io/instance={RELEASE}"
USER = 10001
ACTIONS = (15, 8)
TOKEN = "sesame"
pytestmark = pytest.mark.timeout(900)

Object = Mapping[str, Any]
Policy = GrpcPolicy | FlashTransportPolicy


# What is there before the chart.


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """Images by the chart's name of their component, built."""
    services = {"action": "action", "gateway": "gateway", "edge": "edge", "tools": "tiny-checkpoint"}
    compose_build("build", *services.values())
    composed = json.loads(run("docker", "compose", "config", "--format", "json"))["services"]
    return {name: composed[service]["image"] for name, service in services.items()}


@pytest.fixture(scope="module")
def node(images: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Node]:
    directory = ROOT / ".cache/deploy/node"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    started = time.monotonic()
    try:
        with running_node(TOOLS, directory) as node:
            say(f"node ready in {time.monotonic() - started:.0f} s")
            started = time.monotonic()
            node.load_images(*images.values())
            say(f"images brought to it in {time.monotonic() - started:.0f} s")
            yield node
            if request.session.testsfailed:
                print(kubectl(node.cluster, "describe", "pods"))
                for pod in node.cluster.get("pods", namespace=NAMESPACE):
                    print(kubectl(node.cluster, "logs", pod["metadata"]["name"], "--all-containers", "--tail=40"))
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def cluster(node: Node, images: dict[str, str]) -> Cluster:
    """With a namespace that takes only pods that are confined, and the laptop's checkpoint on a claim in it."""
    folder = ROOT / ".cache/deploy/node/checkpoints"
    folder.mkdir()
    template = Template(Path(__file__).with_name("checkpoint.yaml").read_text())
    objects = template.substitute(namespace=NAMESPACE, folder=folder, node=NAME, user=USER, image=images["tools"])
    node.cluster.apply(*yaml.safe_load_all(objects))
    kubectl(node.cluster, "wait", "job/checkpoint", "--for=condition=Complete", "--timeout=120s")
    return node.cluster


@pytest.fixture(scope="module")
def certificates(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and server.pem and server.key for every name by which robots call."""
    folder = tmp_path_factory.mktemp("certificates")
    services = ",".join(f"DNS:{name}.{NAMESPACE}.svc" for name in (FULL, f"{FULL}-quic"))
    names = f"subjectAltName={services},IP:{node.address}"
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", names, "-addext", "basicConstraints=critical,CA:FALSE")
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for name, options in {"ca": (), "server": signed}.items():
        files = ("-out", f"{name}.pem", "-keyout", f"{name}.key", "-subj", f"/CN={name}")
        subprocess.run([*new, *files, *options], cwd=folder, check=True, capture_output=True)
    return folder


def kubectl(cluster: Cluster, *arguments: str) -> str:
    return cluster.run("kubectl", f"--namespace={NAMESPACE}", *arguments)


def helm(cluster: Cluster, command: str, images: dict[str, str], *options: str) -> float:
    """Seconds that `helm install` or `upgrade` took until everything was ready."""
    values: dict[str, Any] = {
        "image": {"registry": "docker.io", "pullPolicy": "Never", "tools": image(images["tools"])},
        "config": {
            "action": {
                "model_config_name": "/cache/tiny/pi05_droid_tiny.json",
                "checkpoint_dir": "/cache/tiny/pi05_droid_tiny_jax",
                "precision": "float32",
                "max_batch_size": 1,
            }
        },
        "action": {
            "framework": "jax",
            "image": {"jax": image(images["action"])},
            "gpu": {"count": 0},
            "cache": {"type": "existing", "existingClaim": "checkpoints"},
            "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        },
        "gateway": {"image": image(images["gateway"]), "resources": {"requests": {"cpu": "100m"}}},
        "edge": {"image": image(images["edge"]), "resources": {"requests": {"cpu": "100m"}}},
        "service": {"type": "NodePort"},
        "quicService": {"type": "NodePort"},
    }
    waiting = ("--wait", "--timeout=200s", f"--namespace={NAMESPACE}")
    started = time.monotonic()
    cluster.run("helm", command, RELEASE, str(CHART), *waiting, "--values=-", *options, stdin=json.dumps(values))
    return time.monotonic() - started


def trust(certificates: Path) -> list[str]:
    """For production: certificates, tokens, and two replicas."""
    files = {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem"}
    tls = [f"--set-file=tls.{key}={certificates / name}" for key, name in files.items()]
    return [*tls, f"--set=auth.tokens={{{TOKEN}}}", "--set=action.replicas=2"]


def image(name: str) -> dict[str, str]:
    repository, _, tag = name.partition(":")
    return {"repository": repository, "tag": tag}


# What is asked of it.


class Watch:
    """Everything that the API server tells about the namespace's pods, from now on."""

    def __init__(self, cluster: Cluster) -> None:
        self.pods: list[Object] = []
        command = [cluster.tools / "kubectl", f"--kubeconfig={cluster.kubeconfig}", f"--namespace={NAMESPACE}"]
        watch = ["get", "pods", "--watch", '--output=jsonpath={@}{"\\n"}']
        self._process = subprocess.Popen([*command, *watch], stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.pods += map(json.loads, self._process.stdout)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._thread.join()
        self._process.wait()

    def of(self, component: str) -> list[Object]:
        return [pod for pod in self.pods if pod["metadata"]["labels"].get("app.kubernetes.io/component") == component]


def pods(cluster: Cluster, component: str) -> list[Object]:
    """Pods of a component that are not being stopped."""
    selector = f"app.kubernetes.io/component={component}"
    found = cluster.get("pods", namespace=NAMESPACE, selector=selector)
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def is_ready(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "True"


def condition(pod: Object, kind: str) -> Object:
    found = [entry for entry in pod["status"].get("conditions", []) if entry["type"] == kind]
    return found[0] if found else {}


def seconds(timestamp: str) -> datetime:
    """Of Kubernetes, in whole seconds, or of a log."""
    return datetime.fromisoformat(timestamp).replace(microsecond=0)


def runs(pod: Object, container: str) -> bool:
    states = {state["name"]: state["state"] for state in pod["status"].get("containerStatuses", [])}
    return "running" in states.get(container, {})


def node_port(cluster: Cluster, name: str) -> int:
    """The port of the node behind which the chart's port of this name is."""
    service = f"{FULL}-quic" if name == "quic" else FULL
    ports = cluster.get("service", service, namespace=NAMESPACE)["spec"]["ports"]
    return next(port["nodePort"] for port in ports if port["name"] == name)


def fingerprint(cluster: Cluster) -> str:
    """As the chart's notes say."""
    log = kubectl(cluster, "logs", f"deployment/{FULL}-gateway", "--container=edge")
    (found, *_) = re.findall(r"[0-9a-f]{64}", log)
    return found


@contextlib.contextmanager
def robots_policies(node: Node, certificates: Path | None = None) -> Iterator[dict[str, Policy]]:
    """Connected; in plain text, or with what `trust` has given the server."""
    over_grpc: dict[str, Any] = {"insecure_plaintext": True}
    if certificates is None:
        over_quic = {"fingerprint": fingerprint(node.cluster)}
    else:
        over_grpc = over_quic = {"ca_file": str(certificates / "ca.pem"), "token": TOKEN}
    with (
        GrpcPolicy(node.address, node_port(node.cluster, "grpc"), **over_grpc) as first,
        FlashTransportPolicy(node.address, node_port(node.cluster, "quic"), **over_quic) as second,
    ):
        yield {"gRPC": first, "QUIC": second}


@contextlib.contextmanager
def calling(
    policies: Mapping[str, Policy], observation: dict[str, Any], timeout_s: float
) -> Iterator[dict[str, Robot]]:
    """Robots that go on whatever happens; afterwards the time without answers is printed."""
    found = {
        name: Robot(lambda policy=policy: policy.infer(observation, timeout_s=timeout_s))
        for name, policy in policies.items()
    }
    try:
        wait_until(lambda: all(len(robot.answers) > 5 for robot in found.values()), "answers before")
        yield found
        now = time.monotonic()
        wait_until(lambda: all(robot.answers[-1] > now for robot in found.values()), "answers after")
    finally:
        for robot in found.values():
            robot.stop()
    for name, robot in found.items():
        say(f"{name}: {len(robot.answers)} answers, {len(robot.errors)} errors, {robot.silence_s():.1f} s without one")


# In order.


def test_pods_are_ready_when_they_are_warm_and_not_before(node, cluster, images):
    with Watch(cluster) as watch:
        say(f"`helm install --wait` took {helm(cluster, 'install', images):.0f} s")
        (action,), (gateway,) = pods(cluster, "action"), pods(cluster, "gateway")
        wait_until(lambda: all(is_ready(watch.of(name)[-1]) for name in ("action", "gateway")), "the news of it", 30)
    log = kubectl(cluster, "logs", action["metadata"]["name"], "--timestamps").splitlines()
    (warm,) = [seconds(line.split()[0]) for line in log if '"message": "warm"' in line]
    assert [pod for pod in watch.of("action") if runs(pod, "action") and not is_ready(pod)]
    assert [pod for pod in watch.of("gateway") if runs(pod, "gateway") and not is_ready(pod)]
    # Seconds of Kubernetes are whole: the clock of both is the same one.
    assert seconds(condition(action, "Ready")["lastTransitionTime"]) >= warm
    assert seconds(condition(gateway, "Ready")["lastTransitionTime"]) >= warm
    for pod in (action, gateway):
        assert [state["restartCount"] for state in pod["status"]["containerStatuses"]] == [0] * len(
            pod["spec"]["containers"]
        )


def test_robots_outside_get_the_same_actions_on_every_transport(node, cluster, stock_python, observation_with_noise):
    observation, path = observation_with_noise
    websocket = node_port(cluster, "websocket")
    with robots(stock_python, ["policy", "broker"], websocket, path, 2, host=node.address) as (policy, broker):
        (actions,) = set(policy.result()["actions"])
        assert broker.result()["actions"] == [actions] * 2
    assert len(bytes.fromhex(actions)) == np.prod(ACTIONS) * 8
    with robots_policies(node) as policies:
        for over in policies.values():
            assert over.infer(observation)["actions"].tobytes().hex() == actions


def test_generated_stubs(node, cluster, observation):
    with grpc.insecure_channel(f"{node.address}:{node_port(cluster, 'grpc')}") as channel:
        answer = policy_pb2_grpc.PolicyServiceStub(channel).Infer(stub_request(observation, seed=7), timeout=30)
    assert tuple(answer.tensors["actions"].shape) == ACTIONS


def test_containers_are_confined(cluster):
    look = f"""
        test $(id -u):$(id -g) = {USER}:{USER}
        for path in / /usr /opt/openpi-flash /etc/openpi-flash; do ! touch $path/x || exit 1; done
        grep -qx 'NoNewPrivs:.1' /proc/self/status
        grep -qx 'Seccomp:.2' /proc/self/status
        grep -qx 'CapBnd:.0*' /proc/self/status
        test ! -e /var/run/secrets/kubernetes.io
    """
    for workload, container in (
        (f"statefulset/{FULL}-action", "action"),
        (f"deployment/{FULL}-gateway", "gateway"),
        (f"deployment/{FULL}-gateway", "edge"),
    ):
        kubectl(cluster, "exec", workload, f"--container={container}", "--", "sh", "-ec", look)


def test_helms_test(cluster):
    cluster.run("helm", "test", RELEASE, f"--namespace={NAMESPACE}", "--timeout=120s")


def test_a_deleted_action_pod_comes_back_under_robots_that_go_on(node, cluster, observation):
    """It drains first. Until the next one is warm nothing serves; the gateway says so, too."""
    (before,) = pods(cluster, "action")
    with (
        robots_policies(node) as policies,
        calling(policies, observation, timeout_s=2) as calls,
        Watch(cluster) as watch,
    ):
        kubectl(cluster, "delete", "pod", before["metadata"]["name"])
        kubectl(cluster, "rollout", "status", f"statefulset/{FULL}-action", "--timeout=120s")
        kubectl(cluster, "rollout", "status", f"deployment/{FULL}-gateway", "--timeout=120s")
    (after,) = pods(cluster, "action")
    assert after["metadata"]["uid"] != before["metadata"]["uid"]
    errors = {error for robot in calls.values() for error in robot.errors}
    assert all(error.startswith(("UnavailableError", "PolicyTimeoutError")) for error in errors), errors
    assert not [pod for pod in watch.of("gateway") if pod["status"]["containerStatuses"][0]["restartCount"]]


def test_an_upgrade_to_tls_tokens_and_two_replicas(node, cluster, images, certificates, observation):
    say(f"`helm upgrade --wait` took {helm(cluster, 'upgrade', images, *trust(certificates)):.0f} s")
    assert len(pods(cluster, "action")) == 2
    with robots_policies(node, certificates) as policies:
        for over in policies.values():
            assert over.infer(observation)["actions"].shape == ACTIONS
    test_helms_test(cluster)  # over QUIC, too, now that there is a certificate to verify


def test_an_upgrade_loses_no_request(node, cluster, images, certificates, observation):
    """New settings for the model replace every pod, one after the other."""
    before = {pod["metadata"]["uid"] for name in ("action", "gateway") for pod in pods(cluster, name)}
    with robots_policies(node, certificates) as policies, calling(policies, observation, timeout_s=20) as calls:
        changed = (*trust(certificates), "--set=config.action.num_steps=4")
        say(f"`helm upgrade --wait` took {helm(cluster, 'upgrade', images, *changed):.0f} s")
    after = {pod["metadata"]["uid"] for name in ("action", "gateway") for pod in pods(cluster, name)}
    assert len(before) == len(after) == 3
    assert not before & after
    assert not [error for robot in calls.values() for error in robot.errors]


def test_uninstall_leaves_only_what_was_there_before(cluster):
    cluster.run("helm", "uninstall", RELEASE, f"--namespace={NAMESPACE}", "--wait", "--timeout=120s")
    wait_until(lambda: not cluster.get("pods", namespace=NAMESPACE, selector=OF_RELEASE), "no pods", 90)
    for kind in ("services", "configmaps", "secrets", "networkpolicies", "poddisruptionbudgets"):
        assert not cluster.get(kind, namespace=NAMESPACE, selector=OF_RELEASE), kind
    assert cluster.get("pvc", "checkpoints", namespace=NAMESPACE)["status"]["phase"] == "Bound"
