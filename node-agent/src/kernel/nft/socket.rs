//! A blocking nfnetlink socket: questions, and batches that are committed whole or not at all.
//!
//! A batch may say which generation of the ruleset it was made for; the kernel refuses it when somebody else has
//! committed meanwhile (`ERESTART`), so that what was looked at is what is changed (net/netfilter/nfnetlink.c).

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

use super::uapi::*;
use super::wire::{Message, Received, messages};
use crate::kernel::inbox::{self, Inbox};
use crate::kernel::{Errno, KernelError};

/// Most of a node's 65,536 ports in one commit: some 500 bytes of each rule that is sent, and an acknowledgement of each
/// (768 bytes as the kernel counts). A limit, not memory that is taken.
const BUFFER: usize = 64 << 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

pub(super) struct NftSocket {
    socket: Socket,
    inbox: Inbox,
    sequence: u32,
}

impl std::fmt::Debug for NftSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NftSocket").field("sequence", &self.sequence).finish()
    }
}

impl NftSocket {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self, KernelError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Beyond net.core.wmem_max and rmem_max; a kernel or namespace that refuses that leaves what it allows.
        let _ = setsockopt(&socket, sockopt::SndBufForce, &BUFFER);
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &BUFFER);
        inbox::answer_timeout(&socket)?;
        Ok(Self { socket, inbox: Inbox::of("nf_tables"), sequence: 0 })
    }

    /// The ruleset's generation: it changes with every commit of anybody's in this network namespace.
    pub(super) fn generation(&mut self) -> Result<u32, KernelError> {
        let sequence = self.next();
        self.socket.send(&Message::new(GET_GEN, NLM_F_REQUEST, 0, 0).bytes(sequence), 0)?;
        let mut generation = None;
        while generation.is_none() {
            self.receive(sequence, |message| match message.kind {
                NEW_GEN => {
                    generation = message.attributes().number(GEN_ID);
                    Ok(true)
                }
                NLMSG_ERROR => error(&message).map(|()| true),
                _ => Ok(false),
            })
            .map_err(|e| match e {
                // No such subsystem: the module is missing and cannot be loaded.
                KernelError::Refused(Errno(nix::libc::EINVAL | nix::libc::EOPNOTSUPP)) => {
                    KernelError::NoNftables
                }
                other => other,
            })?;
        }
        Ok(generation.unwrap_or_default())
    }

    /// Lists what `message` asks for; `None` when the kernel says that the list changed under its hands.
    pub(super) fn dump<T>(
        &mut self,
        kind: u16,
        family: u8,
        build: impl FnOnce(Message) -> Message,
        mut read: impl FnMut(&Received<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, KernelError> {
        let sequence = self.next();
        let message = build(Message::new(kind, NLM_F_REQUEST | NLM_F_DUMP, family, 0));
        self.socket.send(&message.bytes(sequence), 0)?;
        let (mut list, mut consistent, mut done) = (Vec::new(), true, false);
        while !done {
            self.receive(sequence, |message| {
                consistent &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => done = true,
                    NLMSG_ERROR => {
                        done = true;
                        match error(&message) {
                            // What is asked about is not there.
                            Err(KernelError::Refused(Errno(nix::libc::ENOENT))) => {}
                            other => other?,
                        }
                    }
                    _ => list.extend(read(&message)),
                }
                Ok(done)
            })?;
        }
        Ok(consistent.then_some(list))
    }

    /// Sends one message that is no part of a batch and waits for its answer.
    pub(super) fn request(&mut self, message: Message) -> Result<(), KernelError> {
        let sequence = self.next();
        self.socket.send(&message.bytes(sequence), 0)?;
        let mut answer = None;
        while answer.is_none() {
            self.receive(sequence, |message| {
                answer = (message.kind == NLMSG_ERROR).then(|| error(&message));
                Ok(answer.is_some())
            })?;
        }
        answer.unwrap_or(Ok(()))
    }

    /// Commits all messages at once; `generation` is the one they were made for.
    pub(super) fn commit(
        &mut self,
        messages: Vec<Message>,
        generation: Option<u32>,
    ) -> Result<(), KernelError> {
        let begin = Message::new(BATCH_BEGIN, NLM_F_REQUEST, 0, SUBSYSTEM_ID);
        let begin = match generation {
            Some(generation) => begin.number(BATCH_GENERATION, generation),
            None => begin,
        };
        let first = self.next();
        let mut batch = begin.bytes(first);
        let mut awaited = 0;
        for message in messages {
            let sequence = self.next();
            let bytes = message.bytes(sequence);
            batch.extend(bytes);
            awaited += 1;
        }
        batch.extend(Message::new(BATCH_END, NLM_F_REQUEST, 0, SUBSYSTEM_ID).bytes(self.next()));
        self.socket.send(&batch, 0)?;
        let (mut answered, mut outcome) = (0, Ok(()));
        while answered < awaited {
            let datagram = self.inbox.answer(&self.socket)?;
            for message in super::wire::messages(datagram).filter(|m| m.kind == NLMSG_ERROR) {
                let answer = error(&message);
                let place = message.sequence.wrapping_sub(first);
                // An error of the batch as a whole has the first message's number, and is the only answer.
                if place == 0 && answer.is_err() {
                    return answer;
                }
                if place <= awaited {
                    answered += 1;
                    outcome = outcome.and(answer);
                }
            }
        }
        outcome
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Reads one datagram and hands over the answers to this question until `take` says that it was the last.
    fn receive(
        &mut self,
        sequence: u32,
        mut take: impl FnMut(Received<'_>) -> Result<bool, KernelError>,
    ) -> Result<(), KernelError> {
        let datagram = self.inbox.answer(&self.socket)?;
        for message in messages(datagram).filter(|m| m.sequence == sequence) {
            if take(message)? {
                break;
            }
        }
        Ok(())
    }
}

/// Flags of a message in a batch that makes or removes something.
pub(super) const CHANGE: u16 = NLM_F_REQUEST | NLM_F_ACK;

/// `struct nlmsgerr`.
fn error(message: &Received<'_>) -> Result<(), KernelError> {
    let code = message.body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 { Ok(()) } else { Err(KernelError::Refused(Errno(code.abs()))) }
}
