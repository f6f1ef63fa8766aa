//! The loads: what runs in the two pods, and how one measurement is put together from it.
//!
//! The side that receives (or waits for answers) measures by itself, after a warm-up, over a window of its own clock;
//! sources send until they are ended.

pub mod exchange;
pub mod tcp;
pub mod udp;

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::choice::Load;
use super::interrupt::Interrupt;
use super::program::{Part, Program, Role};
use super::result::Sample;
use crate::netns::Netns;

/// Connecting, and everything else that is neither warm-up nor window.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a pod, or a node, is.
#[derive(Debug, Clone)]
pub struct Place {
    pub netns: Netns,
    pub address: Ipv4Addr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    pub warm_up: Duration,
    pub window: Duration,
}

impl Timing {
    fn patience(&self) -> Duration {
        self.warm_up + self.window * 2 + PATIENCE
    }
}

/// One measurement, from the first place to the second.
pub fn measure(
    load: Load,
    [near, far]: &[Place; 2],
    timing: Timing,
    cores: &[usize],
    interrupt: &Interrupt,
) -> Result<Sample> {
    let start = |place: &Place, role| Program::start(&place.netns, &Part { cores: cores.to_vec(), role });
    let bind = far.address;
    let (sink, is_source_meter) = match load {
        Load::Tcp1 => (Role::TcpSink(tcp::Sink { bind, streams: 1, timing }), false),
        Load::Tcp4 => (Role::TcpSink(tcp::Sink { bind, streams: 4, timing }), false),
        Load::Udp1 => (Role::UdpSink(udp::Sink { bind, timing }), false),
        Load::Udp64 => (Role::UdpSink(udp::Sink { bind, timing }), false),
        Load::Exchange1 => (Role::ExchangeServer(exchange::Server { bind, connections: 1 }), true),
        Load::Exchange16 => (Role::ExchangeServer(exchange::Server { bind, connections: 16 }), true),
    };
    let mut sink = start(far, sink)?;
    let to = sink.listening(PATIENCE, interrupt).context("the receiving side")?;
    let source = match load {
        Load::Tcp1 => Role::TcpSource(tcp::Source { to, streams: 1 }),
        Load::Tcp4 => Role::TcpSource(tcp::Source { to, streams: 4 }),
        Load::Udp1 => Role::UdpSource(udp::Source { to, pattern: udp::Pattern::Small }),
        Load::Udp64 => Role::UdpSource(udp::Source { to, pattern: udp::Pattern::Mixed }),
        Load::Exchange1 => Role::ExchangeClient(exchange::Client { to, connections: 1, timing }),
        Load::Exchange16 => Role::ExchangeClient(exchange::Client { to, connections: 16, timing }),
    };
    let mut source = start(near, source)?;
    let meter = if is_source_meter { &mut source } else { &mut sink };
    let measured = meter.measured(timing.patience(), interrupt);
    measured.with_context(|| format!("{} ({})", source.complaint(), sink.complaint()))
}
