//! Traffic control: token buckets and redirections, asked about and made device by device (linux/pkt_sched.h, linux/pkt_cls.h).
//!
//! Nothing is looked at where no limit is wanted. Everybody's queues are listed, of kinds that the library does not read,
//! so only what is ours to know is read, and by hand. A question about a single queue would be no better: its answer is
//! announced to all who listen (net/sched/sch_api.c, `qdisc_get_notify`), us among them.

use std::collections::BTreeMap;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use weft_shared::IfName;

use super::KernelError;
use super::attributes::{Attributes, NESTED, Parsed, field};
use super::socket::RouteSocket;
use crate::object::{Object, Tbf};

const ROOT: TcHandle = TcHandle { major: 0xffff, minor: 0xffff };
/// Where the queue of what comes in hangs, and its handle.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0xfff1 };
const INGRESS_QUEUE: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// Of our filter, by which it is told from others': "we" in ASCII.
const PRIORITY: u32 = 0x7765;
/// `ETH_P_ALL`, big-endian.
const ALL_PROTOCOLS: u32 = 0x0300;

/// `TCA_KIND`, `TCA_OPTIONS`.
const KIND: u16 = 1;
const OPTIONS: u16 = 2;
const TBF: &str = "tbf";
const TBF_PARMS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
/// `struct tc_tbf_qopt`: two `struct tc_ratespec`, limit, buffer, mtu.
const TBF_QOPT: usize = 36;
const LINKLAYER_ETHERNET: u8 = 1;
/// The kernel shows time in units of so many nanoseconds, as a power of two (`PSCHED_SHIFT`).
const TICK_SHIFT: u32 = 6;

const U32_SELECTOR: u16 = 5;
const U32_ACTIONS: u16 = 7;
/// `TC_U32_TERMINAL`.
const TERMINAL: u8 = 1;
/// The place in the order of actions.
const FIRST_ACTION: u16 = 1;
const ACTION_KIND: u16 = 1;
const ACTION_OPTIONS: u16 = 2;
const MIRRED_PARMS: u16 = 2;
/// `TC_ACT_STOLEN`, `TCA_EGRESS_REDIR`.
const STOLEN: u32 = 4;
const EGRESS_REDIRECT: u32 = 1;

/// What stands where limits are wanted.
pub(super) fn look(
    socket: &mut RouteSocket,
    indices: &BTreeMap<IfName, u32>,
    wanted: &[&Object],
) -> Result<Vec<Object>, KernelError> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let buckets = buckets(socket)?;
    let mut found = Vec::new();
    for object in wanted {
        found.extend(match object {
            Object::Shaper { dev, tbf } => {
                let bucket = indices.get(dev).and_then(|index| buckets.get(index));
                bucket.map(|bucket| Object::Shaper { dev: dev.clone(), tbf: bucket.against(tbf) })
            }
            Object::Redirect { dev, to } => match (indices.get(dev), indices.get(to)) {
                (Some(index), Some(to)) => redirects(socket, *index, *to)?.then(|| (*object).clone()),
                _ => None,
            },
            _ => None,
        });
    }
    Ok(found)
}

/// `tc qdisc replace dev DEV root tbf rate RATE burst BURST limit LIMIT`
pub(super) fn set_bucket(index: u32, tbf: &Tbf) -> (Message, u16) {
    let mut options = vec![0; TBF_QOPT];
    options[1] = LINKLAYER_ETHERNET;
    let rate = u32::try_from(tbf.rate).unwrap_or(u32::MAX);
    options[8..12].copy_from_slice(&rate.to_ne_bytes());
    options[24..28].copy_from_slice(&tbf.limit.to_ne_bytes());
    let options = [
        (TBF_PARMS, options),
        (TBF_RATE64, tbf.rate.to_ne_bytes().to_vec()),
        (TBF_BURST, tbf.burst.to_ne_bytes().to_vec()),
    ];
    let message = message(index, ROOT, TBF, options.into());
    (Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_REPLACE)
}

/// `tc qdisc add dev DEV ingress`; one that is there serves.
pub(super) fn add_ingress(index: u32) -> (Message, u16) {
    let mut message = message(index, INGRESS, "ingress", vec![]);
    message.header.handle = INGRESS_QUEUE;
    (Message::NewQueueDiscipline(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// `tc filter delete dev DEV ingress prio PRIO`
pub(super) fn remove_filter(index: u32) -> Message {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = INGRESS_QUEUE;
    message.header.info = (PRIORITY << 16) | ALL_PROTOCOLS;
    Message::DelTrafficFilter(message)
}

/// `tc filter add dev DEV ingress prio PRIO protocol all u32 match u32 0 0 action mirred egress redirect dev TO`
pub(super) fn add_filter(index: u32, to: u32) -> (Message, u16) {
    // `struct tc_u32_sel` with one key that every packet matches.
    let mut selector = vec![0; 16 + 16];
    (selector[0], selector[2]) = (TERMINAL, 1);
    // `struct tc_mirred`: index, capabilities, action, two counts, what to do, where.
    let mirred: Vec<u8> =
        [0, 0, STOLEN, 0, 0, EGRESS_REDIRECT, to].iter().flat_map(|field| field.to_ne_bytes()).collect();
    let options = Attributes::default().attribute(MIRRED_PARMS, &mirred);
    let action = Attributes::default().text(ACTION_KIND, "mirred").nested(ACTION_OPTIONS, &options);
    let actions = Attributes::default().nested(FIRST_ACTION, &action);
    let options = vec![(U32_SELECTOR, selector), (U32_ACTIONS | NESTED, actions.0)];
    let mut message = message(index, INGRESS_QUEUE, "u32", options);
    message.header.info = (PRIORITY << 16) | ALL_PROTOCOLS;
    (Message::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL)
}

fn message(index: u32, parent: TcHandle, kind: &str, options: Vec<(u16, Vec<u8>)>) -> TcMessage {
    let mut message = TcMessage::with_index(index as i32);
    message.header.parent = parent;
    let options = options.into_iter().map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value)));
    message.attributes = vec![TcAttribute::Kind(kind.into()), TcAttribute::Options(options.collect())];
    message
}

