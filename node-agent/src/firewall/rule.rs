//! Rules of nf_tables, in the few expressions that ours are made of. Whatever else the kernel knows is kept by name, so
//! that a rule of somebody else's is at least known to have a condition.

use std::net::{IpAddr, SocketAddr};

use weft_shared::{IfName, Subnet};

use super::Family;

/// In the comment of every rule of ours that stands in somebody else's chain: by this it is known again.
pub const MARK: &str = "weft forward";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub exprs: Vec<Expr>,
    pub comment: Option<String>,
}

/// An expression; conditions load into the first register and compare it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    Mark,
    Nfproto,
    /// `meta l4proto`.
    Protocol,
    /// `meta iifname`.
    InputName,
    /// `fib daddr type`: whose the destination is.
    DestinationType,
    /// Bytes of the network header.
    Payload {
        offset: u32,
        len: u32,
    },
    /// Bytes of the transport header.
    Transport {
        offset: u32,
        len: u32,
    },
    And(Vec<u8>),
    /// Sets these bits of the first register.
    Or(Vec<u8>),
    /// The first register becomes the packet's mark.
    SetMark,
    /// Bytes into the first register or the second.
    Load {
        register: u32,
        value: Vec<u8>,
    },
    /// To the address in the first register and the port in the second.
    Dnat(Family),
    Cmp {
        equal: bool,
        value: Vec<u8>,
    },
    Counter,
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
    Masquerade {
        fully_random: bool,
    },
    Reject,
    /// Says something and decides nothing.
    Log,
    /// A target of iptables', by its name: iptables-nft writes what it has no other words for in this way.
    Target(String),
    Other(String),
}

/// What a packet that no condition speaks of meets in a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Nothing, or it depends on the packet.
    On,
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

impl Rule {
    pub fn new(conditions: Vec<Vec<Expr>>, verdict: Expr) -> Self {
        Self::doing(conditions, vec![verdict])
    }

    pub fn doing(conditions: Vec<Vec<Expr>>, deed: Vec<Expr>) -> Self {
        let exprs = conditions.into_iter().flatten().chain([Expr::Counter]).chain(deed).collect();
        Self { exprs, comment: None }
    }

    pub fn with_comment(self, comment: &str) -> Self {
        Self { comment: Some(comment.into()), ..self }
    }

    pub fn is_marked(&self) -> bool {
        self.comment.as_deref() == Some(MARK)
    }

    /// `family` is that of the packets, not of the chain.
    pub fn step(&self, family: Family) -> Step {
        let mut rest: Vec<&Expr> =
            self.exprs.iter().filter(|e| !matches!(e, Expr::Counter | Expr::Log)).collect();
        if let [Expr::Nfproto, Expr::Cmp { equal: true, value }, ..] = rest[..]
            && *value == [family.nfproto()]
        {
            rest.drain(..2);
        }
        match rest[..] {
            [Expr::Accept] => Step::Accept,
            [Expr::Drop | Expr::Reject] => Step::Drop,
            [Expr::Target(name)] if name == "REJECT" || name == "DROP" => Step::Drop,
            [Expr::Return] => Step::Return,
            [Expr::Jump(chain)] => Step::Jump(chain.clone()),
            [Expr::Goto(chain)] => Step::Goto(chain.clone()),
            _ => Step::On,
        }
    }

    /// The network that the source or the destination must be in, where that is a plain prefix.
    pub fn prefix(&self, side: Side) -> Option<Subnet> {
        self.exprs.iter().enumerate().find_map(|(at, expr)| {
            let Expr::Payload { offset, len } = expr else { return None };
            let full = address_place(*offset, side)?;
            let (mask, cmp) = match (self.exprs.get(at + 1)?, self.exprs.get(at + 2)) {
                (Expr::And(mask), Some(cmp)) => (mask.clone(), cmp),
                (cmp, _) => (vec![0xff; *len as usize], cmp),
            };
            let Expr::Cmp { equal: true, value } = cmp else { return None };
            let ones = mask.iter().map(|byte| byte.count_ones()).sum::<u32>();
            let mut bytes = value.clone();
            bytes.resize(full, 0);
            let addr: IpAddr = match <[u8; 4]>::try_from(bytes.as_slice()) {
                Ok(v4) => v4.into(),
                Err(_) => <[u8; 16]>::try_from(bytes).ok()?.into(),
            };
            Subnet::new(addr, u8::try_from(ones).ok()?)
        })
    }
}

