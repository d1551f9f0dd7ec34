#!/bin/sh
# Makes Cargo.lock of requirements/cargo.lock, which names no index: cargo puts in its own.
set -eu
cd "$(dirname "$0")/.."
rm -f Cargo.lock
cargo generate-lockfile --quiet
index=$(grep -m1 '^source = ' Cargo.lock)
sed "s|^source\$|$index|" requirements/cargo.lock > Cargo.lock.new
mv Cargo.lock.new Cargo.lock
