//! A blocking rtnetlink socket: many messages in one system call, each answer matched to its question.
//!
//! What the kernel does not promise and this module takes care of (net/netlink/af_netlink.c): a dump that raced with a
//! change carries `NLM_F_DUMP_INTR` and is repeated; a message that fails answers even without `NLM_F_ACK`, so answers
//! are matched by sequence number and never counted; a lost answer (`ENOBUFS`) fails its batch instead of waiting.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_ECHO, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::inbox::{self, Inbox};
use super::{Errno, KernelError};

/// Messages in one `send`: their answers must fit the receive buffer.
const BATCH: usize = 256;
const RECEIVE_BUFFER: u32 = 4 << 20;
const DUMP_TRIES: u32 = 10;
/// Of a thread that makes one system call.
const SENDER_STACK: usize = 64 << 10;
const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

pub(super) struct RouteSocket {
    /// Shared with a thread that is still in a `send` whose answer is here already.
    socket: Arc<Socket>,
    inbox: Inbox,
    sequence: u32,
    /// Dumps that were thrown away because the kernel changed meanwhile.
    pub(super) repeated_dumps: u64,
}

/// A request and its flags beyond `NLM_F_REQUEST | NLM_F_ACK`.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) message: RouteNetlinkMessage,
    pub(super) flags: u16,
}

impl std::fmt::Debug for RouteSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RouteSocket").field("sequence", &self.sequence).finish()
    }
}

