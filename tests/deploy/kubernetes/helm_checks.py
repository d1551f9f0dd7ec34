"""The Helm chart: what it refuses, what it renders, and what a real API server, scheduler and controllers make of it.

`make test-helm` builds these and runs the tests. Nodes are kwok's: pods are scheduled and reported as running, and no
container runs.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from openpi_flash_common.grpc_server import LIVENESS
from openpi_flash_common.settings import EngineSettings, load_settings

from tests.deploy import dockerfile
from tests.deploy.kubernetes.cluster import TLS, Cluster, running_cluster

TOOLS = Path(os.environ["KUBERNETES_TOOLS"])
CHART = Path(__file__).parents[3] / "deploy/helm/openpi-flash"
DEFAULTS = "defaults"
REGISTRY = "image.registry=registry.example.com"  # has no default
VALUES = {DEFAULTS: None, **{path.stem: path for path in sorted((CHART / "ci").glob("*.yaml"))}}
NAMESPACE = "robots"
DRAIN_S = 30

Object = Mapping[str, Any]


def helm(*arguments: str, ok: bool = True) -> str:
    """Output of helm without a cluster; with `ok` False, of a command that must fail."""
    result = subprocess.run(
        [TOOLS / "helm", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    assert (result.returncode == 0) == ok, result.stdout
    return result.stdout


def options(values: str, *sets: str) -> list[str]:
    path = VALUES[values]
    files = {"certificate": "server.pem", "key": "server.key", "ca": "ca.pem"} if values == "inline-secrets" else {}
    tls = [part for key, name in files.items() for part in ("--set-file", f"tls.{key}={TLS / name}")]
    chosen = ["--values", str(path)] if path else ["--set", REGISTRY]
    return [*chosen, *tls, *(part for text in sets for part in ("--set", text))]


def render(values: str, *sets: str) -> list[Object]:
    text = helm("template", "flash", str(CHART), "--namespace", NAMESPACE, *options(values, *sets))
    return [found for found in yaml.safe_load_all(text) if found]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def named(objects: list[Object], kind: str, end: str) -> Object:
    (found,) = [found for found in of_kind(objects, kind) if found["metadata"]["name"].endswith(end)]
    return found


def pod_template(workload: Object) -> Object:
    return workload if workload["kind"] == "Pod" else workload["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def settings_of(objects: list[Object], tmp_path: Path) -> EngineSettings:
    """The settings file of a rendered chart, as the services read it."""
    (config_map,) = of_kind(objects, "ConfigMap")
    path = tmp_path / "config.json"
    path.write_text(config_map["data"]["config.json"])
    return load_settings(path, dockerfile.environment("gateway"))


# What helm refuses.


@pytest.mark.parametrize("values", VALUES)
def test_lint(values):
    helm("lint", "--strict", str(CHART), *options(values))


@pytest.mark.parametrize(
    ("sets", "refusal"),
    [
        ("action.framwork=jax", "additional properties 'framwork' not allowed"),
        ("image.registry=", "image.registry is needed: where `make images"),
        ("config.pytorch_compile_mode=default", "config.pytorch_compile_mode is for action.framework=torch"),
        ("action.prepare.enabled=true", "action.prepare.hfRepo is needed with action.framework=jax"),
        ("action.framework=tensorflow", "at '/action/framework': value must be one of 'torch', 'jax'"),
        ("action.replicas=-1", "at '/action/replicas': minimum: got -1, want 0"),
        ("action.replicas=two", "at '/action/replicas': got string, want integer"),
        ("action.gpu.count=0.5", "at '/action/gpu/count': got string, want integer"),
        ("action.cache.size=big", "at '/action/cache/size': 'big' does not match pattern"),
        (
            "action.prepare.outputDir=/tmp/x",
            "at '/action/prepare/outputDir': '/tmp/x' does not match pattern '^/cache/",
        ),
        (
            "action.terminationGracePeriodSeconds=30",
            "at '/action/terminationGracePeriodSeconds': minimum: got 30, want 35",
        ),
        ("service.type=Ingress", "at '/service/type': value must be one of 'ClusterIP', 'NodePort', 'LoadBalancer'"),
        ("service.nodePorts.grpc=70000", "at '/service/nodePorts/grpc': maximum: got 70,000, want 65,535"),
        ("auth.tokens={a b}", "at '/auth/tokens/0': 'a b' does not match pattern"),
        ("config.actoin.num_steps=3", "additional properties 'actoin' not allowed"),
        ("policyFiles.fold.name=x", "at '/policyFiles': additional properties 'fold' not allowed"),
        ("policyFiles.config\\.json.name=x", "policyFiles: config.json is the settings' own name"),
        ("action.enabled=false", "nothing to serve: action.enabled or planner.enabled must be true"),
        ("planner.enabled=true", "config.planner.checkpoint_dir is needed, or planner.prepare.enabled"),
        ("config.action.checkpoint_dir=", "config.action.checkpoint_dir is needed, or action.prepare.enabled"),
        ("config.action.model_config_name=", "config.action.model_config_name is needed"),
        ("config.gateway.grpc_port=1", "config.gateway.grpc_port is set by the chart"),
        ("config.action.host=localhost", "config.action.host is set by the chart"),
        ("config.telemetry.metrics=true", "config.telemetry.metrics is set by the chart"),
        ("action.cache.type=existing", "action.cache.existingClaim is needed with action.cache.type=existing"),
        ("tls.certificate=x", "tls.certificate and tls.key go together"),
        (
            "tls.existingSecret=a,tls.certificate=x,tls.key=y",
            "tls.existingSecret and tls.certificate exclude each other",
        ),
        ("tls.clientCaSecret=ca", "tls.clientCaSecret needs a server certificate"),
        ("auth.existingSecret=a,auth.tokens={b}", "auth.existingSecret and auth.tokens exclude each other"),
        ("hub.existingSecret=a,hub.token=b", "hub.existingSecret and hub.token exclude each other"),
        ("gateway.replicas=2", "several gateways need a certificate (tls.existingSecret)"),
        (
            "gateway.preStopSeconds=30",
            "gateway.terminationGracePeriodSeconds must be 35 more than gateway.preStopSeconds",
        ),
        (
            "action.autoscaling.type=keda",
            "action.autoscaling.prometheusAddress is needed with action.autoscaling.type=keda",
        ),
        ("action.autoscaling.type=hpa,metrics.enabled=false", "action.autoscaling needs metrics.enabled"),
        ("action.autoscaling.type=hpa,action.autoscaling.minReplicas=9", "minReplicas is more than maxReplicas"),
    ],
)
def test_values_that_cannot_be_are_refused_in_words(sets, refusal):
    assert refusal in helm("template", "flash", str(CHART), "--set", f"{REGISTRY},{sets}", ok=False)


# What is rendered.


@pytest.mark.parametrize("values", VALUES)
def test_the_services_take_the_settings(values, tmp_path):
    objects = render(values)
    settings = settings_of(objects, tmp_path)
    assert settings.slots == tuple(
        name
        for name in ("action", "planner")
        if any(s["metadata"]["name"].endswith(name) for s in of_kind(objects, "StatefulSet"))
    )
    for slot in settings.slots:
        address = getattr(settings.gateway, slot).address
        service = named(objects, "Service", f"-{slot}")
        assert address == f"{service['metadata']['name']}.{NAMESPACE}.svc:{service['spec']['ports'][0]['port']}"
        assert service["spec"]["clusterIP"] == "None", "the gateway is to see each replica"
        workload = named(objects, "StatefulSet", f"-{slot}")
        section = getattr(settings, slot)
        assert section.host == "0.0.0.0"
        assert section.grpc_port == port_of(workload, slot, "grpc")
        if settings.telemetry.metrics:
            assert getattr(settings.telemetry, f"{slot}_metrics_port") == port_of(workload, slot, "metrics")
    gateway = named(objects, "Deployment", "-gateway")
    assert settings.gateway.grpc_port == port_of(gateway, "gateway", "grpc")
    for slot, name in (("action", "websocket"), ("planner", "planner-ws")):
        if slot in settings.slots:
            assert getattr(settings, f"{slot}_transport").websocket_port == port_of(gateway, "gateway", name)
    assert settings.gateway.admin is not None
    assert settings.gateway.admin.host == "127.0.0.1", "operators reach it by port-forward alone"


def port_of(workload: Object, container: str, name: str) -> int:
    (found,) = [c for c in containers(pod_template(workload)) if c["name"] == container]
    return next(port["containerPort"] for port in found["ports"] if port["name"] == name)


@pytest.mark.parametrize("values", VALUES)
def test_containers_run_what_their_images_run_with_the_charts_settings(values, tmp_path):
    objects = render(values)
    settings = settings_of(objects, tmp_path)
    tls, auth = settings.gateway.tls, settings.gateway.auth
    secrets = [tls and tls.cert_file, tls and tls.key_file, tls and tls.client_ca_file, auth and auth.tokens_file]
    for workload in of_kind(objects, "StatefulSet", "Deployment"):
        for container in containers(pod_template(workload)):
            assert "command" not in container
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            environment = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
            assert environment.keys().isdisjoint(environment_of_image(container["image"]))
            assert "/tmp" in mounts
            if container["name"] == "prepare-checkpoint":
                assert container["args"][0].startswith("prepare-")
                continue
            assert "args" not in container
            path = Path(environment["INFERENCE_CONFIG_PATH"])
            assert path.name == "config.json" and str(path.parent) in mounts
            if container["name"] in ("gateway", "edge"):
                assert all(any(path.is_relative_to(mount) for mount in mounts) for path in secrets if path)
                assert any(settings.action_transport.unix_socket_path.is_relative_to(mount) for mount in mounts)
            if container["name"] == "edge":
                assert environment.get("OPENPI_FLASH_NAMES") == (None if tls else "localhost")
                assert environment_of_image("edge")["OPENPI_FLASH_STATE_DIR"] in mounts
                volumes = {volume["name"]: volume for volume in pod_template(workload)["spec"]["volumes"]}
                writable = [m["name"] for m in container["volumeMounts"] if not m.get("readOnly")]
                assert all(volumes[name]["emptyDir"]["medium"] == "Memory" for name in writable), "it writes secrets"


def environment_of_image(image: str) -> Mapping[str, str]:
    return dockerfile.environment(image.rpartition("/")[2].partition(":")[0])


def test_the_image_of_an_action_service_follows_framework_and_compilation():
    def image(*sets: str) -> str:
        workload = named(render(DEFAULTS, *sets), "StatefulSet", "-action")
        return pod_template(workload)["spec"]["containers"][0]["image"]

    assert image() == "registry.example.com/openpi-flash/action-jax:0.1.0"
    assert image("action.framework=torch") == "registry.example.com/openpi-flash/action-torch:0.1.0"
    compiled = image(
        "action.framework=torch", "config.pytorch_compile_mode=default", "action.image.torchCompile.tag=v3"
    )
    assert compiled == "registry.example.com/openpi-flash/action-torch-compile:v3"


def test_an_edge_may_be_given_variables_of_its_program():
    sets = ("edge.extraEnv[0].name=OPENPI_FLASH_LOG_LEVEL", "edge.extraEnv[0].value=debug")
    (edge,) = [
        container
        for container in containers(pod_template(named(render("cpu", *sets), "Deployment", "-gateway")))
        if container["name"] == "edge"
    ]
    assert {"name": "OPENPI_FLASH_LOG_LEVEL", "value": "debug"} in edge["env"]


@pytest.mark.parametrize("values", VALUES)
def test_what_objects_say_of_each_other_is_true(values):
    objects = render(values)
    workloads = of_kind(objects, "StatefulSet", "Deployment")
    names = {(found["kind"], found["metadata"]["name"]) for found in objects}
    assert len(names) == len(objects)
    for workload in workloads:
        assert matches(workload["spec"]["selector"]["matchLabels"], workload)
    for service in of_kind(objects, "Service"):
        (workload,) = [w for w in workloads if matches(service["spec"]["selector"], w)]
        for port in service["spec"]["ports"]:
            assert (port["targetPort"], port.get("protocol", "TCP")) in ports(workload)
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert sum(matches(budget["spec"]["selector"]["matchLabels"], w) for w in workloads) == 1
    for policy in of_kind(objects, "NetworkPolicy"):
        (workload,) = [w for w in workloads if matches(policy["spec"]["podSelector"]["matchLabels"], w)]
        opened = {(port["port"], port["protocol"]) for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert opened == ports(workload), "each port that a pod has is open to somebody, and no other"
        peers = [peer for rule in policy["spec"]["ingress"] for peer in rule.get("from", []) if "podSelector" in peer]
        for peer in peers:
            pods = [*workloads, *of_kind(objects, "Pod")]
            assert sum(matches(peer["podSelector"]["matchLabels"], pod) for pod in pods) == 1
    for monitor in of_kind(objects, "PodMonitor"):
        scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert scraped == {name for w in workloads for name, _ in ports(w) if name.endswith("metrics")}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
        (workload,) = [w for w in workloads if w["metadata"]["name"] == target["name"]]
        assert "replicas" not in workload["spec"], "an upgrade would undo the scaling"
    for workload in workloads:
        if (account := workload["spec"]["template"]["spec"]["serviceAccountName"]) != "default":
            assert ("ServiceAccount", account) in names


def matches(labels: Mapping[str, str], workload: Object) -> bool:
    return labels.items() <= pod_template(workload)["metadata"]["labels"].items()


def ports(workload: Object) -> set[tuple[str, str]]:
    return {
        (port["name"], port.get("protocol", "TCP"))
        for container in containers(pod_template(workload))
        for port in container.get("ports", [])
    }


@pytest.mark.parametrize("values", VALUES)
def test_probes_ask_what_is_there(values, tmp_path):
    objects = render(values)
    settings = settings_of(objects, tmp_path)
    known = {
        "openpi_flash.v1.ActionService",
        "openpi_flash.v1.PlannerService",
        "openpi_flash.v1.PolicyService",
        LIVENESS,
    }
    for workload in of_kind(objects, "StatefulSet", "Deployment"):
        pod = pod_template(workload)["spec"]
        for container in pod["containers"]:
            numbers = {port["name"]: port["containerPort"] for port in container["ports"]}
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container[kind]
                if "grpc" in probe:
                    assert probe["grpc"]["port"] == numbers["grpc"]
                    assert probe["grpc"]["service"] in known
                    assert container["name"] != "gateway" or settings.gateway.tls is None, (
                        "kubelet's gRPC probes know no TLS"
                    )
                elif "exec" not in probe:
                    assert probe.get("httpGet", probe.get("tcpSocket"))["port"] in numbers
            # A model that is being compiled, and a gateway that waits for it, are alive.
            assert container["livenessProbe"].get("grpc", {"service": LIVENESS})["service"] == LIVENESS
            if container["name"] in ("action", "planner"):
                startup = container["startupProbe"]
                assert startup["periodSeconds"] * startup["failureThreshold"] >= 3600
            wait = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            assert pod["terminationGracePeriodSeconds"] >= wait + DRAIN_S + 3


@pytest.mark.parametrize("values", VALUES)
def test_containers_may_do_little(values):
    objects = render(values)
    for workload in of_kind(objects, "StatefulSet", "Deployment", "Pod"):
        pod = pod_template(workload)["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod["automountServiceAccountToken"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"]


def test_a_change_replaces_only_the_pods_that_it_is_for():
    def checksums(*sets: str) -> dict[str, Any]:
        workloads = of_kind(render("combined", *sets), "StatefulSet", "Deployment")
        return {
            w["metadata"]["name"].rpartition("-")[2]: w["spec"]["template"]["metadata"]["annotations"]
            for w in workloads
        }

    def changed(*sets: str) -> set[str]:
        before, after = checksums(), checksums(*sets)
        return {name for name in before if before[name] != after[name]}

    assert changed() == set()
    assert changed("config.gateway.max_in_flight=7") == {"gateway"}
    assert changed("config.action.num_steps=7") == {"gateway", "action"}
    assert changed("config.planner.top_k=7") == {"gateway", "planner"}
    assert changed("config.log.level=debug") == {"gateway", "action", "planner"}
    assert changed("auth.existingSecret=others") == {"gateway"}


# What a cluster makes of it.


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A control plane with a node without GPUs and one with two."""
    with running_cluster(TOOLS.resolve(), tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.add_node("cpu-0")
        cluster.add_node("gpu-0", gpus=2, tainted=True, labels={"nvidia.com/gpu.product": "NVIDIA-L4"})
        yield cluster


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, emptied afterwards: GPUs are few."""
    name = request.node.name.replace("_", "-").replace("[", "-").rstrip("]")[-60:].strip("-")
    cluster.run("kubectl", "create", "namespace", name)
    yield name
    cluster.run("kubectl", "delete", "namespace", name, "--timeout=120s")


def install(
    cluster: Cluster, namespace: str, values: str, *sets: str, command: str = "install", flags: tuple[str, ...] = ()
) -> str:
    return cluster.run(
        "helm",
        command,
        "flash",
        str(CHART),
        "--namespace",
        namespace,
        "--timeout=120s",
        *options(values, *sets),
        *flags,
    )


def running_pods(cluster: Cluster, namespace: str, component: str) -> dict[str, str]:
    """Nodes of ready pods by name."""
    pods = cluster.get("pods", namespace=namespace, selector=f"app.kubernetes.io/component={component}")
    ready = [p for p in pods if {"type": "Ready", "status": "True"}.items() <= _ready_condition(p).items()]
    return {
        pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in ready if "deletionTimestamp" not in pod["metadata"]
    }


def _ready_condition(pod: Object) -> dict[str, Any]:
    conditions = pod.get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == "Ready"), {})


@pytest.mark.parametrize("values", VALUES)
def test_the_server_finds_nothing_wrong(cluster, namespace, values):
    text = helm("template", "flash", str(CHART), "--namespace", namespace, *options(values))
    # A dry run keeps nothing, and a pod is refused whose account is not there.
    cluster.apply(*of_kind([found for found in yaml.safe_load_all(text) if found], "ServiceAccount"))
    answer = cluster.run(
        "kubectl",
        "apply",
        "--dry-run=server",
        "--validate=strict",
        "--namespace",
        namespace,
        "--filename=-",
        stdin=text,
    )
    assert "Warning" not in answer, answer
    assert answer.count("(server dry run)") == len(render(values))


def test_install_upgrade_rollback_uninstall(cluster, namespace):
    notes = install(cluster, namespace, "cpu", flags=("--wait",))
    assert "action_only" in notes
    assert "openpi-flash test grpc $HOST" in notes
    assert "openpi-flash test ws $HOST --port $WEBSOCKET --robot droid" in notes
    assert "WARNING: robots are served outside the cluster without TLS (tls) and tokens (auth)" in notes
    (gateway,) = running_pods(cluster, namespace, "gateway")
    assert running_pods(cluster, namespace, "action") == {"flash-openpi-flash-action-0": "cpu-0"}
    assert endpoints(cluster, namespace, "flash-openpi-flash") == 1
    assert endpoints(cluster, namespace, "flash-openpi-flash-quic") == 1
    assert endpoints(cluster, namespace, "flash-openpi-flash-action") == 1

    cluster.run("helm", "test", "flash", "--namespace", namespace, "--timeout=60s")

    action = pod_uids(cluster, namespace, "action")
    install(cluster, namespace, "cpu", "config.gateway.max_in_flight=7", command="upgrade", flags=("--wait",))
    assert set(running_pods(cluster, namespace, "gateway")).isdisjoint({gateway}), (
        "a change of settings replaces the gateway"
    )
    assert pod_uids(cluster, namespace, "action") == action, "and leaves the model that is warm alone"
    install(cluster, namespace, "cpu", "action.replicas=3", command="upgrade", flags=("--wait",))
    assert len(running_pods(cluster, namespace, "action")) == 3
    assert endpoints(cluster, namespace, "flash-openpi-flash-action") == 3

    cluster.run("helm", "rollback", "flash", "1", "--namespace", namespace, "--wait", "--timeout=120s")
    assert len(running_pods(cluster, namespace, "action")) == 1
    config = cluster.get("configmap", "flash-openpi-flash", namespace=namespace)["data"]["config.json"]
    assert "max_in_flight" not in config

    cluster.run("helm", "uninstall", "flash", "--namespace", namespace, "--wait", "--timeout=120s")
    for kind in ("statefulset", "deployment", "service", "configmap", "secret", "pdb", "networkpolicy"):
        left = [found["metadata"]["name"] for found in cluster.get(kind, namespace=namespace)]
        assert [name for name in left if name != "kube-root-ca.crt"] == []


def endpoints(cluster: Cluster, namespace: str, service: str) -> int:
    slices = cluster.get("endpointslices", namespace=namespace, selector=f"kubernetes.io/service-name={service}")
    return sum(len(found["endpoints"] or []) for found in slices)


def pod_uids(cluster: Cluster, namespace: str, component: str) -> set[str]:
    pods = cluster.get("pods", namespace=namespace, selector=f"app.kubernetes.io/component={component}")
    return {pod["metadata"]["uid"] for pod in pods}


def test_models_go_where_gpus_are_and_wait_where_there_are_none(cluster, namespace):
    sets = ("action.cache.type=emptyDir", "action.replicas=3")
    install(cluster, namespace, DEFAULTS, *sets)
    wait = ("kubectl", "wait", "--namespace", namespace, "--timeout=60s")
    cluster.run(*wait, "statefulset/flash-openpi-flash-action", "--for=jsonpath={.status.readyReplicas}=2")
    placed = running_pods(cluster, namespace, "action")
    assert set(placed.values()) == {"gpu-0"}
    (pending,) = {f"flash-openpi-flash-action-{n}" for n in range(3)} - placed.keys()
    cluster.run(*wait, f"pod/{pending}", "--for=condition=PodScheduled=false")
    assert "Insufficient nvidia.com/gpu" in cluster.run("kubectl", "describe", "pod", pending, "--namespace", namespace)
    cluster.run(*wait, "deployment/flash-openpi-flash-gateway", "--for=condition=Available")
    assert set(running_pods(cluster, namespace, "gateway").values()) == {"cpu-0"}, "a gateway bears no GPU node's taint"
    cluster.add_node("gpu-1", gpus=1)
    try:
        cluster.run(*wait, f"pod/{pending}", "--for=condition=Ready")
        assert running_pods(cluster, namespace, "action")[pending] == "gpu-1"
    finally:
        cluster.run("helm", "uninstall", "flash", "--namespace", namespace, "--wait")
        cluster.run("kubectl", "delete", "node", "gpu-1")


def test_planner_and_policy_behind_load_balancers_with_storage(cluster, namespace):
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"namespace": namespace}}
    cluster.apply(
        {
            **secret,
            "metadata": {"name": "robots-tls", "namespace": namespace},
            "stringData": {"tls.crt": "x", "tls.key": "x"},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "checkpoints", "namespace": namespace},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "kwok-volume",
                "resources": {"requests": {"storage": "100Gi"}},
            },
        },
        {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "nvidia"}, "handler": "nvidia"},
    )
    # KEDA and a metrics server are not here: what they would do, the number of replicas, is set.
    sets = (
        "action.autoscaling.type=none",
        "action.replicas=1",
        "gateway.autoscaling.enabled=false",
        "gateway.replicas=2",
    )
    notes = install(cluster, namespace, "combined", *sets, flags=("--wait",))
    assert "combined" in notes
    assert "WARNING" not in notes
    assert set(running_pods(cluster, namespace, "action").values()) == {"gpu-0"}
    assert set(running_pods(cluster, namespace, "planner").values()) == {"gpu-0"}
    assert len(running_pods(cluster, namespace, "gateway")) == 2
    service = cluster.get("service", "flash-openpi-flash", namespace=namespace)
    assert service["status"]["loadBalancer"]["ingress"][0]["ip"]
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    claims = {claim["metadata"]["name"]: claim["status"]["phase"] for claim in cluster.get("pvc", namespace=namespace)}
    assert claims == {"checkpoints": "Bound", "cache-flash-openpi-flash-planner-0": "Bound"}
    budgets = {b["metadata"]["name"].rpartition("-")[2]: b["status"] for b in cluster.get("pdb", namespace=namespace)}
    assert {name: status["expectedPods"] for name, status in budgets.items()} == {
        "action": 1,
        "planner": 1,
        "gateway": 2,
    }
    cluster.run("helm", "uninstall", "flash", "--namespace", namespace, "--wait")
    left = [claim["metadata"]["name"] for claim in cluster.get("pvc", namespace=namespace)]
    assert "cache-flash-openpi-flash-planner-0" in left, "a cache outlives its release unless told otherwise"
