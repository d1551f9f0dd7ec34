"""A node on which pods run: containerd, kubelet, kube-proxy and CoreDNS, as root on this machine.

They live in network, mount and process namespaces of their own: whatever they and their pods start, mount or tell
iptables is gone with the first process of these, however that ends. Only control groups are left, which are removed.
A pair of veth devices joins the node to this machine, which is where robots and the API server are.
"""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.deploy.kubernetes.cluster import Cluster, running_cluster
from tests.deploy.support import run, wait_until

NAME = "node"
PODS = "10.244.0.0/24"
PAUSE = "docker.io/openpi-flash-test/pause:latest"
CNI = "/usr/lib/cni"
SOCKET = "/run/containerd/containerd.sock"

# What runs first in the namespaces. Folders and sockets that programs cannot be told otherwise are the node's own; the
# kubelet finds the machine's settings as it wants them, and leaves them as they are.
_FIRST = """
set -eu
ip link set lo up
mount -t tmpfs tmpfs /run
for folder in /var/lib/kubelet /var/lib/cni /var/log/containers; do
    mkdir -p "$folder" "$1$folder"
    mount --bind "$1$folder" "$folder"
done
while read -r setting value; do
    echo "$value" > "$1/$(basename "$setting")"
    mount --bind "$1/$(basename "$setting")" "$setting"
done <<SETTINGS
/proc/sys/vm/overcommit_memory 1
/proc/sys/vm/panic_on_oom 0
/proc/sys/kernel/panic 10
/proc/sys/kernel/panic_on_oops 1
/proc/sys/kernel/keys/root_maxkeys 1000000
/proc/sys/kernel/keys/root_maxbytes 25000000
SETTINGS
echo ready
sleep infinity &
wait  # and bury what nobody waits for
"""


class Node:
    """A node, ready for pods.

    Attributes:
        cluster: its control plane.
        address: where its node ports are.
    """

    def __init__(self, cluster: Cluster, address: str, enter: list[str]) -> None:
        self.cluster = cluster
        self.address = address
        self._enter = enter

    def load_images(self, *names: str) -> None:
        """From the Docker engine to the node."""
        _load_images(self._enter, *names)


