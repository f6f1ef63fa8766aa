//! The kernel's announcements, reduced to one word: look again.
//!
//! The monitor never tells what changed. IPv4 routes that go with a link or an address are not announced at all
//! (net/ipv4/fib_trie.c), so every announcement of a link or an address is a reason to look at everything.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use tracing::warn;

use super::inbox::{Inbox, receive_timeout};
use super::{KernelError, nft};

// linux/rtnetlink.h, enum rtnetlink_groups.
const GROUPS: [u32; 9] = [
    1,  // RTNLGRP_LINK
    3,  // RTNLGRP_NEIGH
    4,  // RTNLGRP_TC
    5,  // RTNLGRP_IPV4_IFADDR
    7,  // RTNLGRP_IPV4_ROUTE
    9,  // RTNLGRP_IPV6_IFADDR
    11, // RTNLGRP_IPV6_ROUTE
    24, // RTNLGRP_IPV4_NETCONF
    25, // RTNLGRP_IPV6_NETCONF
];
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
/// How often a quiet monitor checks whether it is still wanted.
const CHECK_SECONDS: i64 = 1;
const RECEIVE_BUFFER: u32 = 1 << 20;
/// Pods that come and go are announced a dozen times each. After the first of such a burst it collects for so long, in the
/// socket, and wakes nobody.
const COLLECT: Duration = Duration::from_millis(5);
/// Who announces without end must be heard before.
const BURST: usize = 1024;

/// Called when an announcement matters, soon after the first, and once for what comes together.
type Wake = Arc<dyn Fn() + Send + Sync>;

/// Whose neighbours matter. Those of pods come and go all the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbours {
    All,
    Of(u32),
    None,
}

impl Neighbours {
    /// In one atomic number: interface indices are positive and signed in the kernel.
    fn encode(self) -> u32 {
        match self {
            Self::All => 0,
            Self::Of(index) => index,
            Self::None => u32::MAX,
        }
    }

    fn decode(number: u32) -> Self {
        match number {
            0 => Self::All,
            u32::MAX => Self::None,
            index => Self::Of(index),
        }
    }
}

/// Threads that listen in the network namespace they were started in: one for devices, addresses and routes, one for
/// the packet filter. They end when dropped.
#[derive(Debug, Default)]
pub struct Monitor {
    stop: Arc<AtomicBool>,
    /// [`Neighbours`], encoded.
    neighbours: Arc<AtomicU32>,
    overruns: Arc<AtomicU64>,
    /// That a thread ended without having been told to.
    broken: Arc<AtomicBool>,
}

