//! Netlink messages and attributes as bytes (netlink(7), rtnetlink(7)): built into one buffer that is sent at once,
//! and taken apart without trust in any length.

use super::uapi::*;

/// Messages for one `sendmsg`. Each asks for an acknowledgement, so each has its own outcome.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) first_seq: u32,
    pub(super) len: usize,
}

impl Batch {
    pub(super) fn starting_at(first_seq: u32) -> Self {
        Self { bytes: Vec::with_capacity(512), first_seq, len: 0 }
    }

    /// Appends a message; `fixed` is its fixed part, `attributes` fills in the rest.
    pub(super) fn push(
        &mut self,
        kind: u16,
        flags: u16,
        fixed: &[u8],
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        let seq = self.first_seq.wrapping_add(self.len as u32);
        self.len += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        self.bytes.extend_from_slice(&seq.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(fixed);
        attributes(&mut Attributes(&mut self.bytes));
        let len = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

pub(super) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    pub(super) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.bytes(kind, &[value])
    }

    pub(super) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A string with its terminating zero.
    pub(super) fn str(&mut self, kind: u16, value: &str) -> &mut Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) -> &mut Self {
        self.nest_after(kind, &[], inner)
    }

    /// A nest that begins with a fixed structure (`VETH_INFO_PEER` holds an `ifinfomsg`).
    pub(super) fn nest_after(
        &mut self,
        kind: u16,
        fixed: &[u8],
        inner: impl FnOnce(&mut Attributes<'_>),
    ) -> &mut Self {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        self.0.extend_from_slice(fixed);
        inner(&mut Attributes(self.0));
        let len = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }
}

/// One message as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Received<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) seq: u32,
    pub(super) payload: &'a [u8],
}

/// The messages of a datagram; ends at the first whose length lies.
pub(super) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(bytes, 0)? as usize;
        let message = bytes.get(..len).filter(|_| len >= NLMSG_HEADER)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            seq: u32_at(message, 8)?,
            payload: message.get(NLMSG_HEADER..)?,
        })
    })
}

/// Type and value of each attribute; ends at the first whose length lies.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..len)?;
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_ne_bytes(*b))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_reads_back() {
        let mut batch = Batch::starting_at(7);
        batch.push(RTM_GETLINK, 0, &[0; 16], |a| {
            a.str(IFLA_IFNAME, "eth0").nest(IFLA_LINKINFO, |a| {
                a.bytes(IFLA_INFO_KIND, b"veth").nest_after(IFLA_INFO_DATA, &[9; 16], |a| {
                    a.u8(1, 5);
                });
            });
        });
        batch.push(RTM_DELLINK, 0, &[1; 16], |_| {});
        let read: Vec<_> = messages(&batch.bytes).collect();
        assert_eq!(read.iter().map(|m| (m.kind, m.seq)).collect::<Vec<_>>(), [(18, 7), (17, 8)]);
        let attrs = &read[0].payload[16..];
        assert_eq!(attribute(attrs, IFLA_IFNAME).and_then(text).as_deref(), Some("eth0"));
        let info = attribute(attrs, IFLA_LINKINFO).expect("nest");
        assert_eq!(attribute(info, IFLA_INFO_KIND), Some(b"veth".as_slice()));
        assert_eq!(attribute(&attribute(info, IFLA_INFO_DATA).expect("data")[16..], 1), Some([5].as_slice()));
        assert_eq!(batch.bytes.len() % 4, 0);
    }

    #[test]
    fn lengths_that_lie_end_the_reading() {
        for len in [0_u32, 3, 15, 17, u32::MAX] {
            let mut bytes = vec![0; 16];
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(messages(&bytes).count(), 0, "{len}");
        }
        for len in [0_u16, 3, 9, u16::MAX] {
            let mut bytes = vec![0; 8];
            bytes[..2].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(attributes(&bytes).count(), 0, "{len}");
        }
    }
}