/// Length of the address at this place of the header, if it is that side's.
fn address_place(offset: u32, side: Side) -> Option<usize> {
    match (offset, side) {
        (12, Side::Source) | (16, Side::Destination) => Some(4),
        (8, Side::Source) | (24, Side::Destination) => Some(16),
        _ => None,
    }
}

/// `meta nfproto ipv4`: needed where a chain sees both families.
pub fn of_family(family: Family) -> Vec<Expr> {
    vec![Expr::Nfproto, Expr::Cmp { equal: true, value: vec![family.nfproto()] }]
}

/// `ip saddr 10.5.0.0/16` and its like, with as few bytes as the prefix needs, as nft and iptables-nft write it.
pub fn within(side: Side, subnet: Subnet, inside: bool) -> Vec<Expr> {
    let bytes = match subnet.addr() {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let offset = match (bytes.len(), side) {
        (4, Side::Source) => 12,
        (4, Side::Destination) => 16,
        (_, Side::Source) => 8,
        (_, Side::Destination) => 24,
    };
    let (whole, rest) = (usize::from(subnet.len() / 8), subnet.len() % 8);
    let len = if rest == 0 { whole } else { bytes.len() };
    let mut exprs = vec![Expr::Payload { offset, len: len as u32 }];
    if rest != 0 {
        let mask = (0..bytes.len()).map(|at| match at.cmp(&whole) {
            std::cmp::Ordering::Less => 0xff,
            std::cmp::Ordering::Equal => !(0xff_u8 >> rest),
            std::cmp::Ordering::Greater => 0,
        });
        exprs.push(Expr::And(mask.collect()));
    }
    exprs.push(Expr::Cmp { equal: inside, value: bytes[..len].to_vec() });
    exprs
}

/// `ip daddr`: this very address.
pub fn is_address(side: Side, addr: IpAddr) -> Vec<Expr> {
    within(side, Subnet::host(addr), true)
}

/// `fib daddr type local`: an address of this host.
pub fn is_local() -> Vec<Expr> {
    /// `RTN_LOCAL` of linux/rtnetlink.h.
    const LOCAL: u32 = 2;
    vec![Expr::DestinationType, equals(LOCAL.to_ne_bytes().to_vec())]
}

/// `tcp dport 80` and its like.
pub fn to_port(protocol: u8, port: u16) -> Vec<Expr> {
    let port = equals(port.to_be_bytes().to_vec());
    vec![Expr::Protocol, equals(vec![protocol]), Expr::Transport { offset: 2, len: 2 }, port]
}

/// `iifname`.
pub fn came_by(dev: &IfName) -> Vec<Expr> {
    /// `IFNAMSIZ` of linux/if.h.
    const SIZE: usize = 16;
    let mut name = dev.as_str().as_bytes().to_vec();
    name.resize(SIZE, 0);
    vec![Expr::InputName, equals(name)]
}

fn equals(value: Vec<u8>) -> Expr {
    Expr::Cmp { equal: true, value }
}

/// `meta mark set meta mark | bit`.
pub fn set_mark(bit: u32) -> Vec<Expr> {
    vec![Expr::Mark, Expr::Or(bit.to_ne_bytes().to_vec()), Expr::SetMark]
}

/// `dnat to`.
pub fn dnat(to: SocketAddr) -> Vec<Expr> {
    let (family, address) = match to.ip() {
        IpAddr::V4(addr) => (Family::Ip, addr.octets().to_vec()),
        IpAddr::V6(addr) => (Family::Ip6, addr.octets().to_vec()),
    };
    let port = to.port().to_be_bytes().to_vec();
    vec![
        Expr::Load { register: 1, value: address },
        Expr::Load { register: 2, value: port },
        Expr::Dnat(family),
    ]
}

/// `meta mark & bit == bit`.
pub fn marked(bit: u32) -> Vec<Expr> {
    let bytes = bit.to_ne_bytes().to_vec();
    vec![Expr::Mark, Expr::And(bytes.clone()), Expr::Cmp { equal: true, value: bytes }]
}
