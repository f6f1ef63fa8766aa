# What the scripts need before Rust takes over: packages, toolchain, target. Sourced by bash.

TARGET=x86_64-unknown-linux-musl
GO_LINE="curl -fsSL https://go.dev/dl/go1.26.0.linux-amd64.tar.gz | tar -C /usr/local -xz"
# What weft's plugin is compared with and chained before.
REFERENCE_PLUGINS=v1.9.1
# The cluster of the tests and of the lab. What 1.34.2 calls its modules, v0.34.2, follows from it.
KUBERNETES=v1.34.2
RUSTUP_LINE="curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal"

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

# need_root: namespaces need it. Under sudo the rest of this file works as the user who called sudo.
need_root() {
    [ "$(id -u)" -eq 0 ] || die "root is needed for network namespaces: run it with sudo"
}

# as_owner COMMAND...: runs it as the user who called sudo, so that no file of root's is left in the user's folders.
as_owner() {
    if [ "$(id -u)" -eq 0 ] && [ -n "${SUDO_USER:-}" ] && [ "$SUDO_USER" != root ]; then
        runuser -u "$SUDO_USER" -- env HOME="$(getent passwd "$SUDO_USER" | cut -d: -f6)" PATH="$PATH" "$@"
    else
        "$@"
    fi
}

# missing_packages NAME:COMMAND-OR-FILE...: the packages that are not there.
missing_packages() {
    local entry
    for entry in "$@"; do
        if [ "${entry#*:/}" != "$entry" ]; then
            [ -e "${entry#*:}" ] || printf '%s ' "${entry%%:*}"
        else
            command -v "${entry#*:}" >/dev/null || printf '%s ' "${entry%%:*}"
        fi
    done
}

# install_packages NAME:COMMAND-OR-FILE...: installs what is missing on Debian and Ubuntu; elsewhere names it and stops.
install_packages() {
    local missing
    # sbin holds ip and nft, and is not in every user's PATH.
    export PATH="$PATH:/usr/sbin:/sbin"
    missing=$(missing_packages "$@")
    if [ -z "$missing" ]; then
        echo "Packages: all there."
        return
    fi
    command -v apt-get >/dev/null || die "missing: ${missing% } (Debian's names). This distribution has no apt-get: install them with its own tool and start again."
    echo "Packages to install: ${missing% } (less than a minute)"
    # shellcheck disable=SC2086 # a list of words
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } >/tmp/weft-apt.$$ 2>&1 || {
        cat /tmp/weft-apt.$$ >&2
        rm -f /tmp/weft-apt.$$
        die "apt-get failed; see above"
    }
    rm -f /tmp/weft-apt.$$
}

# need_cargo: through the rustup of whoever owns the work.
need_cargo() {
    local home=$HOME
    if [ -n "${SUDO_USER:-}" ]; then
        home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
        # Where that user's toolchains are, also for what runs as root.
        [ ! -d "$home/.rustup" ] || export RUSTUP_HOME="${RUSTUP_HOME:-$home/.rustup}" CARGO_HOME="${CARGO_HOME:-$home/.cargo}"
    fi
    export PATH="$PATH:$home/.cargo/bin"
    command -v cargo >/dev/null || die "cargo is missing. Install Rust with:
  $RUSTUP_LINE
and start again."
}

# need_target: what rust-toolchain.toml names; without rustup it must be there already.
need_target() {
    command -v rustup >/dev/null || return 0
    as_owner rustup toolchain install --no-self-update >/dev/null 2>&1 || as_owner rustup show active-toolchain >/dev/null ||
        die "rustup cannot install the toolchain that rust-toolchain.toml names"
    as_owner rustup target list --installed | grep -qx "$TARGET" || as_owner rustup target add "$TARGET"
}

# need_go PURPOSE
need_go() {
    export PATH="$PATH:/usr/local/go/bin"
    command -v go >/dev/null || die "Go is missing, $1. Install it with:
  $GO_LINE
and start again."
}

# need_reference_plugins: the CNI project's own, by Go's module proxy, in target/tools/cni-plugins.
need_reference_plugins() {
    local dir=$PWD/target/tools/cni-plugins name=github.com/containernetworking/plugins/plugins plugin missing=()
    for plugin in main/bridge main/loopback ipam/host-local meta/portmap meta/bandwidth meta/tuning; do
        [ "$(cat "$dir/.version" 2>/dev/null)" = "$REFERENCE_PLUGINS" ] && [ -x "$dir/${plugin#*/}" ] ||
            missing+=("$name/$plugin@$REFERENCE_PLUGINS")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    need_go "the reference CNI plugins are built with it"
    echo "Reference CNI plugins $REFERENCE_PLUGINS ..."
    as_owner env GOBIN="$dir" CGO_ENABLED=0 go install "${missing[@]}"
    as_owner sh -c 'echo "$1" >"$0"' "$dir/.version" "$REFERENCE_PLUGINS"
}

# kubernetes_dir: where need_kubernetes keeps the programs: outside the tree, which is removed more often than they change.
kubernetes_dir() {
    as_owner sh -c 'echo "${WEFT_CACHE:-$HOME/.cache/weft}/kubernetes/$1"' "$0" "$KUBERNETES"
}

# need_kubernetes: the six programs of a cluster, by Go's module proxy. `go install` refuses the module, whose own parts are
# at v0.0.0 in it: a module made for the build names their published versions, and takes every other one as it is there.
need_kubernetes() {
    local dir build names=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl)
    dir=$(kubernetes_dir)
    [ ! -d "$dir" ] || return 0
    need_go "Kubernetes is built with it"
    echo "Kubernetes $KUBERNETES, built from source: 4 to 8 minutes on two cores, once ..."
    as_owner mkdir -p "${dir%/*}"
    build=$(as_owner mktemp -d "$dir.XXXXXX")
    # Under a temporary name until all of it is there: the directory's presence says that it is whole.
    as_owner bash -euo pipefail -c '
        build=$1 version=$2
        trap '\''rm -rf "$build"'\'' EXIT
        mkdir "$build/module" "$build/bin" && cd "$build/module"
        original=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n "s/^.*\"GoMod\": \"\(.*\)\".*/\1/p")
        {
            echo "module cluster"
            grep -E "^(go|godebug) " "$original"
            echo "require k8s.io/kubernetes $version"
            awk "/^require \(/ { inside = 1 } inside && !/ v0\.0\.0( |\$)/ { print } /^\)/ { inside = 0 }" "$original"
            sed -n "s,^\t*\(replace \)*\(k8s.io/[^ ]*\) => ./staging/.*,replace \2 => \2 v0${version#v1},p" "$original"
        } >go.mod
        echo "Modules ..."
        set -- "${@:3}"
        version_of="-X k8s.io/component-base/version.gitVersion=$version -X k8s.io/client-go/pkg/version.gitVersion=$version"
        for name; do
            echo "$name ..."
            GOFLAGS=-mod=mod CGO_ENABLED=0 nice go build -ldflags "-s -w $version_of" -o "$build/bin/" "k8s.io/kubernetes/cmd/$name"
        done
        # Somebody else may have been faster; his are as good.
        mv -T "$build/bin" "${build%.*}" || [ -d "${build%.*}" ]
    ' "$0" "$build" "$KUBERNETES" "${names[@]}" || die "Kubernetes could not be built; see above"
}
