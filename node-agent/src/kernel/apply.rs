//! Operations as requests. Links go one by one, for what follows needs their index; everything else goes in batches.

use std::collections::BTreeMap;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage as Message;
use nix::libc::{EADDRNOTAVAIL, ENODEV, ENOENT, ESRCH};
use weft_shared::IfName;

use super::encode;
use super::nft::Firewall;
use super::socket::{Request, RouteSocket};
use super::{Errno, KernelError};
use crate::object::{Found, Link, LinkKind, Object, Op};

/// Interface indices by name, as far as they are known.
pub(super) type Indices = BTreeMap<IfName, u32>;

pub(super) fn apply(
    socket: &mut RouteSocket,
    indices: &mut Indices,
    firewall: &mut Firewall,
    ops: &[Op],
) -> Vec<Result<(), KernelError>> {
    let mut results = vec![Ok(()); ops.len()];
    let mut batch = Batch::default();
    for (place, op) in ops.iter().enumerate() {
        match op {
            Op::Set { object: Object::Link { name, link }, found } => {
                batch.flush(socket, &mut results);
                let found = found.as_ref().map(|f| &f.object);
                results[place] = set_link(socket, indices, name, link, found);
            }
            Op::Set { object: Object::Sysctl { path, value }, .. } => {
                results[place] = super::sysctl::write(path, value);
            }
            Op::Set { object: Object::Firewall(part), .. } => results[place] = firewall.set(part),
            Op::Remove(Object::Firewall(part)) => results[place] = firewall.remove(part),
            Op::Set { object, found } => match requests(indices, object, found.as_ref()) {
                Ok(requests) => batch.push(place, requests, false),
                Err(error) => results[place] = Err(error),
            },
            Op::Remove(object) => match removal(indices, object) {
                Some(request) => batch.push(place, vec![request], true),
                // What stood on a device that is gone is gone.
                None => results[place] = Ok(()),
            },
        }
    }
    batch.flush(socket, &mut results);
    results
}

/// Requests gathered for one system call, each with the operation it belongs to.
#[derive(Default)]
struct Batch {
    requests: Vec<Request>,
    places: Vec<(usize, bool)>,
}

impl Batch {
    fn push(&mut self, place: usize, requests: Vec<Request>, is_removal: bool) {
        self.places.extend(requests.iter().map(|_| (place, is_removal)));
        self.requests.extend(requests);
    }

    /// An operation of several requests fails with its first failure.
    fn flush(&mut self, socket: &mut RouteSocket, results: &mut [Result<(), KernelError>]) {
        let answers = socket.batch(&std::mem::take(&mut self.requests));
        for ((place, is_removal), answer) in self.places.drain(..).zip(answers) {
            let answer = if is_removal { gone_is_fine(answer) } else { answer };
            if results[place].is_ok() {
                results[place] = answer;
            }
        }
    }
}

/// A removal that finds nothing has reached its goal.
fn gone_is_fine(answer: Result<(), KernelError>) -> Result<(), KernelError> {
    match answer {
        Err(KernelError::Refused(Errno(ENODEV | ENOENT | ESRCH | EADDRNOTAVAIL))) => Ok(()),
        other => other,
    }
}

fn set_link(
    socket: &mut RouteSocket,
    indices: &mut Indices,
    name: &IfName,
    link: &Link,
    found: Option<&Object>,
) -> Result<(), KernelError> {
    let existing = match found {
        Some(Object::Link { link: have, .. }) => Some(have),
        _ => None,
    };
    match existing {
        // Somebody else's device, whatever it is. Only an overlay device of ours is deleted to be made anew.
        Some(have) if link.kind == LinkKind::Bridge && have.kind != LinkKind::Bridge => {
            return Err(KernelError::NotABridge { name: name.clone(), kind: have.kind.to_string() });
        }
        Some(have) if have.kind == link.kind => {
            let index = index_of(indices, name)?;
            return socket.request(request(Message::SetLink(encode::change_link(index, link, have)), 0));
        }
        Some(_) => {
            let old = encode::link_by_index(index_of(indices, name)?);
            gone_is_fine(socket.request(request(Message::DelLink(old), 0)))?;
        }
        None => {}
    }
    socket.request(request(Message::NewLink(encode::new_link(name, link)), NLM_F_CREATE | NLM_F_EXCL))?;
    if let Some(Message::NewLink(made)) = socket.get(encode::link_by_name(name))? {
        indices.insert(name.clone(), made.header.index);
    }
    Ok(())
}

/// The messages that make `object` so. A route of somebody else's under the same key is not replaced: ours goes before
/// it (`ip route prepend`) and theirs stays.
fn requests(indices: &Indices, object: &Object, found: Option<&Found>) -> Result<Vec<Request>, KernelError> {
    let replace = NLM_F_CREATE | NLM_F_REPLACE;
    Ok(match object {
        Object::Link { .. } | Object::Sysctl { .. } | Object::Firewall(_) => Vec::new(),
        Object::Port { veth, port } => {
            let index = index_of(indices, veth)?;
            let mut requests = Vec::new();
            if let Some(bridge) = &port.bridge {
                let bridge = index_of(indices, bridge)?;
                requests.push(request(Message::SetLink(encode::enslave(index, bridge, port)), 0));
            }
            requests.push(request(Message::NewLink(encode::port_options(index, port)), 0));
            requests
        }
        Object::Addr { dev, addr, .. } => {
            let address = encode::address(index_of(indices, dev)?, *addr);
            // The kernel replaces an address's lifetime, but never its scope.
            let old = found.map(|_| request(Message::DelAddress(address.clone()), 0));
            old.into_iter().chain([request(Message::NewAddress(address), replace)]).collect()
        }
        Object::Neigh { dev, ip, mac } => {
            vec![request(
                Message::NewNeighbour(encode::neighbour(index_of(indices, dev)?, *ip, *mac)),
                replace,
            )]
        }
        Object::Fdb { dev, mac, dst } => {
            vec![request(Message::NewNeighbour(encode::fdb(index_of(indices, dev)?, *mac, *dst)), replace)]
        }
        Object::Route { dst, route } => {
            let flags = if found.is_some_and(|f| f.ours) { replace } else { NLM_F_CREATE };
            vec![request(
                Message::NewRoute(encode::route(index_of(indices, &route.dev)?, *dst, route)),
                flags,
            )]
        }
    })
}

fn removal(indices: &Indices, object: &Object) -> Option<Request> {
    let message = match object {
        Object::Link { name, .. } => Message::DelLink(encode::link_by_index(*indices.get(name)?)),
        Object::Sysctl { .. } | Object::Firewall(_) | Object::Port { .. } => return None,
        Object::Addr { dev, addr, .. } => Message::DelAddress(encode::address(*indices.get(dev)?, *addr)),
        Object::Neigh { dev, ip, mac } => {
            Message::DelNeighbour(encode::neighbour(*indices.get(dev)?, *ip, *mac))
        }
        Object::Fdb { dev, mac, dst } => Message::DelNeighbour(encode::fdb(*indices.get(dev)?, *mac, *dst)),
        Object::Route { dst, route } => {
            Message::DelRoute(encode::route(*indices.get(&route.dev)?, *dst, route))
        }
    };
    Some(request(message, 0))
}

fn request(message: Message, flags: u16) -> Request {
    Request { message, flags }
}

fn index_of(indices: &Indices, name: &IfName) -> Result<u32, KernelError> {
    indices.get(name).copied().ok_or_else(|| KernelError::NoDevice(name.clone()))
}
