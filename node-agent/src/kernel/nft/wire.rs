//! Netlink messages of nf_tables and conntrack, byte by byte (linux/netlink.h, linux/netfilter/nfnetlink.h).

pub(super) use crate::kernel::attributes::{Attributes, NESTED, Parsed};

pub(super) const HEADER: usize = 16;
/// `struct nfgenmsg`.
const GENERIC: usize = 4;

/// A message under construction.
#[derive(Debug)]
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// `kind` with its subsystem; `resource` is zero but for the marks of a batch.
    pub(super) fn new(kind: u16, flags: u16, family: u8, resource: u16) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([family, 0]);
        bytes.extend(resource.to_be_bytes());
        Self { bytes }
    }

    pub(super) fn bytes(mut self, sequence: u32) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn with(self, attributes: impl FnOnce(Attributes) -> Attributes) -> Self {
        Self { bytes: attributes(Attributes(self.bytes)).0 }
    }

    pub(super) fn attribute(self, kind: u16, value: &[u8]) -> Self {
        self.with(|attributes| attributes.attribute(kind, value))
    }

    pub(super) fn text(self, kind: u16, text: &str) -> Self {
        self.with(|attributes| attributes.text(kind, text))
    }

    pub(super) fn number(self, kind: u16, number: u32) -> Self {
        self.with(|attributes| attributes.number(kind, number))
    }

    pub(super) fn long(self, kind: u16, number: u64) -> Self {
        self.with(|attributes| attributes.long(kind, number))
    }

    pub(super) fn nested(self, kind: u16, attributes: &Attributes) -> Self {
        self.with(|all| all.nested(kind, attributes))
    }
}

/// One message of a datagram.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) body: &'a [u8],
}

impl<'a> Received<'a> {
    /// `nfgen_family`.
    pub(super) fn family(&self) -> u8 {
        self.body.first().copied().unwrap_or_default()
    }

    pub(super) fn attributes(&self) -> Parsed<'a> {
        Parsed(self.body.get(GENERIC..).unwrap_or_default())
    }
}

/// The messages of a datagram; what is cut short ends them.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
        let message = rest.get(..length).filter(|m| m.len() >= HEADER)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
            body: &message[HEADER..],
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_what_is_cut_is_not() {
        let inner = Attributes::default().text(1, "ab").number(2, 7);
        let message = Message::new(0x0a06, 5, 2, 0).text(1, "filter").nested(4, &inner).long(3, 9);
        let bytes = message.bytes(42);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence, all[0].family()), (0x0a06, 5, 42, 2));
        let attributes = all[0].attributes();
        assert_eq!((attributes.text(1), attributes.long(3)), (Some("filter"), Some(9)));
        assert_eq!(attributes.nested(4).and_then(|nested| nested.number(2)), Some(7));
        for cut in 0..bytes.len() {
            assert_eq!(messages(&bytes[..cut]).count(), 0, "{cut}");
        }
    }
}
