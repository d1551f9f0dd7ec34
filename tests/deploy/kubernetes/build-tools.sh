#!/usr/bin/env bash
# Builds helm, kubectl and a Kubernetes control plane from their Go modules into FOLDER: build-tools.sh FOLDER [node].
# With `node` also what makes a machine a node: kubelet, kube-proxy, CoreDNS and a pod's `pause`.
# The versions are those of tools/*/go.mod; a program that is newer than its folder there is kept.
set -euo pipefail
folder=$(realpath -m "${1:?folder of the programs}")
cd "$(dirname "$0")/tools"
source ../../cannot.sh
mkdir -p "$folder/crds"

command -v go >/dev/null || {
    cannot "no Go here: 1.21 or newer builds Kubernetes, and fetches the release that tools/*/go.mod name by itself"
}

version() { awk -v module="$2" '$1 == module {print $2}' "$1/go.mod"; }
kubernetes=$(version kubernetes k8s.io/kubernetes)
minor=$(cut -d. -f2 <<<"$kubernetes")
# As the releases' own build scripts: charts ask for the cluster's version, and helm, without a cluster, for its own.
helm_flags="-X helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1 -X helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=$minor
    -X helm.sh/helm/v3/internal/version.version=$(version helm helm.sh/helm/v3)"
kubernetes_flags="-X k8s.io/component-base/version.gitVersion=$kubernetes -X k8s.io/component-base/version.gitMajor=1
    -X k8s.io/component-base/version.gitMinor=$minor"

build() { # folder of the go.mod, program, package, linker flags
    local program=$folder/$2 start=$SECONDS
    if [[ -e $program && -z $(find "$1" -newer "$program") ]]; then return; fi
    (cd "$1" && CGO_ENABLED=0 GOWORK=off GOFLAGS="${GO_BUILD_FLAGS:-}" nice go build -mod=readonly -trimpath -buildvcs=false \
        -ldflags "-s -w $4" -o "$program.new" "$3")
    mv "$program.new" "$program"
    echo "built $2 in $((SECONDS - start)) s"
}

build helm helm helm.sh/helm/v3/cmd/helm "$helm_flags"
build kubernetes kubectl k8s.io/kubernetes/cmd/kubectl "$kubernetes_flags"
build etcd etcd go.etcd.io/etcd/server/v3 ""
for program in kube-apiserver kube-controller-manager kube-scheduler; do
    build kubernetes $program k8s.io/kubernetes/cmd/$program "$kubernetes_flags"
done
build kwok kwok sigs.k8s.io/kwok/cmd/kwok ""
if [[ ${2:-} == node ]]; then
    for program in kubelet kube-proxy; do
        build kubernetes $program k8s.io/kubernetes/cmd/$program "$kubernetes_flags"
    done
    for program in coredns pause; do build $program $program . ""; done
fi

# How nodes, pods and claims come alive where there are none: kwok's own descriptions, and ours.
kwok=$(cd kwok && go list -m -f '{{.Dir}}' sigs.k8s.io/kwok)/kustomize/stage
for stage in "$kwok"/{node/fast/node-initialize,node/heartbeat-with-lease/node-heartbeat-with-lease,pod/fast/*,volume/fast/*}.yaml stages.yaml; do
    [[ $stage == */kustomization.yaml || $stage == */storage-class.yaml ]] || { echo ---; cat "$stage"; echo; }
done >"$folder/stages.yaml"
install -m 644 "$kwok/volume/fast/storage-class.yaml" "$folder/"

# What a cluster with KEDA and the Prometheus Operator has.
while read -r module version sum file; do
    download=$(go mod download -json "$module@$version")
    field() { sed -n "s/^\t\"$1\": \"\(.*\)\",\?$/\1/p" <<<"$download"; }
    [[ $(field Sum) == "$sum" ]] || { echo "build-tools.sh: $module $version is not what crds.txt says" >&2; exit 1; }
    install -m 644 "$(field Dir)/$file" "$folder/crds/"
done <crds.txt