impl RouteSocket {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, KernelError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Without strict checking the kernel ignores a dump's filter; older kernels do not know the option.
        let _ = socket.set_netlink_get_strict_chk(true);
        let _ = socket.set_rx_buf_sz(RECEIVE_BUFFER);
        inbox::answer_timeout(&socket)?;
        Ok(Self { socket: Arc::new(socket), inbox: Inbox::of("the kernel"), sequence: 0, repeated_dumps: 0 })
    }

    /// Deletes a link and returns as soon as nothing can find it or send by it any more.
    ///
    /// `send` itself returns some 20 ms later: it waits for an RCU barrier before the kernel frees what it has taken apart
    /// (net/core/dev.c `netdev_run_todo`). That is behind the announcement of the deletion, which `NLM_F_ECHO` asks for
    /// (Linux 6.2; an older kernel answers at the end alone), and nothing depends on this process any more: it may die. So
    /// a thread waits that nobody waits for.
    pub(super) fn unregister(&mut self, link: LinkMessage) -> Result<(), KernelError> {
        let (sequence, buffer) =
            self.written(&[(RouteNetlinkMessage::DelLink(link), NLM_F_REQUEST | NLM_F_ACK | NLM_F_ECHO)]);
        let (socket, buffer) = (self.socket.clone(), Arc::new(buffer));
        let theirs = buffer.clone();
        let sent =
            thread::Builder::new().name("unregister".into()).stack_size(SENDER_STACK).spawn(move || {
                // Out of memory, at worst; who waits for the answer says that there was none.
                let _ = socket.send(&theirs, 0);
            });
        if sent.is_err() {
            self.socket.send(&buffer, 0)?;
        }
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(_)) => return Ok(()),
                    NetlinkPayload::Error(error) => return errno(error.code.map_or(0, |c| c.get())),
                    _ => {}
                }
            }
        }
    }

    /// Sends every request, in as few system calls as possible; one result for each, in order.
    pub(super) fn batch(&mut self, requests: &[Request]) -> Vec<Result<(), KernelError>> {
        requests.chunks(BATCH).flat_map(|chunk| self.chunk(chunk)).collect()
    }

    /// Sends one request.
    pub(super) fn request(&mut self, request: Request) -> Result<(), KernelError> {
        self.batch(&[request]).pop().unwrap_or(Ok(()))
    }

    /// Asks for one object. `ENODEV` and the like come back as [`KernelError::Refused`].
    pub(super) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Option<RouteNetlinkMessage>, KernelError> {
        let sequence = self.send(&[(message, NLM_F_REQUEST | NLM_F_ACK)])?;
        let mut answer = None;
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => answer = Some(inner),
                    NetlinkPayload::Error(error) => {
                        return errno(error.code.map_or(0, |c| c.get())).map(|()| answer);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Asks for many objects in as few system calls as possible; one answer for each, in order.
    pub(super) fn get_all(
        &mut self,
        messages: Vec<RouteNetlinkMessage>,
    ) -> Result<Vec<Result<Option<RouteNetlinkMessage>, KernelError>>, KernelError> {
        let mut all = Vec::with_capacity(messages.len());
        let mut messages =
            messages.into_iter().map(|message| (message, NLM_F_REQUEST | NLM_F_ACK)).peekable();
        while messages.peek().is_some() {
            let chunk: Vec<_> = messages.by_ref().take(BATCH).collect();
            let first = self.send(&chunk)?;
            let mut objects = BTreeMap::new();
            let mut answers = BTreeMap::new();
            while answers.len() < chunk.len() {
                for message in self.receive()? {
                    let place = message.header.sequence_number.wrapping_sub(first) as usize;
                    match message.payload {
                        _ if place >= chunk.len() => {}
                        NetlinkPayload::InnerMessage(inner) => {
                            objects.insert(place, inner);
                        }
                        NetlinkPayload::Error(error) => {
                            answers.insert(place, errno(error.code.map_or(0, |c| c.get())));
                        }
                        _ => {}
                    }
                }
            }
            all.extend(answers.into_iter().map(|(place, answer)| answer.map(|()| objects.remove(&place))));
        }
        Ok(all)
    }

    /// Lists everything that `message` asks for, consistently.
    pub(super) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        for _ in 0..DUMP_TRIES {
            if let Some(list) = self.dump_once(message.clone())? {
                return Ok(list);
            }
            self.repeated_dumps += 1;
        }
        Err(KernelError::Interrupted(DUMP_TRIES))
    }

    /// The same as it comes, each message without its header: where there are kinds that the library cannot read.
    pub(super) fn dump_bytes(&mut self, message: &RouteNetlinkMessage) -> Result<Vec<Vec<u8>>, KernelError> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(&[(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)])?;
            if let Some(list) = self.bytes_of(sequence)? {
                return Ok(list);
            }
            self.repeated_dumps += 1;
        }
        Err(KernelError::Interrupted(DUMP_TRIES))
    }

    fn bytes_of(&mut self, sequence: u32) -> Result<Option<Vec<Vec<u8>>>, KernelError> {
        let (mut list, mut interrupted) = (Vec::new(), false);
        loop {
            let mut rest = self.inbox.answer(&self.socket)?;
            while let Some(length) = message_length(rest)? {
                let (message, further) = rest.split_at(length);
                rest = &further[(length.next_multiple_of(4) - length).min(further.len())..];
                // `struct nlmsghdr`.
                let short = |at: usize| u16::from_ne_bytes([message[at], message[at + 1]]);
                let (kind, flags, body) = (short(4), short(6), &message[HEADER..]);
                if message[8..12] != sequence.to_ne_bytes() {
                    continue;
                }
                interrupted |= flags & NLM_F_DUMP_INTR != 0;
                let code = || body.get(..4).map_or(0, |b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                match kind {
                    NLMSG_DONE => return errno(code()).map(|()| (!interrupted).then_some(list)),
                    NLMSG_ERROR => errno(code())?,
                    _ => list.push(body.to_vec()),
                }
            }
        }
    }

    /// `None` when the list changed under the kernel's hands.
    fn dump_once(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Option<Vec<RouteNetlinkMessage>>, KernelError> {
        let sequence = self.send(&[(message, NLM_F_REQUEST | NLM_F_DUMP)])?;
        let mut listing = Listing::default();
        loop {
            for message in self.receive()? {
                if message.header.sequence_number != sequence {
                    continue;
                }
                if let Some(list) = listing.hear(message)? {
                    return Ok(list);
                }
            }
        }
    }

    fn chunk(&mut self, requests: &[Request]) -> Vec<Result<(), KernelError>> {
        let messages: Vec<_> =
            requests.iter().map(|r| (r.message.clone(), NLM_F_REQUEST | NLM_F_ACK | r.flags)).collect();
        let mut answers = BTreeMap::new();
        let failure = self.send(&messages).and_then(|first| {
            while answers.len() < requests.len() {
                for message in self.receive()? {
                    let place = message.header.sequence_number.wrapping_sub(first) as usize;
                    if let NetlinkPayload::Error(error) = message.payload
                        && place < requests.len()
                    {
                        answers.insert(place, errno(error.code.map_or(0, |c| c.get())));
                    }
                }
            }
            Ok(())
        });
        let unanswered = failure.err().unwrap_or_else(|| KernelError::Socket("no answer".into()));
        (0..requests.len())
            .map(|place| answers.remove(&place).unwrap_or_else(|| Err(unanswered.clone())))
            .collect()
    }

    /// Sends the messages under consecutive sequence numbers and returns the first.
    fn send(&mut self, messages: &[(RouteNetlinkMessage, u16)]) -> Result<u32, KernelError> {
        let (first, buffer) = self.written(messages);
        self.socket.send(&buffer, 0)?;
        Ok(first)
    }

    fn written(&mut self, messages: &[(RouteNetlinkMessage, u16)]) -> (u32, Vec<u8>) {
        let first = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        for (message, flags) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let mut header = NetlinkHeader::default();
            header.flags = *flags;
            header.sequence_number = self.sequence;
            let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message.clone()));
            message.finalize();
            let start = buffer.len();
            buffer.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut buffer[start..]);
        }
        (first, buffer)
    }

    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, KernelError> {
        let mut rest = self.inbox.answer(&self.socket)?;
        let mut messages = Vec::new();
        while let Some(length) = message_length(rest)? {
            let message = NetlinkMessage::deserialize(&rest[..length]);
            messages.push(message.map_err(|e| KernelError::Malformed(e.to_string()))?);
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
        Ok(messages)
    }
}

