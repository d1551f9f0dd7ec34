# Sourced: how a check of deployments says that this machine cannot run it, and why.

cannot() {
    echo "$*" > "${TEST_DEPLOY_REASON:-/dev/null}"
    echo "test-deploy: $*" >&2
    exit 3
}
