#!/usr/bin/env bash
# Whether this machine can be a Kubernetes node; installs containerd and network plugins from Debian's packages where they
# are missing. Exit status 3: it cannot; the last line says why.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source tests/deploy/cannot.sh

[ "$(id -u)" = 0 ] || cannot "no kubelet here: it takes root"
if ! type -P containerd ctr runc iptables ip > /dev/null || ! [ -x /usr/lib/cni/ptp ]; then
    command -v apt-get > /dev/null || cannot "no kubelet here: containerd or its network plugins are not installed, and apt-get neither"
    log=$(mktemp)
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends containerd containernetworking-plugins iptables iproute2; } \
        > "$log" 2>&1 || cannot "no kubelet here: apt-get could not install containerd and containernetworking-plugins: $(tail -n 1 "$log")"
    rm "$log"
fi
why=$(unshare --net --mount --pid --fork true 2>&1) || cannot "no kubelet here: no namespaces of its own: $why"
group=$(awk '$3 ~ /^cgroup2?$/ {print $2; exit}' /proc/mounts)/openpi-flash-$$
why=$(mkdir "$group" 2>&1) || cannot "no kubelet here: no control groups of its own: $why"
rmdir "$group"
