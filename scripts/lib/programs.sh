# The programs as hosts and images get them: static, for one of two architectures, stripped. Sourced by what packs them,
# after setup.sh.
# shellcheck disable=SC2034 # what is set here is for the caller

ZIG=ziglang==0.13.0

# packing_options ARGUMENTS...: `arch`, `profile` and `out`, which has its default already; `usage` is the caller's.
packing_options() {
    arch=$(uname -m) profile=release
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help) usage && exit ;;
        --*=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --arch | --profile | --out) [ -n "${2-}" ] || die "$1 needs a value" ;;
        *) usage >&2 && die "unknown argument '$1'" ;;
        esac
        case $1=$2 in
        --arch=x86_64 | --arch=aarch64) arch=$2 ;;
        --profile=release | --profile=dev) profile=$2 ;;
        --out=*) out=$2 ;;
        --arch=*) die "--arch '$2': expected x86_64 or aarch64" ;;
        --profile=*) die "--profile '$2': expected release or dev" ;;
        esac
        shift 2
    done
}

# known_arch: what is known of $arch: `other_arch` is its name with Debian and with container images.
known_arch() {
    case $arch in
    x86_64) other_arch=amd64 machine=3e ;; # e_machine of elf(5)
    aarch64) other_arch=arm64 machine=b7 ;;
    *) die "this host is $arch: name --arch x86_64 or aarch64" ;;
    esac
}

# zig_wrappers: a compiler and an archiver as cc-rs wants them. zig knows its targets by shorter names than clang does.
zig_wrappers() {
    local tools=$PWD/target/tools zig
    if ! zig=$(command -v zig); then
        if ! "$tools/zig/bin/python" -c 'import ziglang' 2>/dev/null; then
            echo "Getting zig for the C parts of $arch ..." >&2
            as_owner python3 -m venv "$tools/zig" || die "python3 with venv is missing (Debian: python3-venv); or put zig 0.13 into the PATH"
            as_owner "$tools/zig/bin/pip" install --quiet "$ZIG" || die "pip cannot install $ZIG; or put zig 0.13 into the PATH"
        fi
        zig=$("$tools/zig/bin/python" -c 'import ziglang, os; print(os.path.join(os.path.dirname(ziglang.__file__), "zig"))')
    fi
    as_owner tee "$tools/$arch-cc" >/dev/null <<EOF
#!/bin/bash
arguments=()
for argument in "\$@"; do
    case \$argument in --target=*) ;; *) arguments+=("\$argument") ;; esac
done
exec '$zig' cc -target $arch-linux-musl "\${arguments[@]}"
EOF
    printf '#!/bin/sh\nexec "%s" ar "$@"\n' "$zig" | as_owner tee "$tools/$arch-ar" >/dev/null
    chmod +x "$tools/$arch-cc" "$tools/$arch-ar"
    local name=${arch}_unknown_linux_musl
    export "CC_$name=$tools/$arch-cc" "AR_$name=$tools/$arch-ar"
    # rustc brings musl, its start files and the linker.
    export "CARGO_TARGET_$(tr '[:lower:]' '[:upper:]' <<<"$name")_LINKER=rust-lld"
}

build() {
    local target=$arch-unknown-linux-musl folder=$profile
    [ "$profile" = release ] || folder=debug
    # shellcheck disable=SC2034 # for need_target
    TARGET=$target
    need_cargo
    mkdir -p target/tools
    if [ "$arch" != "$(uname -m)" ]; then zig_wrappers; fi
    need_target
    # What is packed is stripped; the release profile is by itself.
    export CARGO_PROFILE_DEV_STRIP=true
    as_owner cargo build --locked --profile "$profile" --target "$target" -p weft-agent -p weft-cni --bins >&2
    echo "target/$target/$folder"
}

# check_program FILE: what hosts are promised: this machine's code, and no library of the host's.
check_program() {
    [ "$(od -An -tx1 -j18 -N1 "$1" | tr -d ' ')" = "$machine" ] || die "$1 is no program for $arch"
    # PT_INTERP names the dynamic loader.
    ! readelf --program-headers --wide "$1" | grep -q INTERP || die "$1 is not static"
}

# put_programs FROM TO
put_programs() {
    local program
    for program in weft weftd weftctl; do
        [ -f "$1/$program" ] || die "$1/$program is missing"
        check_program "$1/$program"
        install -m 755 "$1/$program" "$2/$program"
        [ "$arch" != "$(uname -m)" ] || strip "$2/$program"
    done
}

# this_version: $version, $commit, and $SOURCE_DATE_EPOCH, the time of everything that is packed: the
# commit's, unless it is set.
this_version() {
    version=$(sed -n '/^\[workspace.package\]/,/^\[/ s/^version = "\(.*\)"/\1/p' Cargo.toml)
    commit=$(as_owner git rev-parse HEAD 2>/dev/null || echo unknown)
    SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(as_owner git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.toml)}
    export SOURCE_DATE_EPOCH
}
