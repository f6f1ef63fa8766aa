#!/bin/bash
# In the VM, as a service at the end of each boot: what weft promises under systemd. Its last line is read by the test.
exec >/dev/ttyS0 2>&1
set -uo pipefail
export ETCDCTL_API=3
here=$(dirname "$0")
stage=$(cat "$here/stage" 2>/dev/null || echo 1)
# How long etcd stays away.
. "$here/settings"

finish() {
    echo "VM stage $stage: $1"
    sync
    echo o >/proc/sysrq-trigger
    sleep 60
}
fail() {
    systemctl --no-pager status weftd
    journalctl --no-pager -u weftd -u etcd | tail -n 60
    finish "FAILED: $*"
}
ok() { echo "ok $(cut -d' ' -f1 /proc/uptime) $*"; }
property() { systemctl show --property "$1" --value weftd; }
pods() { weftctl pods --json | tr -d ' \n'; }

# until_true SECONDS COMMAND...
until_true() {
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}
ready() { weftctl status >/dev/null 2>&1; }

underlay() {
    ip link add dummy0 type dummy
    ip address add 192.168.77.11/24 dev dummy0
    ip link set dummy0 up
    ip route add default via 192.168.77.1
}

configure() { etcdctl put /coreos.com/network/config '{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'; }

# As a runtime would, again where the plugin says "try again": an emulated kernel takes its time.
add_pod() {
    ip netns add "$1"
    until_true 60 add "$1"
}

add() {
    CNI_COMMAND=ADD CNI_CONTAINERID=$1 CNI_NETNS=/run/netns/$1 CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni \
        /usr/lib/cni/weft <<<'{"cniVersion":"1.0.0","name":"weft","type":"weft"}' >/dev/null
}

del_pod() {
    CNI_COMMAND=DEL CNI_CONTAINERID=$1 CNI_NETNS=/run/netns/$1 CNI_IFNAME=eth0 CNI_PATH=/usr/lib/cni \
        /usr/lib/cni/weft <<<'{"cniVersion":"1.0.0","name":"weft","type":"weft"}'
}

stage1() {
    local before pid restarts number
    underlay
    systemctl start etcd containerd || fail "etcd or containerd does not start"
    configure || fail "etcdctl"
    dpkg -i "$here/weft.deb" || fail "dpkg -i"
    systemctl is-enabled --quiet weftd || fail "weftd is not enabled"
    [ "$(property ActiveState)" = inactive ] || fail "weftd was started unasked"
    ok "installed"
    timeout 120 systemctl start weftd || fail "weftd does not start"
    ready || fail "start came back before weftd was ready"
    grep -q '^CapEff:.*0000000000003000$' "/proc/$(property MainPID)/status" || fail "capabilities: $(grep Cap "/proc/$(property MainPID)/status")"
    ok "started, ready, with CAP_NET_ADMIN and CAP_NET_RAW alone"

    for number in 1 2 3 4 5; do add_pod "pod$number" || fail "ADD $number"; done
    before=$(pods)
    [ "$(grep -o committed <<<"$before" | wc -l)" = 5 ] || fail "pods: $before"
    timeout 120 systemctl restart weftd || fail "restart"
    [ "$(pods)" = "$before" ] || fail "a restart lost reservations: $(pods)"
    systemctl stop weftd
    [ "$(stat -c '%a %U' /run/weft)" = "700 root" ] || fail "/run/weft: $(stat -c '%a %U' /run/weft)"
    [ -n "$(find /run/weft -type f -name '*pod1*' -o -type f -path '/run/weft/*/*')" ] || fail "stop removed the records"
    timeout 120 systemctl start weftd || fail "start"
    [ "$(pods)" = "$before" ] || fail "a stop lost reservations: $(pods)"
    add_pod pod6 || fail "ADD 6"
    before=$(pods)
    ok "restart and stop keep every reservation"

    pid=$(property MainPID)
    kill -9 "$pid"
    until_true 60 ready || fail "weftd is not back after a kill"
    [ "$(property MainPID)" != "$pid" ] && [ "$(property NRestarts)" = 1 ] && [ "$(pods)" = "$before" ] || fail "kill: $(property NRestarts) restarts, $(pods)"
    ok "killed: back with every reservation"

    cp /etc/weft/weftd.env /tmp/weftd.env
    echo FLANNELD_SUBNET_LEASE_RENEW_MARGIN=0 >>/etc/weft/weftd.env
    ! timeout 60 systemctl restart weftd || fail "a refused setting is accepted"
    [ "$(property ActiveState)" = failed ] && [ "$(property ExecMainStatus)" = 2 ] || fail "a refused setting: $(property ActiveState), $(property ExecMainStatus)"
    journalctl --no-pager -u weftd | grep -q 'expected minutes from 1 to 1439' || fail "the journal does not name the setting"
    cp /tmp/weftd.env /etc/weft/weftd.env
    timeout 120 systemctl start weftd || fail "start after a refused setting"
    ok "a refused setting is named and not tried over and over"

    pid=$(property MainPID) restarts=$(property NRestarts)
    systemctl stop etcd
    echo "etcd is away for $away s"
    sleep "$away"
    [ "$(property MainPID)" = "$pid" ] && [ "$(property NRestarts)" = "$restarts" ] || fail "weftd restarted while etcd was away"
    [ "$(pods)" = "$before" ] || fail "pods without etcd: $(pods)"
    weftctl status
    systemctl start etcd
    until_true 60 bash -c 'weftctl status | grep -q "connected"' || fail "etcd is back, and weftd has not noticed"
    ok "$away s without etcd caused no restart"

    weftctl status | grep '^lease' | cut -d' ' -f1-7 >"$here/lease"
    # The next boot is without a store, and without an underlay until this script makes one.
    systemctl disable etcd
    echo 2 >"$here/stage"
    finish passed
}

