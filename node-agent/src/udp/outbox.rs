//! Datagrams gathered and sent by `sendmmsg`, runs of them as one `UDP_SEGMENT` message (linux net/ipv4/udp.c).
//!
//! Nothing is copied on the way: a datagram is a header written into an arena of the outbox, and a slice of whatever
//! was read. One message is one walk through the kernel's stack, whether it stands for one datagram or for 44.
#![expect(unsafe_code, reason = "sendmmsg with one control message per message has no safe wrapper")]

use std::marker::PhantomData;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;

/// Messages in one `sendmmsg`; without `UDP_SEGMENT` as many datagrams.
const MESSAGES: usize = 256;
/// Two per datagram: three super-packets' worth.
const PARTS: usize = 512;
const HEADER_BYTES: usize = 32 << 10;
/// The most that fits an IPv4 datagram, for all segments of a message together.
const MAX_MESSAGE: usize = 65535 - 20 - 8;
/// `UDP_MAX_SEGMENTS` of linux/udp.h before Linux 6.9; 128 since.
const MAX_SEGMENTS: u16 = 64;

/// `CMSG_SPACE` of one `u16`.
const CONTROL_SPACE: usize = 24;

/// All memory is taken at the start.
pub(super) struct Outbox {
    parts: Vec<libc::iovec>,
    messages: Vec<Message>,
    header_bytes: NonNull<[u8]>,
    headers_used: usize,
    names: Vec<libc::sockaddr_in>,
    controls: Vec<Control>,
    raw: Vec<libc::mmsghdr>,
}

// SAFETY: the outbox owns what `header_bytes` leads to; all other pointers are followed within a `Batch` alone, which
// begins and ends with none.
unsafe impl Send for Outbox {}

/// Datagrams on their way out; none outlives what it borrows.
pub(super) struct Batch<'o, 'p> {
    outbox: &'o mut Outbox,
    /// The parts point into slices that live that long.
    payloads: PhantomData<&'p [u8]>,
}

/// Datagrams to one destination, all of one size but the last, which may be shorter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message {
    pub(super) to: SocketAddrV4,
    first_part: usize,
    parts: usize,
    size: usize,
    pub(super) segments: u16,
    pub(super) bytes: usize,
    /// Nothing may be added: the last one is shorter, or runs are not wanted.
    closed: bool,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_SPACE]);

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            parts: Vec::with_capacity(PARTS),
            messages: Vec::with_capacity(MESSAGES),
            header_bytes: NonNull::from(Box::leak(vec![0; HEADER_BYTES].into_boxed_slice())),
            headers_used: 0,
            names: Vec::with_capacity(MESSAGES),
            controls: Vec::with_capacity(MESSAGES),
            raw: Vec::with_capacity(MESSAGES),
        }
    }

    pub(super) fn begin<'p>(&mut self) -> Batch<'_, 'p> {
        let mut batch = Batch { outbox: self, payloads: PhantomData };
        batch.clear();
        batch
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // SAFETY: it came out of a box in `new`, and nothing refers to it any more.
        unsafe { drop(Box::from_raw(self.header_bytes.as_ptr())) };
    }
}

impl<'p> Batch<'_, 'p> {
    /// Whether one more datagram, with up to `headers` bytes of its own, fits.
    pub(super) fn has_room(&self, headers: usize) -> bool {
        self.outbox.parts.len() + 2 <= PARTS
            && self.outbox.messages.len() < MESSAGES
            && self.outbox.headers_used + headers <= HEADER_BYTES
    }

    /// Where the next datagram's header is written, before [`Self::push`].
    pub(super) fn headers(&mut self) -> &mut [u8] {
        let used = self.outbox.headers_used;
        // SAFETY: `used` is at most HEADER_BYTES, the allocation's length; what lies in front of it is what parts point
        // to, and no reference to what lies behind it exists but this one.
        unsafe {
            let free = self.outbox.header_bytes.as_ptr().cast::<u8>().add(used);
            std::slice::from_raw_parts_mut(free, HEADER_BYTES - used)
        }
    }

    /// A datagram of the first `headers` bytes of [`Self::headers`] and `payload`; `runs`: it may join the datagram
    /// before it.
    pub(super) fn push(&mut self, to: SocketAddrV4, headers: usize, payload: &'p [u8], runs: bool) {
        let first_part = self.outbox.parts.len();
        if headers > 0 {
            let header = std::ptr::from_mut(&mut self.headers()[..headers]);
            self.outbox.parts.push(part(header));
            self.outbox.headers_used += headers;
        }
        if !payload.is_empty() {
            self.outbox.parts.push(part(std::ptr::from_ref(payload).cast_mut()));
        }
        let parts = self.outbox.parts.len() - first_part;
        let size = headers + payload.len();
        if let Some(last) = self.outbox.messages.last_mut().filter(|last| runs && last.takes(to, size)) {
            last.parts += parts;
            last.segments += 1;
            last.bytes += size;
            last.closed = size < last.size;
            return;
        }
        self.outbox.messages.push(Message {
            to,
            first_part,
            parts,
            size,
            segments: 1,
            bytes: size,
            closed: !runs,
        });
    }

    pub(super) fn messages(&self) -> &[Message] {
        &self.outbox.messages
    }

    pub(super) fn clear(&mut self) {
        self.outbox.parts.clear();
        self.outbox.messages.clear();
        self.outbox.headers_used = 0;
    }

    /// Sends messages from `from` on, each as it is; says how many the kernel took, or why it did not take the first.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, from: usize) -> Result<usize, Errno> {
        let Outbox { parts, messages, names, controls, raw, .. } = &mut *self.outbox;
        names.clear();
        controls.clear();
        raw.clear();
        for message in messages.iter().skip(from) {
            names.push(name(message.to));
            controls.push(Control::segment_size(message.size as u16));
        }
        for ((message, name), control) in
            messages.iter().skip(from).zip(names.iter_mut()).zip(controls.iter_mut())
        {
            let parts = &mut parts[message.first_part..message.first_part + message.parts];
            raw.push(header(name, parts, (message.segments > 1).then_some(control)));
        }
        transmit(socket, raw)
    }

    /// Sends the datagrams of one message from `from` on the plain way, each by itself.
    pub(super) fn send_plainly(
        &mut self,
        socket: BorrowedFd<'_>,
        message: usize,
        from: usize,
    ) -> Result<usize, Errno> {
        let Outbox { parts, messages, names, raw, .. } = &mut *self.outbox;
        let message = messages[message];
        names.clear();
        raw.clear();
        names.push(name(message.to));
        let parts = &mut parts[message.first_part..message.first_part + message.parts];
        for datagram in datagrams(parts, message.size).skip(from) {
            raw.push(header(&mut names[0], datagram, None));
        }
        transmit(socket, raw)
    }
}