@contextlib.contextmanager
def running_node(tools: Path, directory: Path) -> Iterator[Node]:
    """Starts a control plane and its one node.

    Args:
        tools: folder of the programs, as `build-tools.sh FOLDER node` makes it.
        directory: an empty folder for everything, images included.
    """
    network = f"198.18.{os.getpid() % 256}"  # two checkouts may be tried at a time
    here, there = f"{network}.1", f"{network}.2"
    group = f"openpi-flash-{os.getpid()}"
    with _logs_on_failure(directory), contextlib.ExitStack() as stack:
        stack.enter_context(_control_group(group))
        enter = stack.enter_context(_namespaces(directory))
        _join(here, there, enter)
        (directory / "cluster").mkdir()
        cluster = stack.enter_context(running_cluster(tools, directory / "cluster", address=here, simulated=False))

        def start(*command: str) -> None:
            """Until the namespaces end."""
            log = stack.enter_context((directory / f"{Path(command[0]).name}.log").open("wb"))
            subprocess.Popen(
                [*enter, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

        start("containerd", f"--config={_containerd_config(directory)}")
        wait_until(lambda: "Server:" in run(*enter, "ctr", "version", check=False), "containerd", 60)
        _load_pause(tools, enter)
        start(
            str(tools / "kubelet"),
            f"--config={_kubelet_config(directory, there, group)}",
            f"--kubeconfig={cluster.kubeconfig}",
            f"--hostname-override={NAME}",
            f"--node-ip={there}",
        )
        start(
            str(tools / "kube-proxy"),
            f"--kubeconfig={cluster.kubeconfig}",
            f"--hostname-override={NAME}",
            "--proxy-mode=iptables",
            f"--cluster-cidr={PODS}",
            "--conntrack-max-per-core=0",
            "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0",
        )
        start(str(tools / "coredns"), "-conf", str(_dns_config(directory, cluster)))
        wait_until(lambda: f"node/{NAME}" in cluster.run("kubectl", "get", "nodes", "--output=name"), "a node", 60)
        cluster.run("kubectl", "wait", f"node/{NAME}", "--for=condition=Ready", "--timeout=60s")
        yield Node(cluster, there, enter)


@contextlib.contextmanager
def _logs_on_failure(directory: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text()[-3000:]}")
        raise


@contextlib.contextmanager
def _namespaces(directory: Path) -> Iterator[list[str]]:
    """Namespaces that end with us; yields what enters them."""
    fixed = map(Path, ("/var/lib/kubelet", "/var/lib/cni", "/var/log/containers"))
    made = [folder for folder in fixed if not folder.exists()]
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (directory / "namespaces.log").open("wb") as log:
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", *unshare, "bash", "-c", _FIRST, "node", str(directory)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # an interrupt from the keyboard is for the checks alone, which end it in order
        )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n", "the namespaces of a node could not be made"
        (first,) = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        try:
            yield ["nsenter", f"--target={first}", "--net", "--mount", "--pid", "--wdns=/", "--"]
        finally:
            # With it the kernel ends all that is in them, and only then tells its parent.
            os.kill(int(first), signal.SIGKILL)
            holder.wait()
    finally:
        holder.kill()
        holder.wait()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _join(here: str, there: str, enter: list[str]) -> None:
    """A link between this machine and the namespaces, which goes with them."""
    name, target = f"opf{os.getpid()}", enter[1].partition("=")[2]
    run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", target)
    run("ip", "address", "add", f"{here}/24", "dev", name)
    run("ip", "link", "set", name, "up")
    run(*enter, "ip", "address", "add", f"{there}/24", "dev", "eth0")
    run(*enter, "ip", "link", "set", "eth0", "up")
    run(*enter, "ip", "route", "add", "default", "via", here)


@contextlib.contextmanager
def _control_group(name: str) -> Iterator[None]:
    """A control group of this name in every hierarchy, removed with all below it."""
    mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    groups = [Path(mount[1]) / name for mount in mounts if mount[2] in ("cgroup", "cgroup2")]
    try:
        for group in groups:
            group.mkdir()
        yield
    finally:
        for group in groups:
            for path, _, _ in os.walk(group, topdown=False):
                Path(path).rmdir()


def _containerd_config(directory: Path) -> Path:
    network = {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": PODS, "routes": [{"dst": "0.0.0.0/0"}]}}],
    }
    (directory / "cni").mkdir()
    (directory / "cni/pods.conflist").write_text(json.dumps(network))
    path = directory / "containerd.toml"
    # A container may not be less likely than this process to be ended when memory runs out.
    path.write_text(f"""
version = 2
root = "{directory}/containerd"
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.internal.v1.opt"]
path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI}"
conf_dir = "{directory}/cni"
""")
    return path


def _kubelet_config(directory: Path, address: str, group: str) -> Path:
    (directory / "resolv.conf").touch()
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},  # only this machine reaches the node
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{group}",
        "failCgroupV1": False,
        "clusterDNS": [address],
        "clusterDomain": "cluster.local",
        "resolvConf": str(directory / "resolv.conf"),
        "podLogsDir": str(directory / "pods"),
        "failSwapOn": False,
        # How full the disk of this machine is matters to nothing here.
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "nodefs.inodesFree": "0%"},
        "imageGCHighThresholdPercent": 100,
    }
    path = directory / "kubelet.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _dns_config(directory: Path, cluster: Cluster) -> Path:
    path = directory / "Corefile"
    path.write_text(f"cluster.local {{\n errors\n kubernetes {{\n  kubeconfig {cluster.kubeconfig}\n }}\n}}\n")
    return path


def _load_pause(tools: Path, enter: list[str]) -> None:
    """The image that holds a pod's namespaces, of one program."""
    name = PAUSE.removeprefix("docker.io/")
    with subprocess.Popen(["tar", "--create", f"--directory={tools}", "pause"], stdout=subprocess.PIPE) as archive:
        run("docker", "import", "--change", 'ENTRYPOINT ["/pause"]', "-", name, stdin=archive.stdout)
    try:
        _load_images(enter, name)
    finally:
        run("docker", "image", "rm", name)


def _load_images(enter: list[str], *names: str) -> None:
    with subprocess.Popen(["docker", "save", *names], stdout=subprocess.PIPE) as archive:
        run(*enter, "ctr", "--namespace=k8s.io", "images", "import", "-", stdin=archive.stdout)
    assert archive.returncode == 0, f"docker save {' '.join(names)}"
