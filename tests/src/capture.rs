//! A capture in a namespace by packet socket (packet(7)): every frame that comes in by one interface.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, Socket, Type};
use std::os::fd::AsRawFd;

use crate::netns::Netns;
use crate::wait::eventually;

/// `ETH_P_ALL`, in network byte order as packet sockets want it.
const ETH_P_ALL: i32 = (0x0003_u16).to_be() as i32;
/// `PACKET_OUTGOING` of linux/if_packet.h: the same frame, leaving by another port.
const PACKET_OUTGOING: u8 = 4;
const SNAPLEN: usize = 65_536;
const RECEIVE_BUFFER: usize = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The interface it came in by.
    pub ifindex: usize,
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
pub struct Capture {
    frames: Arc<Mutex<Vec<Frame>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    /// Captures what enters `netns` by any interface, from now on.
    pub fn start(netns: &Netns) -> Result<Self> {
        let socket = netns.enter(|| {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ETH_P_ALL)))
                .context("packet socket")?;
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            Ok(socket)
        })?;
        let frames = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn({
            let (frames, stop) = (Arc::clone(&frames), Arc::clone(&stop));
            move || read(&socket, &frames, &stop)
        });
        Ok(Self { frames, stop, reader: Some(reader) })
    }

    /// What has been captured so far.
    pub fn frames(&self) -> Vec<Frame> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the first frame that `matches` makes something of.
    pub fn wait_for<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut matches: impl FnMut(&Frame) -> Option<T>,
    ) -> Result<T> {
        let mut found = None;
        eventually(&format!("a captured frame: {what}"), deadline, || {
            found = self.frames().iter().find_map(&mut matches);
            Ok(found.is_some())
        })?;
        found.context("a frame was just found")
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read(socket: &Socket, frames: &Mutex<Vec<Frame>>, stop: &AtomicBool) {
    let mut buffer = vec![0; SNAPLEN];
    while !stop.load(Ordering::Relaxed) {
        // An error is the read timeout, there to look at `stop`.
        let Ok((len, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else { continue };
        if from.pkttype() != PACKET_OUTGOING {
            let frame = Frame { ifindex: from.ifindex(), bytes: buffer[..len].to_vec() };
            frames.lock().unwrap_or_else(PoisonError::into_inner).push(frame);
        }
    }
}

/// The index of an interface of `netns`.
pub fn ifindex(netns: &Netns, name: &str) -> Result<usize> {
    let links: serde_json::Value = serde_json::from_str(&netns.ip(&format!("-json link show {name}"))?)?;
    let index = links[0]["ifindex"].as_u64().with_context(|| format!("no ifindex of {name}"))?;
    Ok(index as usize)
}