impl Message {
    fn takes(&self, to: SocketAddrV4, size: usize) -> bool {
        !self.closed
            && self.to == to
            && size <= self.size
            && self.segments < MAX_SEGMENTS
            && self.bytes + size <= MAX_MESSAGE
    }

    /// How many bytes the datagram of that index has.
    pub(super) fn datagram_len(&self, index: usize) -> usize {
        self.size.min(self.bytes - index * self.size)
    }
}

impl Control {
    fn segment_size(size: u16) -> Self {
        let mut control = Self([0; CONTROL_SPACE]);
        // struct cmsghdr of bits/socket.h: its length as a size_t, level, type; the rest is data.
        // SAFETY: CMSG_LEN computes.
        let len = unsafe { libc::CMSG_LEN(size_of::<u16>() as u32) } as usize;
        control.0[..size_of::<usize>()].copy_from_slice(&len.to_ne_bytes());
        control.0[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
        control.0[12..16].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
        control.0[16..18].copy_from_slice(&size.to_ne_bytes());
        control
    }
}

// `Control` writes the header by hand, as 64-bit machines have it.
const _: () = assert!(size_of::<libc::cmsghdr>() == 16);

fn part(bytes: *mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.cast(), iov_len: bytes.len() }
}

fn name(to: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: to.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*to.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

fn header(
    name: &mut libc::sockaddr_in,
    parts: &mut [libc::iovec],
    control: Option<&mut Control>,
) -> libc::mmsghdr {
    // SAFETY: all bytes zero is a valid `mmsghdr`: null pointers and lengths of zero; musl's has private padding.
    let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
    header.msg_hdr.msg_name = (&raw mut *name).cast();
    header.msg_hdr.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    header.msg_hdr.msg_iov = parts.as_mut_ptr();
    header.msg_hdr.msg_iovlen = parts.len() as _;
    if let Some(control) = control {
        header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
        header.msg_hdr.msg_controllen = CONTROL_SPACE as _;
    }
    header
}

/// Cuts a message's parts where its datagrams end.
fn datagrams(mut parts: &mut [libc::iovec], size: usize) -> impl Iterator<Item = &mut [libc::iovec]> {
    std::iter::from_fn(move || {
        let (mut count, mut bytes) = (0, 0);
        while bytes < size && count < parts.len() {
            bytes += parts[count].iov_len;
            count += 1;
        }
        let (datagram, rest) = std::mem::take(&mut parts).split_at_mut(count);
        parts = rest;
        (!datagram.is_empty()).then_some(datagram)
    })
}

fn transmit(socket: BorrowedFd<'_>, raw: &mut [libc::mmsghdr]) -> Result<usize, Errno> {
    // SAFETY: every pointer in `raw` was set just now: names, controls and parts are the outbox's and nothing has
    // touched them since; parts lead to its headers and to payloads that the batch borrows. The kernel writes to
    // `msg_len` alone.
    //
    // The system call itself: musl's sendmmsg makes a sendmsg of each message, because its fields are narrower than the
    // kernel's with padding behind them; here the padding is zero.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_sendmmsg,
            socket.as_raw_fd(),
            raw.as_mut_ptr(),
            raw.len() as libc::c_uint,
            libc::MSG_DONTWAIT,
        )
    };
    Errno::result(sent).map(|sent| sent.unsigned_abs() as usize)
}
