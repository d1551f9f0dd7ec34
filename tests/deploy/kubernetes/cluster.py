"""A Kubernetes control plane. Its nodes are kwok's, where objects are checked, scheduled and reported as running, and
nothing runs; or a real one (node.py)."""

import contextlib
import json
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TLS = Path(__file__).parents[2] / "data/tls"
START_TIMEOUT_S = 120


class Cluster:
    """A running control plane.

    Attributes:
        tools: folder of its programs, as build-tools.sh makes it.
        kubeconfig: for kubectl and helm.
    """

    def __init__(self, tools: Path, directory: Path) -> None:
        self.tools = tools
        self.kubeconfig = directory / "kubeconfig"

    def run(self, program: str, *arguments: str, stdin: str | None = None, ok: bool = True) -> str:
        """Output of `helm` or `kubectl`, both streams together; with `ok` False, of one that must fail."""
        command = [self.tools / program, *arguments]
        environment = {"KUBECONFIG": str(self.kubeconfig), "HOME": str(self.kubeconfig.parent), "PATH": "/usr/bin:/bin"}
        result = subprocess.run(
            command,
            input=stdin,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=240,
            check=False,
        )
        assert (result.returncode == 0) == ok, f"{program} {' '.join(arguments)}: {result.returncode}\n{result.stdout}"
        return result.stdout

    def get(self, kind: str, name: str = "", **options: str) -> Any:
        """An object, or the objects of a kind. Options of kubectl by name, e.g. `selector`."""
        flags = [f"--{key}={value}" for key, value in options.items()]
        found = json.loads(self.run("kubectl", "get", kind, *([name] if name else []), "--output=json", *flags))
        return found if name else found["items"]

    def apply(self, *objects: Mapping[str, Any]) -> None:
        if objects:
            self.run("kubectl", "apply", "--filename=-", stdin=yaml.safe_dump_all(objects))

    def add_node(
        self, name: str, *, gpus: int = 0, labels: Mapping[str, str] | None = None, tainted: bool = False
    ) -> None:
        """A node of 32 cores; with GPUs, as a device plugin reports them."""
        resources = {"cpu": "32", "memory": "256Gi", "pods": "110"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        metadata = {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", **(labels or {})},
        }
        taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}] if tainted else []
        status = {"allocatable": resources, "capacity": resources}
        self.apply(
            {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}, "status": status}
        )
        self.run("kubectl", "wait", f"node/{name}", "--for=condition=Ready", "--timeout=60s")


@contextlib.contextmanager
def running_cluster(
    tools: Path, directory: Path, *, address: str = "127.0.0.1", simulated: bool = True
) -> Iterator[Cluster]:
    """Starts etcd, API server, controllers, scheduler and, with `simulated`, kwok on free ports; there is no node yet.

    Args:
        tools: folder of the programs, as build-tools.sh makes it.
        directory: an empty folder.
        address: where the API server is for nodes; everything else is on loopback.
        simulated: nodes are kwok's.
    """
    cluster = Cluster(tools, directory)
    etcd, peers, api, kwok = (_free_port() for _ in range(4))
    token = secrets.token_hex(16)
    tokens = directory / "tokens.csv"
    tokens.write_text(f"{token},admin,admin,system:masters\n")
    server = f"https://{address}:{api}"
    cluster.kubeconfig.write_text(json.dumps(_kubeconfig(server, token)))
    etcd_url, key = f"http://127.0.0.1:{etcd}", TLS / "server.key"
    kubeconfig = f"--kubeconfig={cluster.kubeconfig}"
    with contextlib.ExitStack() as stack:
        processes: dict[Path, subprocess.Popen[bytes]] = {}

        def start(program: str, *arguments: str) -> None:
            path = directory / f"{program}.log"
            log = stack.enter_context(path.open("wb"))
            process = subprocess.Popen([tools / program, *arguments], stdout=log, stderr=log, cwd=directory)
            stack.callback(_stop, process)
            processes[path] = process

        def wait_for(*arguments: str) -> None:
            deadline = time.monotonic() + START_TIMEOUT_S
            while True:
                try:
                    cluster.run("kubectl", *arguments)
                    return
                except AssertionError:
                    for path, process in processes.items():
                        assert process.poll() is None, f"{path} ends with:\n{path.read_text()[-2000:]}"
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)

        start(
            "etcd",
            f"--data-dir={directory / 'etcd'}",
            f"--listen-client-urls={etcd_url}",
            f"--advertise-client-urls={etcd_url}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )
        start(
            "kube-apiserver",
            f"--etcd-servers={etcd_url}",
            f"--bind-address={address}",
            f"--advertise-address={address}",
            "--kubelet-preferred-address-types=InternalIP",
            "--endpoint-reconciler-type=none",
            f"--secure-port={api}",
            f"--tls-cert-file={TLS / 'server.pem'}",
            f"--tls-private-key-file={key}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=Node,RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={TLS / 'server.pem'}",
            f"--service-account-signing-key-file={key}",
        )
        wait_for("get", "--raw", "/readyz")
        start(
            "kube-controller-manager",
            kubeconfig,
            f"--service-account-private-key-file={key}",
            f"--root-ca-file={TLS / 'ca.pem'}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--secure-port=0",
        )
        start("kube-scheduler", kubeconfig, "--leader-elect=false", "--secure-port=0")
        wait_for("get", "serviceaccount", "default")
        if simulated:
            start(
                "kwok",
                kubeconfig,
                f"--config={tools / 'stages.yaml'}",
                "--manage-all-nodes=true",
                "--node-lease-duration-seconds=40",
                "--node-ip=127.0.0.1",
                "--cidr=10.200.0.0/16",
                f"--server-address=127.0.0.1:{kwok}",
            )
            cluster.run("kubectl", "apply", f"--filename={tools / 'storage-class.yaml'}")
            cluster.run("kubectl", "apply", "--server-side", f"--filename={tools / 'crds'}")
            cluster.run("kubectl", "wait", "crd", "--all", "--for=condition=Established", "--timeout=60s")
        yield cluster


def _kubeconfig(server: str, token: str) -> dict[str, Any]:
    authority = {"certificate-authority": str(TLS / "ca.pem"), "tls-server-name": "localhost"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": server, **authority}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
