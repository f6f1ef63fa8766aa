//! Netlink's attributes, byte by byte (linux/netlink.h, `struct nlattr`): they nest, and each begins at a multiple of four.
//! For what the library's packets do not know: nf_tables, conntrack, traffic control. Numbers are big-endian in the first
//! two and the machine's own in the last.

pub(super) const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Attributes under construction.
#[derive(Debug, Clone, Default)]
pub(super) struct Attributes(pub(super) Vec<u8>);

impl Attributes {
    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(((4 + value.len()) as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn text(self, kind: u16, text: &str) -> Self {
        let terminated = [text.as_bytes(), &[0]].concat();
        self.attribute(kind, &terminated)
    }

    /// Big-endian.
    pub(super) fn number(self, kind: u16, number: u32) -> Self {
        self.attribute(kind, &number.to_be_bytes())
    }

    /// Big-endian.
    pub(super) fn long(self, kind: u16, number: u64) -> Self {
        self.attribute(kind, &number.to_be_bytes())
    }

    pub(super) fn nested(self, kind: u16, attributes: &Attributes) -> Self {
        self.attribute(kind | NESTED, &attributes.0)
    }
}

/// Attributes as they came; what is cut short ends them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parsed<'a>(pub(super) &'a [u8]);

impl<'a> Parsed<'a> {
    pub(super) fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
            let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
            let value = rest.get(4..length)?;
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            Some((kind, value))
        })
    }

    pub(super) fn get(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(k, _)| *k == kind).map(|(_, value)| value)
    }

    pub(super) fn text(self, kind: u16) -> Option<&'a str> {
        let value = self.get(kind)?;
        std::str::from_utf8(value.strip_suffix(&[0]).unwrap_or(value)).ok()
    }

    /// Big-endian.
    pub(super) fn number(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    /// Big-endian.
    pub(super) fn long(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.get(kind)?.try_into().ok()?))
    }

    pub(super) fn nested(self, kind: u16) -> Option<Parsed<'a>> {
        self.get(kind).map(Parsed)
    }
}

/// A number of the machine's own byte order inside a structure.
pub(super) fn field(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_what_is_cut_is_not() {
        let inner = Attributes::default().text(1, "ab").number(2, 7);
        let all = Attributes::default().text(1, "filter").nested(4, &inner).long(3, 9);
        let read = Parsed(&all.0);
        assert_eq!((read.text(1), read.long(3), read.get(5)), (Some("filter"), Some(9), None));
        let nested = read.nested(4).expect("nested");
        assert_eq!((nested.text(1), nested.number(2), nested.number(3)), (Some("ab"), Some(7), None));
        let whole = read.iter().count();
        for cut in 0..all.0.len() {
            assert!(Parsed(&all.0[..cut]).iter().count() < whole, "{cut}");
        }
        assert_eq!(
            (field(&[0, 1, 0, 0, 0], 1), field(&[0; 4], 1)),
            (Some(u32::from_ne_bytes([1, 0, 0, 0])), None)
        );
    }
}