stage2() {
    [ "$(systemctl is-active weftd)" = activating ] || fail "weftd is $(systemctl is-active weftd) without an underlay"
    until_true 60 systemctl is-active --quiet multi-user.target || fail "the boot waits for weftd: $(systemctl list-jobs)"
    [ "$(systemctl is-active weftd)" = activating ] || fail "weftd is $(systemctl is-active weftd)"
    ok "the boot is over and weftd waits: nothing waits for it"
    underlay
    until_true 60 ready || fail "weftd is not ready with an underlay"
    systemctl is-active --quiet weftd || fail "weftd is $(systemctl is-active weftd)"
    weftctl status | grep '^lease' | cut -d' ' -f1-7
    [ "$(pods)" = "[]" ] || fail "reservations survived the reboot: $(pods)"
    add_pod again || fail "ADD after the reboot"
    systemctl start etcd
    until_true 60 bash -c 'weftctl status | grep -q " held"' || fail "the lease is not confirmed"
    ok "rebooted: the same lease, no reservation left behind"

    ! dpkg -r weft || fail "removed under an attached pod"
    until_true 60 systemctl is-active --quiet weftd || fail "weftd was not started again"
    del_pod again || fail "DEL"
    dpkg -P weft || fail "dpkg -P"
    for path in /usr/bin/weftd /usr/lib/cni/weft /etc/weft /var/lib/weft /run/weft /etc/cni/net.d/10-weft.conflist; do
        [ ! -e "$path" ] || fail "purge left $path"
    done
    ! ip link show flannel.1 2>/dev/null && ! ip link show cni0 2>/dev/null || fail "purge left devices"
    ! systemctl cat weftd >/dev/null 2>&1 || fail "purge left the unit"
    ok "purged: nothing is left"
    finish passed
}

# The tarball's own install, on a host that never had the package: what it asks systemd is answered by systemd.
stage3() {
    local dir pid before path said
    underlay
    systemctl start etcd containerd || fail "etcd or containerd does not start"
    configure || fail "etcdctl"
    mkdir /opt/weft && tar -xzf "$here/weft.tar.gz" -C /opt/weft --strip-components 1 || fail "tar"
    dir=/opt/weft
    install() { said=$("$dir/install" "$@" 2>&1) || fail "install $*: $said"; }
    packed() { (cd "$dir" && find . -type f ! -name SHA256SUMS -printf '%P\n' | xargs sha256sum >SHA256SUMS); }
    install
    systemctl is-enabled --quiet weftd || fail "install: weftd is not enabled: $said"
    [ "$(property ActiveState)" = inactive ] || fail "install started weftd unasked"
    timeout 120 systemctl start weftd || fail "weftd of the tarball does not start"
    ready || fail "start came back before weftd was ready"
    [ -x /usr/lib/cni/weft ] || fail "no plugin where Debian's containerd looks: $said"
    add_pod tar || fail "ADD"
    before=$(pods) pid=$(property MainPID)
    install
    grep -q '^Nothing to do' <<<"$said" && [ "$(property MainPID)" = "$pid" ] || fail "the second install: $said"
    ok "installed from the tarball; the second install changes nothing"

    echo >>"$dir/bin/weftd"
    packed
    install
    restarted "$pid" "$before" || fail "another build was not started: $said"
    pid=$(property MainPID)
    sed -i 's/^Description=.*/& (another)/' "$dir/conf/weftd.service"
    packed
    install
    restarted "$pid" "$before" || fail "another unit was not started: $said"
    [ "$(property NeedDaemonReload)" = no ] || fail "systemd was not told of the unit"
    pid=$(property MainPID)
    # Somebody else has put the unit and told nobody: systemd runs what it knew.
    echo >>"$dir/conf/weftd.service" && cp "$dir/conf/weftd.service" /etc/systemd/system/weftd.service
    packed
    until_true 60 property_is NeedDaemonReload yes || fail "systemd does not notice a changed unit"
    install
    restarted "$pid" "$before" || fail "a unit put by hand was not started: $said"
    ok "upgrades restart weftd, and keep every reservation"

    pid=$(property MainPID)
    ! said=$("$dir/install" --remove 2>&1) || fail "removed under an attached pod: $said"
    [ "$(property MainPID)" = "$pid" ] || fail "a refused removal stopped weftd: $said"
    del_pod tar || fail "DEL"
    install --remove --purge
    for path in /usr/local/bin/weftd /usr/local/bin/weftctl /usr/lib/cni/weft /etc/weft /var/lib/weft /run/weft \
        /etc/cni/net.d/10-weft.conflist /etc/systemd/system/weftd.service /etc/systemd/system/multi-user.target.wants/weftd.service /usr/local/share/weft; do
        [ ! -e "$path" ] && [ ! -L "$path" ] || fail "remove --purge left $path: $said"
    done
    ! ip link show flannel.1 2>/dev/null && ! ip link show cni0 2>/dev/null || fail "remove left devices"
    ok "removed: nothing is left"
    finish passed
}

property_is() { [ "$(property "$1")" = "$2" ]; }

# restarted PID PODS: another process runs, is ready, and knows the same pods.
restarted() {
    until_true 60 another "$1" && until_true 60 ready && [ "$(pods)" = "$2" ]
}
another() { [ "$(property MainPID)" != "$1" ] && [ "$(property ActiveState)" = active ]; }

"stage$stage"
