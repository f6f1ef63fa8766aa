//! Datagrams gathered and sent by `sendmmsg`, those of one size to one peer as one `UDP_SEGMENT` message (linux
//! net/ipv4/udp.c).
//!
//! Nothing is copied on the way: a datagram is a header written into an arena of the outbox, and a slice of whatever
//! was read. One message is one walk through the kernel's stack, whether it stands for one datagram or for 64: so
//! datagrams of many flows share messages, found by one probe of a small table. Order within a flow is kept: a datagram
//! joins no message that is sent before the one that has its flow's latest.
#![expect(unsafe_code, reason = "sendmmsg with one control message per message has no safe wrapper")]

use std::marker::PhantomData;
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, SockaddrIn, sendto};

use super::offload::UDP_MAX_SEGMENTS;
use super::packet::MAX_DATAGRAM;

/// In one `sendmmsg`: seven super-packets' worth.
const DATAGRAMS: usize = 320;
const HEADER_BYTES: usize = 32 << 10;
/// Messages that others may join, by destination and size; one that loses its slot is joined no more.
const OPEN: usize = 64;
/// Flows that meet in a slot only have messages of their own more often.
const FLOWS: usize = 256;
/// Ends a list; no message.
const NONE: u32 = u32::MAX;

/// `CMSG_SPACE` of one `u16`.
const CONTROL_SPACE: usize = 24;

/// All memory is taken at the start.
pub(super) struct Outbox {
    datagrams: Vec<Datagram>,
    messages: Vec<Message>,
    header_bytes: NonNull<[u8]>,
    headers_used: usize,
    /// The latest message of a destination and size, and what they are is in the message.
    open: [u32; OPEN],
    /// The latest message with a datagram of the flow: none before it may be joined.
    flows: [u32; FLOWS],
    /// No message before this one may be joined by anybody.
    floor: u32,
    parts: Vec<libc::iovec>,
    names: Vec<libc::sockaddr_in>,
    controls: Vec<Control>,
    raw: Vec<libc::mmsghdr>,
    /// `raw` has a header for each message of the batch as it is.
    is_ready: bool,
}

/// What keeps its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    /// By a hash that is the same for all packets of a flow.
    Of(u32),
    /// It may belong to any: sent behind all that came before, in front of all that come after.
    Any,
}

/// How a datagram may be sent together with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    Alone,
    /// With those of its size.
    SameSize,
    /// Also as the shorter last one of the message that has its flow's latest.
    Tail,
}

/// A header of its own, if any, and a payload.
#[derive(Debug, Clone, Copy)]
struct Datagram {
    header: libc::iovec,
    payload: libc::iovec,
    /// In the same message.
    next: u32,
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
    to: SocketAddrV4,
    first: u32,
    last: u32,
    size: usize,
    parts: usize,
    pub(super) segments: u16,
    pub(super) bytes: usize,
    /// Nothing may be added: the last one is shorter, or it is to go alone.
    closed: bool,
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL_SPACE]);

impl Outbox {
    pub(super) fn new() -> Self {
        Self {
            datagrams: Vec::with_capacity(DATAGRAMS),
            messages: Vec::with_capacity(DATAGRAMS),
            header_bytes: NonNull::from(Box::leak(vec![0; HEADER_BYTES].into_boxed_slice())),
            headers_used: 0,
            open: [NONE; OPEN],
            flows: [0; FLOWS],
            floor: 0,
            parts: Vec::with_capacity(2 * DATAGRAMS),
            names: Vec::with_capacity(DATAGRAMS),
            controls: Vec::with_capacity(DATAGRAMS),
            raw: Vec::with_capacity(DATAGRAMS),
            is_ready: false,
        }
    }