/// The token buckets at devices' roots, by their index.
fn buckets(socket: &mut RouteSocket) -> Result<BTreeMap<u32, Bucket>, KernelError> {
    let listed = socket.dump_bytes(&Message::GetQueueDiscipline(TcMessage::default()))?;
    let at_root = |found: &Listed<'_>| found.parent == u32::MAX && found.is(TBF);
    let buckets = listed.iter().filter_map(|bytes| Listed::parse(bytes)).filter(at_root);
    Ok(buckets.filter_map(|found| Some((found.index, Bucket::parse(found.options())?))).collect())
}

/// As the kernel shows it.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    limit: u32,
    /// Time to fill, in ticks.
    buffer: u32,
}

impl Bucket {
    fn parse(options: Parsed<'_>) -> Option<Self> {
        let parms = options.get(TBF_PARMS)?;
        let rate = match options.get(TBF_RATE64) {
            Some(rate) => u64::from_ne_bytes(rate.try_into().ok()?),
            None => field(parms, 8)?.into(),
        };
        Some(Self { rate, limit: field(parms, 24)?, buffer: field(parms, 28)? })
    }

    fn against(&self, wanted: &Tbf) -> Tbf {
        let burst = if fills_in(wanted, self.buffer) { wanted.burst } else { 0 };
        Tbf { rate: self.rate, burst, limit: self.limit }
    }
}

/// A queue or a filter: `struct tcmsg` and attributes.
#[derive(Debug)]
struct Listed<'a> {
    index: u32,
    parent: u32,
    info: u32,
    attributes: Parsed<'a>,
}

impl<'a> Listed<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (index, parent, info) = (field(bytes, 4)?, field(bytes, 12)?, field(bytes, 16)?);
        Some(Self { index, parent, info, attributes: Parsed(bytes.get(20..)?) })
    }

    fn is(&self, kind: &str) -> bool {
        self.attributes.text(KIND) == Some(kind)
    }

    fn options(&self) -> Parsed<'a> {
        self.attributes.nested(OPTIONS).unwrap_or(Parsed(&[]))
    }
}

/// Whether the wanted bucket takes as long to fill as the kernel shows, in ticks and cut to 32 bits; it rounds.
fn fills_in(wanted: &Tbf, shown: u32) -> bool {
    let nanoseconds = u128::from(wanted.burst) * 1_000_000_000 / u128::from(wanted.rate.max(1));
    let ticks = nanoseconds >> TICK_SHIFT;
    let tolerance = (ticks >> 24) + 4;
    let apart = (ticks as u32).wrapping_sub(shown);
    u128::from(apart.min(apart.wrapping_neg())) <= tolerance
}

/// Whether all that comes in by a device is redirected to another, by our filter and by nothing else under its priority.
fn redirects(socket: &mut RouteSocket, index: u32, to: u32) -> Result<bool, KernelError> {
    let mut ask = TcMessage::with_index(index as i32);
    ask.header.parent = INGRESS_QUEUE;
    let listed = match socket.dump_bytes(&Message::GetTrafficFilter(ask)) {
        // There is no such queue.
        Err(KernelError::Refused(_)) => return Ok(false),
        other => other?,
    };
    let ours = listed.iter().filter_map(|bytes| Listed::parse(bytes)).filter(|f| f.info >> 16 == PRIORITY);
    let redirections: Vec<bool> = ours.filter_map(|filter| leads_to(filter.options(), to)).collect();
    Ok(redirections == [true])
}

/// `None`: not a filter, but the table that it is in.
fn leads_to(options: Parsed<'_>, to: u32) -> Option<bool> {
    let selector = options.get(U32_SELECTOR)?;
    // The mask of its one key.
    let takes_all = selector.get(2) == Some(&1) && field(selector, 16) == Some(0);
    let actions: Vec<_> = options.nested(U32_ACTIONS).into_iter().flat_map(Parsed::iter).collect();
    let [(_, action)] = actions[..] else { return Some(false) };
    let mirred = Parsed(action).nested(ACTION_OPTIONS).and_then(|options| options.get(MIRRED_PARMS));
    let leads = |parms: &[u8]| (field(parms, 20), field(parms, 24)) == (Some(EGRESS_REDIRECT), Some(to));
    Some(takes_all && mirred.is_some_and(leads))
}

#[cfg(test)]
#[path = "shaping_tests.rs"]
mod kernel_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_known_by_the_time_it_takes_to_fill() {
        let tbf = |rate, burst| Tbf { rate, burst, limit: 0 };
        // 64 KiB at 1 MB/s: 65.536 ms.
        assert!(fills_in(&tbf(1_000_000, 65_536), 1_024_000));
        assert!(
            fills_in(&tbf(1_000_000, 65_536), 1_023_999) && !fills_in(&tbf(1_000_000, 65_536), 1_025_000)
        );
        // 512 MiB at 125 kB/s are more ticks than 32 bits hold.
        let ticks = (536_870_911_u128 * 1_000_000_000 / 125_000) >> 6;
        assert!(ticks > u128::from(u32::MAX) && fills_in(&tbf(125_000, 536_870_911), ticks as u32));
        assert!(!fills_in(&tbf(125_000, 536_870_911), 0));
    }
}
