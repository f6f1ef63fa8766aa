//! Rules as the kernel takes and gives them.

use super::uapi::*;
use super::wire::{Attributes, Parsed};
use crate::firewall::{Expr, Family, Rule};

pub(super) fn encode(exprs: &[Expr]) -> Attributes {
    exprs.iter().filter_map(expression).fold(Attributes::default(), |list, (name, data)| {
        let element = Attributes::default().text(EXPR_NAME, name).nested(EXPR_DATA, &data);
        list.nested(LIST_ELEMENT, &element)
    })
}

/// A comment as user data, for rule and table alike.
pub(super) fn comment(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    [&[UDATA_COMMENT, length][..], text.as_bytes(), &[0]].concat()
}

/// `None`: one of those that are only ever found.
fn expression(expr: &Expr) -> Option<(&'static str, Attributes)> {
    let data = Attributes::default();
    let value = |bytes: &[u8]| Attributes::default().attribute(DATA_VALUE, bytes);
    Some(match expr {
        Expr::Mark => ("meta", data.number(1, REGISTER).number(2, META_MARK)),
        Expr::Nfproto => ("meta", data.number(1, REGISTER).number(2, META_NFPROTO)),
        Expr::Protocol => ("meta", data.number(1, REGISTER).number(2, META_L4PROTO)),
        Expr::InputName => ("meta", data.number(1, REGISTER).number(2, META_IIFNAME)),
        Expr::SetMark => ("meta", data.number(2, META_MARK).number(3, REGISTER)),
        Expr::DestinationType => {
            ("fib", data.number(1, REGISTER).number(2, FIB_TYPE).number(3, FIB_DESTINATION))
        }
        Expr::Payload { offset, len } => {
            ("payload", data.number(1, REGISTER).number(2, BASE_NETWORK).number(3, *offset).number(4, *len))
        }
        Expr::Transport { offset, len } => {
            ("payload", data.number(1, REGISTER).number(2, BASE_TRANSPORT).number(3, *offset).number(4, *len))
        }
        Expr::And(mask) => ("bitwise", bitwise(&value(mask), &value(&vec![0; mask.len()]), mask.len())),
        Expr::Or(bits) => ("bitwise", bitwise(&value(&inverted(bits)), &value(bits), bits.len())),
        Expr::Load { register, value: bytes } => {
            ("immediate", data.number(1, *register).nested(2, &value(bytes)))
        }
        Expr::Dnat(family) => (
            "nat",
            data.number(1, NAT_DNAT)
                .number(2, u32::from(family.nfproto()))
                .number(3, REGISTER)
                .number(5, REGISTER_2),
        ),
        Expr::Cmp { equal, value: bytes } => {
            let op = if *equal { CMP_EQUAL } else { CMP_NOT_EQUAL };
            ("cmp", data.number(1, REGISTER).number(2, op).nested(3, &value(bytes)))
        }
        Expr::Counter => ("counter", data),
        Expr::Masquerade { fully_random } => {
            ("masq", if *fully_random { data.number(1, RANDOM_FULLY) } else { data })
        }
        Expr::Accept => verdict(ACCEPT, None),
        Expr::Drop => verdict(DROP, None),
        Expr::Return => verdict(RETURN, None),
        Expr::Jump(chain) => verdict(JUMP, Some(chain)),
        Expr::Goto(chain) => verdict(GOTO, Some(chain)),
        Expr::Reject | Expr::Log | Expr::Target(_) | Expr::Other(_) => return None,
    })
}

/// Of the first register, in place: AND with `mask`, then XOR with `xor`.
fn bitwise(mask: &Attributes, xor: &Attributes, len: usize) -> Attributes {
    let registers = Attributes::default().number(1, REGISTER).number(2, REGISTER);
    registers.number(3, len as u32).nested(4, mask).nested(5, xor)
}

fn inverted(bits: &[u8]) -> Vec<u8> {
    bits.iter().map(|byte| !byte).collect()
}

fn verdict(code: i32, chain: Option<&str>) -> (&'static str, Attributes) {
    let verdict = Attributes::default().number(VERDICT_CODE, code as u32);
    let verdict = match chain {
        Some(chain) => verdict.text(VERDICT_CHAIN, chain),
        None => verdict,
    };
    let data = Attributes::default().nested(DATA_VERDICT, &verdict);
    ("immediate", Attributes::default().number(1, REGISTER_VERDICT).nested(2, &data))
}

pub(super) fn decode(expressions: Parsed<'_>, userdata: Option<&[u8]>) -> Rule {
    let mut rule = Rule { exprs: Vec::new(), comment: userdata.and_then(user_comment) };
    for (_, element) in expressions.iter() {
        let element = Parsed(element);
        let name = element.text(EXPR_NAME).unwrap_or("?");
        let data = element.nested(EXPR_DATA).unwrap_or(Parsed(&[]));
        match match_comment(name, data) {
            Some(comment) => rule.comment = Some(comment),
            None => rule.exprs.push(found(name, data).unwrap_or_else(|| Expr::Other(name.to_owned()))),
        }
    }
    rule
}

fn user_comment(mut data: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = data {
        let value = rest.get(..usize::from(*length))?;
        if *kind == UDATA_COMMENT {
            return text(value);
        }
        data = &rest[value.len()..];
    }
    None
}

/// `-m comment` of an iptables that keeps it as a match: `struct xt_comment_info`, one text.
fn match_comment(name: &str, data: Parsed<'_>) -> Option<String> {
    (name == "match" && data.text(1) == Some("comment")).then(|| data.get(3).and_then(text))?
}

fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8(bytes[..end].to_vec()).ok()
}