    pub(super) fn begin<'p>(&mut self) -> Batch<'_, 'p> {
        let mut batch = Batch { outbox: self, payloads: PhantomData };
        if !batch.messages().is_empty() {
            batch.clear();
        }
        batch
    }

    /// Once for a batch, however often what the kernel does not take divides it.
    fn make_headers(&mut self) {
        let Self { datagrams, messages, parts, names, controls, raw, .. } = self;
        parts.clear();
        names.clear();
        controls.clear();
        raw.clear();
        // All of them first: headers point to parts, names and controls, which must not move any more.
        for message in messages.iter() {
            names.push(name(message.to));
            controls.push(Control::segment_size(message.size as u16));
            parts.extend(list(datagrams, message.first).flat_map(Datagram::parts));
        }
        let mut rest = &mut parts[..];
        for ((message, name), control) in messages.iter().zip(names.iter_mut()).zip(controls.iter_mut()) {
            let mine = rest.split_off_mut(..message.parts).unwrap_or_default();
            raw.push(header(name, mine, (message.segments > 1).then_some(control)));
        }
        self.is_ready = true;
    }

    /// The message that the datagram may join.
    fn joined(&self, to: SocketAddrV4, size: usize, flow: Flow, join: Join) -> Option<u32> {
        let Flow::Of(flow) = flow else { return None };
        let latest = self.flows[flow as usize % FLOWS];
        let takes = |index: u32, tail: bool| {
            let message = self.messages.get(index as usize)?;
            let fits = size == message.size || tail && size < message.size;
            (fits && index >= latest && index >= self.floor && message.takes(to, size)).then_some(index)
        };
        match join {
            Join::Alone => None,
            Join::SameSize => takes(self.open[slot(to, size)], false),
            Join::Tail => takes(latest, true).or_else(|| takes(self.open[slot(to, size)], false)),
        }
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
        self.outbox.datagrams.len() < DATAGRAMS && self.outbox.headers_used + headers <= HEADER_BYTES
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

    /// A datagram of the first `headers` bytes of [`Self::headers`] and `payload`.
    pub(super) fn push(
        &mut self,
        to: SocketAddrV4,
        headers: usize,
        payload: &'p [u8],
        flow: Flow,
        join: Join,
    ) {
        let header = part(std::ptr::from_mut(&mut self.headers()[..headers]));
        let outbox = &mut *self.outbox;
        outbox.is_ready = false;
        outbox.headers_used += headers;
        let index = outbox.datagrams.len() as u32;
        let payload = part(std::ptr::from_ref(payload).cast_mut());
        let datagram = Datagram { header, payload, next: NONE };
        let parts = datagram.parts().count();
        outbox.datagrams.push(datagram);
        let size = headers + payload.iov_len;
        let message = match outbox.joined(to, size, flow, join) {
            Some(at) => {
                let message = &mut outbox.messages[at as usize];
                outbox.datagrams[message.last as usize].next = index;
                message.last = index;
                message.parts += parts;
                message.segments += 1;
                message.bytes += size;
                message.closed = size < message.size;
                at
            }
            None => {
                let at = outbox.messages.len() as u32;
                let closed = join == Join::Alone;
                outbox.messages.push(Message {
                    to,
                    first: index,
                    last: index,
                    size,
                    parts,
                    segments: 1,
                    bytes: size,
                    closed,
                });
                outbox.open[slot(to, size)] = at;
                at
            }
        };
        match flow {
            Flow::Of(flow) => outbox.flows[flow as usize % FLOWS] = message,
            Flow::Any => outbox.floor = message,
        }
    }

    pub(super) fn messages(&self) -> &[Message] {
        &self.outbox.messages
    }

    pub(super) fn clear(&mut self) {
        self.outbox.datagrams.clear();
        self.outbox.messages.clear();
        self.outbox.headers_used = 0;
        self.outbox.is_ready = false;
        self.outbox.open.fill(NONE);
        self.outbox.flows.fill(0);
        self.outbox.floor = 0;
    }

    /// Sends messages from `from` on, each as it is; says how many the kernel took, or why it did not take the first.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>, from: usize) -> Result<usize, Errno> {
        if !self.outbox.is_ready {
            self.outbox.make_headers();
        }
        transmit(socket, &mut self.outbox.raw[from..])
    }

    /// Sends the datagrams of one message from `from` on the plain way, each by itself.
    pub(super) fn send_plainly(
        &mut self,
        socket: BorrowedFd<'_>,
        message: usize,
        from: usize,
    ) -> Result<usize, Errno> {
        let Outbox { datagrams, messages, parts, names, raw, is_ready, .. } = &mut *self.outbox;
        *is_ready = false;
        let message = messages[message];
        parts.clear();
        names.clear();
        raw.clear();
        names.push(name(message.to));
        parts.extend(list(datagrams, message.first).flat_map(Datagram::parts));
        let mut rest = &mut parts[..];
        for (index, datagram) in list(datagrams, message.first).enumerate() {
            let mine = rest.split_off_mut(..datagram.parts().count()).unwrap_or_default();
            if index >= from {
                raw.push(header(&mut names[0], mine, None));
            }
        }
        transmit(socket, raw)
    }
}

