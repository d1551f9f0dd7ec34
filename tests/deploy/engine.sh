#!/usr/bin/env bash
# engine.sh COMMAND...: runs a command with a Docker engine, Docker Compose and the base images of deploy/docker at hand.
#
# What is there is used. What is not is made where a plain Debian machine, root and the registries of Debian, Python, Rust
# and Go allow it: the engine from Debian's packages, started here and stopped at the end; Compose from its Go module; base
# images that cannot be pulled by debootstrap, under the same names. Everything lies below .cache/deploy and is kept.
# Exit status 3: this machine cannot start an engine; the last line says what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=$PWD/.cache/deploy
mkdir -p "$cache"
source tests/deploy/cannot.sh

COMPOSE_VERSION=v2.40.3
PYTHON_IMAGE=python:3.11-slim-bookworm
RUST_IMAGE=rust:1-slim-bookworm

main() {
    start_engine
    export DOCKER_CONFIG=$cache/config
    have_compose
    have_image "$PYTHON_IMAGE" stand_in_python
    have_image "$RUST_IMAGE" stand_in_rust
    local status=0
    "$@" || status=$?
    return "$status"
}

missing() {
    cannot "no Docker engine here: $*"
}

start_engine() {
    docker info > /dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] || missing "none is running that this user may use, and starting one takes root"
    if ! command -v dockerd > /dev/null || ! command -v iptables > /dev/null; then
        command -v apt-get > /dev/null || missing "dockerd is not installed, and apt-get, which would bring it, neither"
        echo "installing Debian's docker.io" >&2
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io containerd iptables iproute2; } \
            > "$cache/apt.log" 2>&1 || missing "apt-get could not install docker.io (see $cache/apt.log)"
    fi
    # A socket and folders of its own, so that no other engine of this machine is in the way. A Unix socket's path is short.
    run=$(mktemp -d /tmp/openpi-flash-deploy.XXXXXX)
    export DOCKER_HOST=unix://$run/docker.sock
    # It is stopped last: an interrupt from the keyboard is not for it, and it ends with this script however that ends.
    setsid setpriv --pdeathsig TERM dockerd --host "$DOCKER_HOST" --data-root "$cache/docker" --exec-root "$run/exec" --pidfile "$run/pid" \
        > "$cache/dockerd.log" 2>&1 &
    trap stop_engine EXIT
    for _ in $(seq 60); do
        docker info > /dev/null 2>&1 && return
        kill -0 $! 2> /dev/null || break
        sleep 1
    done
    missing "dockerd did not start: $(grep -m1 -E 'failed to start|level=fatal' "$cache/dockerd.log" || tail -n 1 "$cache/dockerd.log")"
}

stop_engine() {
    local pid
    pid=$(cat "$run/pid" 2> /dev/null) || true
    if [ -n "$pid" ]; then
        kill "$pid"
        tail --pid="$pid" -f /dev/null
    fi
    rm -rf "$run"
}

# `go install` refuses a go.mod with replacements: a module of ours takes over what Compose's says and requires Compose.
have_compose() {
    local plugin=$DOCKER_CONFIG/cli-plugins/docker-compose module=github.com/docker/compose/v2
    docker compose version > /dev/null 2>&1 && return
    # One that is installed elsewhere is found only without a DOCKER_CONFIG of ours.
    if (unset DOCKER_CONFIG && docker compose version > /dev/null 2>&1); then
        unset DOCKER_CONFIG
        return
    fi
    if ! command -v go > /dev/null; then
        cannot "neither Docker Compose nor Go, which would build it, is installed"
    fi
    echo "building Docker Compose $COMPOSE_VERSION (some minutes)" >&2
    mkdir -p "$(dirname "$plugin")" "$cache/compose"
    (
        cd "$cache/compose"
        download=$(go mod download -json "$module@$COMPOSE_VERSION")
        of() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <<< "$download"; }
        cp "$(of GoMod)" go.mod
        cp "$(of Dir)/go.sum" go.sum
        chmod u+w go.mod go.sum
        go mod edit -module openpi-flash/compose -require "$module@$COMPOSE_VERSION"
        CGO_ENABLED=0 go build -mod=mod -trimpath -ldflags "-X $module/internal.Version=$COMPOSE_VERSION" \
            -o "$plugin" "$module/cmd"
    )
}

have_image() {
    docker image inspect "$1" > /dev/null 2>&1 || timeout 120 docker pull --quiet "$1" > /dev/null 2>&1 || {
        echo "$1 cannot be pulled: making a stand-in" >&2
        "$2" "$1"
    }
}

stand_in_python() {
    local root=$cache/root
    command -v debootstrap > /dev/null || apt-get install -y -qq --no-install-recommends debootstrap > /dev/null
    rm -rf "$root"
    debootstrap --variant=minbase --include=ca-certificates,python3.11,python3.11-venv,python3-pip \
        bookworm "$root" > "$cache/debootstrap.log"
    # The public image has Python's headers; the package would bring those of everything beside them.
    chroot "$root" sh -c 'cd /tmp && apt-get download -qq libpython3.11-dev && dpkg -x libpython3.11-dev_*.deb headers \
        && cp -r headers/usr/include/. /usr/include/ && rm -r headers libpython3.11-dev_*.deb' >> "$cache/debootstrap.log" 2>&1
    # Under the names that the public image has.
    ln -s /usr/bin/python3.11 "$root/usr/local/bin/python"
    ln -s /usr/bin/pip3 "$root/usr/local/bin/pip"
    import "$root" "$1"
}

stand_in_rust() {
    local root=$cache/root
    [ -d "$root" ] || stand_in_python "$PYTHON_IMAGE"
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y -qq --no-install-recommends gcc libc6-dev > "$cache/apt.log" 2>&1
    cp -a "$(rustc --print sysroot)"/{bin,lib} "$root/usr/local/"
    rm -rf "$root"/usr/local/lib/rustlib/{src,*/share}
    import "$root" "$1" -c 'ENV CARGO_HOME=/usr/local/cargo'
    rm -rf "$root"
}

import() {
    local root=$1 image=$2
    shift 2
    tar -C "$root" --exclude='./var/cache/apt/*' --exclude=./var/lib/apt/lists -c . \
        | docker import -c 'ENV LANG=C.UTF-8' "$@" - "$image" > /dev/null
}

main "$@"