/// Of the next message in a datagram; `None` at its end.
fn message_length(rest: &[u8]) -> Result<Option<usize>, KernelError> {
    let Some(bytes) = rest.get(..HEADER) else { return Ok(None) };
    let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
    if length < HEADER || length > rest.len() {
        return Err(KernelError::Malformed(format!("a message of {length} bytes in {}", rest.len())));
    }
    Ok(Some(length))
}

/// A dump as it comes in.
#[derive(Default)]
struct Listing {
    list: Vec<RouteNetlinkMessage>,
    interrupted: bool,
}

impl Listing {
    /// The outcome once the last message is in; inside it `None` when the list changed under the kernel's hands.
    fn hear(
        &mut self,
        message: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<Option<Option<Vec<RouteNetlinkMessage>>>, KernelError> {
        self.interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
        match message.payload {
            NetlinkPayload::InnerMessage(inner) => self.list.push(inner),
            NetlinkPayload::Done(done) => {
                errno(done.code)?;
                return Ok(Some((!self.interrupted).then(|| std::mem::take(&mut self.list))));
            }
            NetlinkPayload::Error(error) => errno(error.code.map_or(0, |c| c.get()))?,
            _ => {}
        }
        Ok(None)
    }
}

fn errno(code: i32) -> Result<(), KernelError> {
    if code == 0 { Ok(()) } else { Err(KernelError::Refused(Errno(code.abs()))) }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::{DoneMessage, ErrorMessage};
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    fn message(
        flags: u16,
        payload: NetlinkPayload<RouteNetlinkMessage>,
    ) -> NetlinkMessage<RouteNetlinkMessage> {
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        NetlinkMessage::new(header, payload)
    }

    fn link(flags: u16) -> NetlinkMessage<RouteNetlinkMessage> {
        message(flags, NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(LinkMessage::default())))
    }

    fn done(flags: u16) -> NetlinkMessage<RouteNetlinkMessage> {
        message(flags, NetlinkPayload::Done(DoneMessage::default()))
    }

    /// How many links a dump of these messages gives: none when it must be repeated.
    fn heard(messages: Vec<NetlinkMessage<RouteNetlinkMessage>>) -> Result<Option<usize>, KernelError> {
        let mut listing = Listing::default();
        for message in messages {
            if let Some(outcome) = listing.hear(message)? {
                return Ok(outcome.map(|list| list.len()));
            }
        }
        panic!("never over");
    }

    #[test]
    fn an_interrupted_dump_is_none_wherever_it_was_interrupted() {
        assert_eq!(heard(vec![link(0), link(0), done(0)]), Ok(Some(2)));
        assert_eq!(heard(vec![done(0)]), Ok(Some(0)));
        for place in 0..3 {
            let flags = |n: usize| if n == place { NLM_F_DUMP_INTR } else { 0 };
            assert_eq!(heard(vec![link(flags(0)), link(flags(1)), done(flags(2))]), Ok(None), "at {place}");
        }
    }

    #[test]
    fn a_dump_that_fails_says_so_at_its_beginning_and_at_its_end() {
        let refused = Err(KernelError::Refused(Errno(nix::libc::EPERM)));
        let mut error = ErrorMessage::default();
        error.code = std::num::NonZeroI32::new(-nix::libc::EPERM);
        assert_eq!(heard(vec![message(0, NetlinkPayload::Error(error))]), refused);
        let mut end = DoneMessage::default();
        end.code = -nix::libc::EPERM;
        assert_eq!(heard(vec![link(0), message(0, NetlinkPayload::Done(end))]), refused);
    }
}