impl Monitor {
    pub fn start(wake: Wake) -> Result<Self, KernelError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        let monitor = Self::default();
        // A kernel without nf_tables has nothing to announce either; the look at it says so.
        match nft::listen() {
            Ok(packet_filter) => {
                let mut commit = nft::Commit::default();
                let heard = move |datagram: &[u8]| commit.heard(datagram);
                monitor.hear("nftables-monitor", packet_filter, wake.clone(), heard)?;
            }
            Err(KernelError::NoNftables) => {}
            Err(error) => {
                warn!(%error, "nftables-monitor not started; changes of the packet filter are found by the sweep alone");
                monitor.broken.store(true, Ordering::Relaxed);
            }
        }
        let neighbours = monitor.neighbours.clone();
        monitor.hear("netlink-monitor", socket, wake, move |datagram| {
            matters(datagram, Neighbours::decode(neighbours.load(Ordering::Relaxed)))
        })?;
        Ok(monitor)
    }

    /// Starts a thread that wakes for datagrams that matter.
    fn hear(
        &self,
        name: &'static str,
        socket: Socket,
        wake: Wake,
        mut matters: impl FnMut(&[u8]) -> bool + Send + 'static,
    ) -> Result<(), KernelError> {
        let _ = socket.set_rx_buf_sz(RECEIVE_BUFFER);
        receive_timeout(&socket, CHECK_SECONDS)?;
        let mut inbox = Inbox::of(name);
        self.attend(name, move |overruns| news(&socket, &mut inbox, overruns, &mut matters), wake)
    }

    fn attend(
        &self,
        name: &'static str,
        mut news: impl FnMut(&AtomicU64) -> io::Result<bool> + Send + 'static,
        wake: Wake,
    ) -> Result<(), KernelError> {
        let (stop, overruns) = (self.stop.clone(), self.overruns.clone());
        let watched = Watched { stop: self.stop.clone(), broken: self.broken.clone() };
        thread::Builder::new().name(name.into()).spawn(move || {
            let _watched = watched;
            while !stop.load(Ordering::Relaxed) {
                match news(&overruns) {
                    Ok(true) => {
                        wake();
                        #[expect(clippy::disallowed_methods, reason = "a pause, not a wait")]
                        thread::sleep(COLLECT);
                    }
                    Ok(false) => {}
                    Err(error) => {
                        warn!(%error, "{name} ended; changes are now found by the sweep alone");
                        return;
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Whether every thread listens that was to.
    pub fn is_whole(&self) -> bool {
        !self.broken.load(Ordering::Relaxed)
    }

    pub fn watch(&self, neighbours: Neighbours) {
        self.neighbours.store(neighbours.encode(), Ordering::Relaxed);
    }

    /// Times the kernel dropped announcements because they were not read fast enough.
    pub fn overruns(&self) -> u64 {
        self.overruns.load(Ordering::Relaxed)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Waits for an announcement; whether it or one that is there with it matters.
fn news(
    socket: &Socket,
    inbox: &mut Inbox,
    overruns: &AtomicU64,
    mut matters: impl FnMut(&[u8]) -> bool,
) -> io::Result<bool> {
    let (mut news, mut flags) = (false, 0);
    for _ in 0..BURST {
        match inbox.next(socket, flags) {
            Ok(datagram) => news |= matters(datagram),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::EMSGSIZE)) => {
                overruns.fetch_add(1, Ordering::Relaxed);
                news = true;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => break,
            Err(e) => return Err(e),
        }
        flags = libc::MSG_DONTWAIT;
    }
    Ok(news)
}

/// Whether any message of a datagram is more than a foreign neighbour's.
fn matters(datagram: &[u8], neighbours: Neighbours) -> bool {
    let mut rest = datagram;
    while rest.len() >= 16 {
        let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
        let kind = u16::from_ne_bytes([rest[4], rest[5]]);
        // struct ndmsg: family and padding, then the interface index.
        let index = rest.get(20..24).unwrap_or_default();
        let matters = match neighbours {
            _ if !matches!(kind, RTM_NEWNEIGH | RTM_DELNEIGH) => true,
            Neighbours::All => true,
            Neighbours::Of(device) => index == device.to_ne_bytes(),
            Neighbours::None => false,
        };
        if matters {
            return true;
        }
        rest = &rest[length.clamp(16, rest.len()).next_multiple_of(4).min(rest.len())..];
    }
    false
}

/// Tells of a thread's end, whatever ended it.
struct Watched {
    stop: Arc<AtomicBool>,
    broken: Arc<AtomicBool>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.stop.load(Ordering::Relaxed) {
            self.broken.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::linux::tests::{in_namespace, ip};

    fn message(kind: u16, index: u32) -> Vec<u8> {
        let mut bytes = vec![0; 28];
        bytes[..4].copy_from_slice(&28_u32.to_ne_bytes());
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[20..24].copy_from_slice(&index.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_thread_that_ended_is_missed() {
        for panics in [false, true] {
            let monitor = Monitor::default();
            assert!(monitor.is_whole());
            let fails = move |_: &_| {
                if panics { panic!("a test's") } else { Err(io::ErrorKind::NotConnected.into()) }
            };
            monitor.attend("a test", fails, Arc::new(|| {})).expect("a thread");
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
            while monitor.is_whole() {
                assert!(std::time::Instant::now() < deadline, "its end was not seen");
                thread::yield_now();
            }
        }
    }

    #[test]
    fn what_has_collected_is_heard_at_once() {
        in_namespace(|| {
            let mut socket = Socket::new(NETLINK_ROUTE).expect("a socket");
            socket.bind(&SocketAddr::new(0, 0)).expect("bound");
            socket.add_membership(GROUPS[0]).expect("a member");
            receive_timeout(&socket, 30).expect("a timeout");
            let (mut inbox, mut heard) = (Inbox::of("a test"), 0);
            (0..5).for_each(|i| ip(&format!("link add br{i} type bridge")));
            let matters = |_: &_| {
                heard += 1;
                heard == 2
            };
            let news = news(&socket, &mut inbox, &AtomicU64::default(), matters);
            assert!(news.expect("announcements"), "one of them matters");
            assert!((5..=BURST).contains(&heard), "{heard}");
        });
    }

    #[test]
    fn foreign_neighbours_do_not_wake() {
        let of_seven = Neighbours::decode(Neighbours::Of(7).encode());
        assert!(!matters(&message(RTM_NEWNEIGH, 4), of_seven));
        assert!(matters(&message(RTM_NEWNEIGH, 7), of_seven));
        assert!(matters(&message(RTM_NEWNEIGH, 4), Neighbours::decode(Neighbours::All.encode())));
        assert!(!matters(&message(RTM_NEWNEIGH, 4), Neighbours::decode(Neighbours::None.encode())));
        assert!(matters(&message(16, 4), of_seven), "a link matters whatever its index");
        let two = [message(RTM_DELNEIGH, 4), message(24, 1)].concat();
        assert!(matters(&two, of_seven), "the second message counts");
    }
}
