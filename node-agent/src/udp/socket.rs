//! The one socket of the udp backend: peers send to it, and what goes to them leaves from it, as flanneld's does.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Type};

use super::offload::{Offload, Offloads, Outcome, Outcomes};

/// Asked for; the kernel takes twice as much, for its own bookkeeping. At 10 Gb/s a thread that had to wait for one
/// time slice of 4 ms finds 5 MB of datagrams, and the default of 208 KiB holds 90 of full size. It also lets a whole
/// batch of super-packets be sent at once.
const BUFFER: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct Socket {
    socket: UdpSocket,
    outcomes: Outcomes,
}

impl Socket {
    /// Binds in the network namespace of the calling thread, and finds out what the kernel can do for it.
    pub(super) fn open(listen: SocketAddrV4, offloads: &Offloads) -> io::Result<Self> {
        let socket = UdpSocket::bind(listen)?;
        // Without CAP_NET_ADMIN the system's limit bounds it, and a smaller buffer only drops sooner.
        if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &BUFFER);
        }
        if setsockopt(&socket, sockopt::SndBufForce, &BUFFER).is_err() {
            let _ = setsockopt(&socket, sockopt::SndBuf, &BUFFER);
        }
        setsockopt(&socket, sockopt::RxqOvfl, &1)?;
        let mut outcomes = Outcomes::new();
        let gro = || setsockopt(&socket, sockopt::UdpGroSegment, &true);
        outcomes.insert(Offload::UdpGro, Outcome::of(offloads.allows(Offload::UdpGro), "UDP_GRO", gro));
        // Zero is what it is anyway: this asks whether the kernel knows the option, as sends name the size.
        let segment = || setsockopt(&socket, sockopt::UdpGsoSegment, &0);
        outcomes.insert(
            Offload::UdpSegment,
            Outcome::of(offloads.allows(Offload::UdpSegment), "UDP_SEGMENT", segment),
        );
        Ok(Self { socket, outcomes })
    }

    pub(super) fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends whole IPv4 packets as this host's own: ICMP errors. Written to the device they would be dropped on arrival, for
/// their source is an address of this host (linux net/ipv4/fib_frontend.c, `fib_validate_source`; flanneld's are).
#[derive(Debug)]
pub(super) struct HostSocket(socket2::Socket);

/// linux/in.h, `IPPROTO_RAW`: packets bring their headers, and nothing is ever received.
const RAW: i32 = 255;

impl HostSocket {
    /// In the network namespace of the calling thread; needs CAP_NET_RAW, without which everything else is forwarded.
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket2::Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)))?;
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    pub(super) fn send(&self, packet: &[u8], to: Ipv4Addr) -> io::Result<()> {
        self.0.send_to(packet, &SockAddr::from(SocketAddrV4::new(to, 0))).map(drop)
    }
}
