//! Datagrams received by `recvmmsg`, with `UDP_GRO` several to a message (linux net/ipv4/udp.c, udp_offload.c).
#![expect(unsafe_code, reason = "recvmmsg into buffers that stay has no safe wrapper")]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;

/// The most messages in one `recvmmsg`.
const MESSAGES: usize = 64;
/// The largest datagram, and the largest that `UDP_GRO` makes of several.
const BUFFER: usize = 1 << 16;
/// Buffers are as far apart, so that their beginnings do not compete for the same cache lines.
const STRIDE: usize = BUFFER + 34 * 64;
/// So many bytes at a time still lie in the second cache of the processors measured when they are checked and written:
/// super-packets that have left it cost a twentieth of the throughput, and more (measured).
const WARM: usize = 512 << 10;
/// `CMSG_SPACE` of two 32-bit numbers: the segment size and the overruns.
const CONTROL_SPACE: usize = 48;

/// All memory is taken at the start; most of it is touched only when datagrams fill it.
pub(super) struct Inbox {
    /// [`MESSAGES`] buffers, [`STRIDE`] apart.
    arena: NonNull<[u8]>,
    slots: NonNull<[Slot]>,
    headers: Vec<libc::mmsghdr>,
    /// How many messages the last receive gave: their headers are to be made anew.
    used: usize,
    /// How many messages the next receive may give.
    most: usize,
}

/// What the kernel writes of one message beside its bytes.
struct Slot {
    name: libc::sockaddr_in,
    part: libc::iovec,
    control: Control,
}

#[repr(C, align(8))]
struct Control([u8; CONTROL_SPACE]);

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) from: SocketAddrV4,
    /// Where its bytes are in [`Inbox::arena`].
    pub(super) at: Range<usize>,
    /// Bytes of each datagram in it but the last, which may be shorter.
    pub(super) size: usize,
    /// It did not fit its buffer; what is there is not all.
    pub(super) truncated: bool,
    /// The socket's count of datagrams dropped until this one came; `None` while there were none.
    pub(super) overruns: Option<u32>,
}

// SAFETY: the inbox owns what its pointers lead to.
unsafe impl Send for Inbox {}

impl Inbox {
    pub(super) fn new() -> Self {
        let arena = vec![0_u8; MESSAGES * STRIDE].into_boxed_slice();
        let slots: Box<[Slot]> = (0..MESSAGES).map(|_| Slot::empty()).collect();
        let mut inbox = Self {
            arena: NonNull::from(Box::leak(arena)),
            slots: NonNull::from(Box::leak(slots)),
            headers: Vec::with_capacity(MESSAGES),
            used: 0,
            most: MESSAGES,
        };
        for index in 0..MESSAGES {
            let header = inbox.header(index);
            inbox.headers.push(header);
        }
        inbox
    }

