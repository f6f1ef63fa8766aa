//! DEL: succeeds when nothing is left, however little was there. The agent deletes the veth, and need not wait for the kernel
//! as the plugin would have to; where none answers soon, the plugin does it. An error would make the runtime try for ever,
//! so all that cannot be done now is left to the agent as a tombstone.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::time::{ClockId, clock_gettime};
use weft_shared::IfName;
use weft_shared::cni::{Code, NetConf, Target};
use weft_shared::deadline;
use weft_shared::names::{CNI_SOCKET, LINK_GROUP, host_ifname};
use weft_shared::protocol::{Attachment, Failure, Request};
use weft_shared::tombstone::{Tombstone, boot_id, dir_beside, lock_file};

use crate::agent::{Agent, AgentError, ensure_dir};
use crate::netlink::{Netlink, NetlinkError};
use crate::netns::Netns;
use crate::wiring::Pod;

const LOCK_EVERY: Duration = Duration::from_millis(10);

pub(crate) fn del(
    conf: &NetConf,
    target: &Target,
    netns: Option<&str>,
    deadline: Instant,
) -> Result<(), Failure> {
    let attachment = conf.attachment(target);
    // A bad path could not have been added through: the default agent's books are as good as any.
    let socket = conf.socket().unwrap_or_else(|_| CNI_SOCKET.into());
    // The agent need not wait until the kernel has freed the veth, as the process that deletes it does.
    let soon = deadline.min(Instant::now() + deadline::DEL_ALONE);
    let released = release(&socket, &attachment, soon);
    if released.is_err() {
        // The traffic stops, whoever is up. A veth that cannot be deleted now is the agent's affair.
        let _ = delete_ours(&host_ifname(&attachment));
    }
    match released {
        // Whoever cannot reach an agent has never been given anything by one.
        Ok(()) | Err(AgentError::Rootless(_)) => Ok(()),
        Err(_) => bury(&socket, attachment, netns, deadline),
    }
}

fn release(socket: &Path, attachment: &Attachment, deadline: Instant) -> Result<(), AgentError> {
    Agent::connect(socket, Duration::ZERO, deadline)?
        .done(&Request::Release { attachment: attachment.clone() })
}

/// Deletes the host's end of the pair, and with it the container's, if it bears our mark.
fn delete_ours(name: &IfName) -> Result<(), NetlinkError> {
    let mut host = Netlink::open()?;
    match host.link_by_name(name)? {
        Some(link) if link.group == LINK_GROUP => host.delete_link(link.index).map(drop),
        _ => Ok(()),
    }
}

/// Leaves word for the agent. It drains under the exclusive lock before it listens: under the shared one, either a
/// last attempt to connect succeeds or the tombstone is seen.
fn bury(
    socket: &Path,
    attachment: Attachment,
    netns: Option<&str>,
    deadline: Instant,
) -> Result<(), Failure> {
    let dir = dir_beside(socket);
    let unwritable = |e: &dyn std::fmt::Display| {
        Failure::new(Code::TryAgainLater, format!("weftd is away, and no tombstone can be left: {e}"))
            .with_details(format!("socket {}, tombstones in {}", socket.display(), dir.display()))
    };
    ensure_dir(socket).map_err(|e| unwritable(&e))?;
    let lock = lock_shared(&dir, deadline).map_err(|e| unwritable(&e))?;
    if release(socket, &attachment, deadline).is_ok() {
        return Ok(());
    }
    let boottime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(|e| unwritable(&e))?;
    let tombstone = Tombstone {
        attachment,
        boot_id: boot_id().map_err(|e| unwritable(&e))?,
        boottime_ns: Duration::from(boottime).as_nanos().try_into().unwrap_or(u64::MAX),
        netns_cookie: netns.and_then(cookie),
    };
    tombstone.write(&dir).map_err(|e| unwritable(&e))?;
    drop(lock);
    Ok(())
}

/// The shared lock, or none when the agent keeps it to itself for long: then it is running, and will see the file.
fn lock_shared(dir: &Path, deadline: Instant) -> std::io::Result<Option<Flock<std::fs::File>>> {
    let give_up = (Instant::now() + deadline::DEL_LOCK).min(deadline);
    let mut file = lock_file(dir)?;
    loop {
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= give_up => return Ok(None),
            Err((same, Errno::EWOULDBLOCK | Errno::EINTR)) => file = same,
            Err((_, e)) => return Err(e.into()),
        }
        #[expect(clippy::disallowed_methods, reason = "flock(2) has no deadline")]
        thread::sleep(LOCK_EVERY);
    }
}

/// The namespace's identity, if it is still there to ask.
fn cookie(path: &str) -> Option<u64> {
    Pod::open(Netns::open(path, false).ok()?).ok()?.cookie()
}
