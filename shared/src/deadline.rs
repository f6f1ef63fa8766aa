//! How long plugin and agent wait for each other. Both sides read this table, so that no pair can drift apart.
//!
//! The rule: the agent answers before the plugin gives up, or the runtime learns nothing but "no answer in time"; and
//! the plugin is dead before the agent counts it as dead, or two pods could share an address.

use std::time::Duration;

/// ADD, the plugin: alarm(2) ends the process this long after its start, whatever it waits for. Whole seconds.
pub const ADD_ALARM: Duration = Duration::from_secs(10);
/// ADD, the plugin: short of the alarm, so that a slow agent still gets the runtime an error in words.
pub const ADD: Duration = Duration::from_secs(9);
/// ADD, the plugin: until somebody listens. An agent that restarts takes a second or two.
pub const ADD_CONNECT: Duration = Duration::from_secs(3);
/// ADD, the plugin: until the bridge port forwards and its bridge sends. They do as soon as the carrier is there, a matter
/// of milliseconds; only spanning tree makes it wait longer, and then the ADD goes on.
pub const FORWARDING: Duration = Duration::from_secs(1);
/// ADD, the plugin: to take one back whose result nobody could be given.
pub const TAKE_BACK: Duration = Duration::from_secs(3);
/// ADD, the agent: Reserve is answered. What takes longer goes on and is settled.
pub const RESERVE_ANSWER: Duration = Duration::from_secs(8);
/// ADD and DEL, the agent: the kernel is as a pod needs it. Reserve waits for that twice (the bridge, then what the pod has
/// beside its port), Commit and Release once, and each has to say what is not there.
pub const IN_KERNEL: Duration = Duration::from_secs(3);
/// ADD, the agent: this long after Reserve a plugin certainly wires no more. The same span for a veth with our mark and
/// without a record: it may be one that is just being made.
pub const WIRING: Duration = Duration::from_secs(15);

/// DEL and CHECK, the plugin.
pub const DEL_OR_CHECK: Duration = Duration::from_secs(5);
/// DEL, the plugin: for the agent to take the pod off the network. Then the plugin does so itself, before it asks once more.
pub const DEL_ALONE: Duration = Duration::from_secs(1);
/// CHECK, the plugin: until somebody listens.
pub const CHECK_CONNECT: Duration = Duration::from_secs(1);
/// DEL, the plugin: for its share of the tombstones' lock. An agent that keeps it longer is running, and sees the file.
pub const DEL_LOCK: Duration = Duration::from_secs(2);
/// Commit, Release and Check, the agent: answered.
pub const ANSWER: Duration = Duration::from_secs(4);
/// The tombstones' lock, the agent that starts: a DEL keeps its share for one attempt to connect and one small file.
pub const TOMBSTONE_LOCK: Duration = Duration::from_secs(10);

/// GC, the plugin: first until somebody listens, then in all.
pub const GC_CONNECT: Duration = Duration::from_secs(3);
pub const GC: Duration = Duration::from_secs(20);
/// GC, the agent: answered.
pub const GC_ANSWER: Duration = Duration::from_secs(16);

/// STATUS, the plugin: a node turns NotReady within seconds of a failed one, so a restart of the agent is waited for;
/// kubelet and containerd hold a lock meanwhile, so under a second in all.
pub const STATUS_CONNECT: Duration = Duration::from_millis(800);
pub const STATUS: Duration = Duration::from_millis(950);
/// STATUS, the agent: a node that is not ready yet is waited for.
pub const STATUS_READY: Duration = Duration::from_millis(600);
/// STATUS, the agent: answered.
pub const STATUS_ANSWER: Duration = Duration::from_millis(800);

const fn before(earlier: Duration, later: Duration) -> bool {
    earlier.as_millis() < later.as_millis()
}

const _: () = assert!(before(RESERVE_ANSWER, ADD) && before(ANSWER, ADD));
const _: () = assert!(before(IN_KERNEL, ANSWER) && before(IN_KERNEL.saturating_mul(2), RESERVE_ANSWER));
const _: () = assert!(before(ADD, ADD_ALARM) && before(ADD_ALARM, WIRING));
const _: () = assert!(before(ADD_CONNECT, ADD) && before(FORWARDING, ADD) && before(TAKE_BACK, ADD));
const _: () = assert!(before(CHECK_CONNECT, DEL_OR_CHECK) && before(DEL_LOCK, DEL_OR_CHECK));
const _: () =
    assert!(before(DEL_ALONE, DEL_LOCK) && before(DEL_ALONE.saturating_add(DEL_LOCK), DEL_OR_CHECK));
const _: () = assert!(before(ANSWER, DEL_OR_CHECK) && before(DEL_OR_CHECK, TOMBSTONE_LOCK));
const _: () = assert!(before(GC_CONNECT.saturating_add(GC_ANSWER), GC));
const _: () = assert!(before(STATUS_READY, STATUS_ANSWER));
const _: () = assert!(before(STATUS_ANSWER, STATUS) && before(STATUS_CONNECT, STATUS));