/// `None`: an expression that ours are not made of.
fn found(name: &str, data: Parsed<'_>) -> Option<Expr> {
    let in_register = |kind: u16| data.number(kind) == Some(REGISTER);
    match name {
        "meta" if in_register(1) => match data.number(2)? {
            META_MARK => Some(Expr::Mark),
            META_NFPROTO => Some(Expr::Nfproto),
            META_L4PROTO => Some(Expr::Protocol),
            META_IIFNAME => Some(Expr::InputName),
            _ => None,
        },
        "meta" if data.number(3) == Some(REGISTER) && data.number(2)? == META_MARK => Some(Expr::SetMark),
        "fib" if in_register(1) && data.number(2)? == FIB_TYPE && data.number(3)? == FIB_DESTINATION => {
            Some(Expr::DestinationType)
        }
        "payload" if in_register(1) && data.number(2)? == BASE_NETWORK => {
            Some(Expr::Payload { offset: data.number(3)?, len: data.number(4)? })
        }
        "payload" if in_register(1) && data.number(2)? == BASE_TRANSPORT => {
            Some(Expr::Transport { offset: data.number(3)?, len: data.number(4)? })
        }
        "bitwise" if in_register(1) && in_register(2) && data.number(6).unwrap_or(0) == 0 => {
            let xor = data.nested(5)?.get(DATA_VALUE)?;
            let mask = data.nested(4)?.get(DATA_VALUE)?;
            match xor.iter().all(|b| *b == 0) {
                true => Some(Expr::And(mask.to_vec())),
                false => (inverted(xor) == mask).then(|| Expr::Or(xor.to_vec())),
            }
        }
        "cmp" if in_register(1) => {
            let equal = match data.number(2)? {
                CMP_EQUAL => true,
                CMP_NOT_EQUAL => false,
                _ => return None,
            };
            Some(Expr::Cmp { equal, value: data.nested(3)?.get(DATA_VALUE)?.to_vec() })
        }
        "counter" => Some(Expr::Counter),
        "log" => Some(Expr::Log),
        "reject" => Some(Expr::Reject),
        "target" => Some(Expr::Target(data.text(1)?.to_owned())),
        // A range of ports or addresses would be another masquerade.
        "masq" if data.get(2).is_none() => match data.number(1).unwrap_or(0) {
            0 => Some(Expr::Masquerade { fully_random: false }),
            RANDOM_FULLY => Some(Expr::Masquerade { fully_random: true }),
            _ => None,
        },
        "immediate" if data.number(1)? != REGISTER_VERDICT => {
            let register = data.number(1)?;
            Some(Expr::Load { register, value: data.nested(2)?.get(DATA_VALUE)?.to_vec() })
        }
        // The kernel shows a single address and a single port as a range of one, and the flags that go with them.
        "nat" if data.number(1)? == NAT_DNAT => {
            let same = |from: u16, register: u32| {
                data.number(from) == Some(register) && data.number(from + 1).is_none_or(|to| to == register)
            };
            let plain = data.number(7).unwrap_or(0) & !NAT_IMPLIED == 0;
            let family = [Family::Ip, Family::Ip6]
                .into_iter()
                .find(|family| data.number(2) == Some(u32::from(family.nfproto())))?;
            (plain && same(3, REGISTER) && same(5, REGISTER_2)).then_some(Expr::Dnat(family))
        }
        "immediate" if data.number(1)? == REGISTER_VERDICT => {
            let verdict = data.nested(2)?.nested(DATA_VERDICT)?;
            let chain = || verdict.text(VERDICT_CHAIN).map(str::to_owned);
            match verdict.number(VERDICT_CODE)? as i32 {
                ACCEPT => Some(Expr::Accept),
                DROP => Some(Expr::Drop),
                RETURN => Some(Expr::Return),
                JUMP => chain().map(Expr::Jump),
                GOTO => chain().map(Expr::Goto),
                _ => None,
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use weft_shared::Subnet;

    use super::*;
    use crate::firewall::rule::{Side, came_by, dnat, is_local, marked, set_mark, to_port, within};

    #[test]
    fn rules_come_back_as_they_were_sent() {
        let net = |text: &str| text.parse::<Subnet>().expect(text);
        let conditions = [
            within(Side::Source, net("10.5.0.0/16"), true),
            within(Side::Destination, net("10.5.16.0/20"), false),
            within(Side::Source, net("fd00:5::/61"), true),
            marked(0x4000),
            vec![Expr::Nfproto, Expr::Cmp { equal: true, value: vec![2] }],
            is_local(),
            came_by(&"cni0".parse().expect("name")),
            to_port(132, 8080),
            set_mark(0x2000),
            dnat("10.5.1.2:80".parse().expect("address")),
            dnat("[fd00::2]:80".parse().expect("address")),
        ];
        let verdicts = [
            Expr::Accept,
            Expr::Drop,
            Expr::Return,
            Expr::Jump("a".into()),
            Expr::Goto("b".into()),
            Expr::Masquerade { fully_random: true },
            Expr::Masquerade { fully_random: false },
        ];
        for condition in &conditions {
            for verdict in &verdicts {
                let rule = Rule::new(vec![condition.clone()], verdict.clone()).with_comment("weft forward");
                let message = super::super::wire::Message::new(0, 0, 0, 0).nested(4, &encode(&rule.exprs));
                let bytes = message.bytes(1);
                let received = super::super::wire::messages(&bytes).next().expect("a message");
                let list = received.attributes().nested(4).expect("expressions");
                assert_eq!(decode(list, Some(&comment("weft forward"))), rule);
            }
        }
        assert_eq!(user_comment(&[1, 2, 0, 0, 0, 3, b'a', b'b', 0]).as_deref(), Some("ab"));
        assert_eq!(user_comment(&[0, 9, b'a']), None, "cut short");
    }
}