    /// Waits for a message, receives what is there, up to [`MESSAGES`], and says how many.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> Result<usize, Errno> {
        for index in 0..self.used {
            self.headers[index] = self.header(index);
        }
        self.used = 0;
        // SAFETY: each header leads to a slot and a buffer of our own, with their true lengths, that nobody holds a
        // reference to: those that `arena` and `message` give out end before `&mut self` begins.
        //
        // The system call itself, as for sending: musl's function touches every header first.
        let received = unsafe {
            libc::syscall(
                libc::SYS_recvmmsg,
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.most as libc::c_uint,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut::<libc::timespec>(),
            )
        };
        self.used = Errno::result(received)?.unsigned_abs() as usize;
        self.most = most(self.headers[..self.used].iter().map(|header| header.msg_len as usize));
        Ok(self.used)
    }

    /// All buffers; what [`Message::at`] points into.
    pub(super) fn arena(&self) -> &[u8] {
        // SAFETY: the memory is the inbox's own and initialized; the kernel writes to it under `&mut self` only.
        unsafe { self.arena.as_ref() }
    }

    /// One of the messages that the last [`Self::receive`] gave.
    pub(super) fn message(&self, index: usize) -> Message {
        assert!(index < self.used, "message {index} of {}", self.used);
        let header = &self.headers[index];
        // SAFETY: `index` is inside; the kernel writes to slots under `&mut self` only.
        let slot = unsafe { &self.slots.as_ref()[index] };
        let len = (header.msg_len as usize).min(BUFFER);
        let start = index * STRIDE;
        let mut message = Message {
            from: SocketAddrV4::new(
                Ipv4Addr::from(u32::from_be(slot.name.sin_addr.s_addr)),
                u16::from_be(slot.name.sin_port),
            ),
            at: start..start + len,
            size: len,
            truncated: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            overruns: None,
        };
        let control = &slot.control.0[..(header.msg_hdr.msg_controllen as usize).min(CONTROL_SPACE)];
        for (level, kind, value) in numbers(control) {
            match (level, kind) {
                // Zero would be no size at all.
                (libc::SOL_UDP, libc::UDP_GRO) if value != 0 => message.size = value as usize,
                (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => message.overruns = Some(value),
                _ => {}
            }
        }
        message
    }

    /// A header that offers slot and buffer of that index to the kernel.
    fn header(&self, index: usize) -> libc::mmsghdr {
        assert!(index < MESSAGES, "buffer {index}");
        // SAFETY: `index` is inside both allocations, which live as long as the inbox; no reference to a slot exists
        // while this one is used.
        unsafe {
            let slot = self.slots.as_ptr().cast::<Slot>().add(index);
            (*slot).part = libc::iovec {
                iov_base: self.arena.as_ptr().cast::<u8>().add(index * STRIDE).cast(),
                iov_len: BUFFER,
            };
            // All bytes zero is a valid `mmsghdr`: null pointers and lengths of zero; musl's has private padding.
            let mut header: libc::mmsghdr = std::mem::zeroed();
            header.msg_hdr.msg_name = (&raw mut (*slot).name).cast();
            header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            header.msg_hdr.msg_iov = &raw mut (*slot).part;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = (&raw mut (*slot).control).cast();
            header.msg_hdr.msg_controllen = CONTROL_SPACE as _;
            header
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // SAFETY: both came out of boxes in `new`, and nothing refers to them any more.
        unsafe {
            drop(Box::from_raw(self.arena.as_ptr()));
            drop(Box::from_raw(self.slots.as_ptr()));
        }
    }
}

/// How many messages may be received at a time, when the next ones are as long as these.
fn most(lengths: impl ExactSizeIterator<Item = usize>) -> usize {
    let count = lengths.len();
    let bytes: usize = lengths.sum();
    (WARM * count).checked_div(bytes).map_or(MESSAGES, |most| most.clamp(1, MESSAGES))
}

impl Slot {
    fn empty() -> Self {
        Self {
            name: libc::sockaddr_in {
                sin_family: 0,
                sin_port: 0,
                sin_addr: libc::in_addr { s_addr: 0 },
                sin_zero: [0; 8],
            },
            part: libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 },
            control: Control([0; CONTROL_SPACE]),
        }
    }
}

/// The control messages that hold a 32-bit number (cmsg(3)): level, type and the number.
fn numbers(mut control: &[u8]) -> impl Iterator<Item = (libc::c_int, libc::c_int, u32)> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    const ALIGN: usize = size_of::<usize>();
    std::iter::from_fn(move || {
        let (len, rest) = control.split_first_chunk::<{ size_of::<usize>() }>()?;
        let len = usize::from_ne_bytes(*len);
        let (level, rest) = rest.split_first_chunk::<4>()?;
        let (kind, rest) = rest.split_first_chunk::<4>()?;
        let value = rest.first_chunk::<4>().filter(|_| len >= HEADER + 4)?;
        control = control.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((i32::from_ne_bytes(*level), i32::from_ne_bytes(*kind), u32::from_ne_bytes(*value)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_is_received_at_a_time_as_stays_warm() {
        let of = |lengths: &[usize]| most(lengths.iter().copied());
        assert_eq!(of(&[65_507; 20]), 8);
        assert_eq!(of(&[1472; 64]), 64, "datagrams: all that there is room for");
        assert_eq!(of(&[65_507, 60]), 15, "half of each");
        assert_eq!(of(&[0]), 64);
        assert_eq!(of(&[]), 64);
    }
}