impl Datagram {
    fn parts(&self) -> impl Iterator<Item = libc::iovec> {
        [self.header, self.payload].into_iter().filter(|part| part.iov_len > 0)
    }
}

impl Message {
    fn takes(&self, to: SocketAddrV4, size: usize) -> bool {
        !self.closed && self.to == to && self.segments < UDP_MAX_SEGMENTS && self.bytes + size <= MAX_DATAGRAM
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

fn slot(to: SocketAddrV4, size: usize) -> usize {
    let mixed = to.ip().to_bits().wrapping_add(size as u32).wrapping_mul(0x9e37_79b1);
    (mixed >> 16) as usize % OPEN
}

fn list(datagrams: &[Datagram], first: u32) -> impl Iterator<Item = &Datagram> {
    std::iter::successors(datagrams.get(first as usize), |datagram| datagrams.get(datagram.next as usize))
}

/// One datagram by itself, without the headers that several need.
pub(super) fn send_one(socket: BorrowedFd<'_>, to: SocketAddrV4, datagram: &[u8]) -> Result<usize, Errno> {
    sendto(socket.as_raw_fd(), datagram, &SockaddrIn::from(to), MsgFlags::MSG_DONTWAIT)
}

fn transmit(socket: BorrowedFd<'_>, raw: &mut [libc::mmsghdr]) -> Result<usize, Errno> {
    // SAFETY: every pointer in `raw` was set since the batch last changed: names, controls and parts are the outbox's and
    // nothing has touched them since; parts lead to its headers and to payloads that the batch borrows. The kernel writes to
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    struct Sent {
        to: u8,
        size: usize,
        flow: Option<u32>,
        join: Join,
    }

    fn sent() -> impl Strategy<Value = Sent> {
        let join = prop_oneof![1 => Just(Join::Alone), 8 => Just(Join::SameSize), 2 => Just(Join::Tail)];
        let flow = prop_oneof![1 => Just(None), 9 => (0..6_u32).prop_map(Some)];
        let size = prop_oneof![Just(100), Just(200), Just(1472), 1..1472_usize];
        (0..3_u8, size, flow, join).prop_map(|(to, size, flow, join)| Sent { to, size, flow, join })
    }

    fn destination(to: u8) -> SocketAddrV4 {
        SocketAddrV4::new([192, 0, 2, to].into(), 8285)
    }

    proptest! {
        #[test]
        fn messages_hold_what_the_kernel_takes_and_every_flow_keeps_its_order(
            all in prop::collection::vec(sent(), 0..DATAGRAMS / 2),
        ) {
            let payload = vec![0; 2000];
            let mut outbox = Outbox::new();
            let mut batch = outbox.begin();
            for sent in &all {
                prop_assert!(batch.has_room(4));
                let headers = 4.min(sent.size);
                let flow = sent.flow.map_or(Flow::Any, Flow::Of);
                batch.push(destination(sent.to), headers, &payload[..sent.size - headers], flow, sent.join);
            }
            let mut seen: BTreeMap<(u8, Option<u32>), u32> = BTreeMap::new();
            let (mut count, mut barrier, mut latest) = (0, 0, 0);
            for message in batch.messages() {
                let mut index = message.first;
                let (mut segments, mut bytes, mut short) = (0, 0, false);
                while index != NONE {
                    let sent = all[index as usize];
                    prop_assert_eq!(message.to, destination(sent.to));
                    prop_assert!(!short, "nothing follows a shorter one");
                    prop_assert!(sent.size <= message.size);
                    short = sent.size < message.size;
                    prop_assert!(sent.join != Join::Alone || message.segments == 1);
                    if sent.flow.is_some() {
                        let before = seen.insert((sent.to, sent.flow), index);
                        prop_assert!(before < Some(index), "{:?} after {:?}", index, before);
                        prop_assert!(index >= barrier, "not in front of what was before a fragment");
                    } else {
                        prop_assert!(index >= latest, "a fragment goes behind all that came before");
                        barrier = index;
                    }
                    latest = latest.max(index);
                    (segments, bytes, count) = (segments + 1, bytes + sent.size, count + 1);
                    index = batch.outbox.datagrams[index as usize].next;
                }
                prop_assert_eq!((message.segments, message.bytes), (segments, bytes));
                prop_assert!(segments <= UDP_MAX_SEGMENTS && bytes <= MAX_DATAGRAM);
                prop_assert!(message.size * usize::from(segments - 1) <= bytes, "all but the last are of one size");
            }
            prop_assert_eq!(count, all.len(), "each is somewhere, once");
        }
    }

    #[test]
    fn flows_of_one_size_share_a_message_and_a_tail_ends_its_own() {
        let payload = [0; 1472];
        let mut outbox = Outbox::new();
        let mut batch = outbox.begin();
        let mut push = |size: usize, flow: u32, join| {
            batch.push(destination(1), 0, &payload[..size], Flow::Of(flow), join);
        };
        for _ in 0..3 {
            for flow in 0..8 {
                push(if flow % 2 == 0 { 100 } else { 700 }, flow, Join::SameSize);
            }
        }
        push(1472, 20, Join::SameSize);
        push(1472, 20, Join::SameSize);
        push(30, 20, Join::Tail);
        push(1472, 21, Join::SameSize);
        let messages: Vec<_> = batch.messages().iter().map(|m| (m.size, m.segments)).collect();
        assert_eq!(messages, [(100, 12), (700, 12), (1472, 3), (1472, 1)]);
    }

    #[test]
    fn a_message_has_no_more_datagrams_and_bytes_than_the_kernel_takes() {
        let payload = [0; 1472];
        let mut outbox = Outbox::new();
        let mut batch = outbox.begin();
        for (size, count) in [(100, 200), (1472, 100)] {
            for _ in 0..count {
                batch.push(destination(1), 0, &payload[..size], Flow::Of(1), Join::SameSize);
            }
        }
        let messages: Vec<_> = batch.messages().iter().map(|m| (m.size, m.segments)).collect();
        let wanted = [(100, 64), (100, 64), (100, 64), (100, 8), (1472, 44), (1472, 44), (1472, 12)];
        assert_eq!(messages, wanted);
    }

    #[test]
    fn datagrams_arrive_as_they_were_gathered_whichever_way_they_are_sent() {
        let receiver = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        let Ok(std::net::SocketAddr::V4(to)) = receiver.local_addr() else { panic!("IPv4") };
        let payloads: Vec<Vec<u8>> = (0..7_u8).map(|n| vec![n; if n == 6 { 50 } else { 100 }]).collect();
        for plainly in [false, true] {
            let mut outbox = Outbox::new();
            let mut batch = outbox.begin();
            for (index, payload) in payloads.iter().enumerate() {
                // With and without a header, in one message.
                let headers = if index % 2 == 0 { 10 } else { 0 };
                batch.headers()[..headers].fill(0xff);
                let join = if index == 6 { Join::Tail } else { Join::SameSize };
                batch.push(to, headers, &payload[headers..], Flow::Of(1), join);
            }
            assert_eq!(batch.messages().len(), 1);
            if plainly {
                assert_eq!(batch.send_plainly(std::os::fd::AsFd::as_fd(&sender), 0, 2), Ok(5));
            } else {
                assert_eq!(batch.send(std::os::fd::AsFd::as_fd(&sender), 0), Ok(1));
            }
            for (index, payload) in payloads.iter().enumerate().skip(if plainly { 2 } else { 0 }) {
                let mut buffer = [0; 200];
                let len = receiver.recv(&mut buffer).expect("received");
                let mut wanted = payload.clone();
                wanted[..if index % 2 == 0 { 10 } else { 0 }].fill(0xff);
                assert_eq!(buffer[..len], wanted, "{index}");
            }
        }
    }

    #[test]
    fn what_comes_behind_a_message_sent_plainly_is_sent_once_and_as_it_is() {
        let receiver = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        let sender = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
        let Ok(std::net::SocketAddr::V4(to)) = receiver.local_addr() else { panic!("IPv4") };
        let payload = [7; 300];
        let mut outbox = Outbox::new();
        let mut batch = outbox.begin();
        for size in [100, 100, 200, 300] {
            batch.push(to, 0, &payload[..size], Flow::Of(1), Join::SameSize);
        }
        let socket = std::os::fd::AsFd::as_fd(&sender);
        assert_eq!(batch.send(socket, 0), Ok(3));
        assert_eq!(batch.send_plainly(socket, 0, 0), Ok(2));
        assert_eq!(batch.send(socket, 1), Ok(2));
        assert_eq!(batch.send(socket, 2), Ok(1), "again from the middle");
        let sizes: Vec<_> = (0..9).map(|_| receiver.recv(&mut [0; 400]).expect("received")).collect();
        assert_eq!(sizes, [100, 100, 200, 300, 100, 100, 200, 300, 300]);
    }
}
