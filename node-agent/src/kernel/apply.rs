//! Operations as requests. Links go one by one, for what follows needs their index; everything else goes in batches.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_packet_route::address::AddressMessage;
use nix::libc::{EACCES, EADDRNOTAVAIL, EBUSY, EEXIST, EINVAL, ENODEV, ENOENT, ENXIO, EPERM, ESRCH};
use weft_shared::IfName;

use super::nft::Firewall;
use super::socket::{Request, RouteSocket};
use super::{Errno, KernelError};
use super::{decode, encode, shaping};
use crate::object::{Found, Link, LinkKind, Object, Op, RouteChange};
use crate::tun;

/// Interface indices by name, as far as they are known.
pub(super) type Indices = BTreeMap<IfName, u32>;

pub(super) fn apply(
    socket: &mut RouteSocket,
    indices: &mut Indices,
    firewall: &mut Firewall,
    sysctl_dir: &Path,
    ops: &[Op],
) -> Vec<Result<(), KernelError>> {
    let mut results = vec![Ok(()); ops.len()];
    let mut batch = Batch::default();
    for (place, op) in ops.iter().enumerate() {
        match op {
            Op::Set { object: Object::Name { name, now }, .. } => {
                batch.flush(socket, &mut results);
                results[place] = rename(socket, indices, now, name);
            }
            Op::Set { object: object @ Object::Link { name, link }, found } => {
                batch.flush(socket, &mut results);
                let found = found.as_ref().map(|f| &f.object);
                let anew = found.is_some_and(|found| object.needs_recreation(found));
                results[place] = set_link(socket, indices, name, link, found, anew);
            }
            Op::Set { object: Object::Sysctl { path, value }, .. } => {
                results[place] = super::sysctl::write(sysctl_dir, path, value);
            }
            Op::Set { object: Object::Firewall(part), .. } => {
                results[place] = firewall.set(part, || own_addresses(socket));
            }
            Op::Remove(Object::Firewall(part)) => results[place] = firewall.remove(part),
            Op::Set { object, found } => match requests(indices, object, found.as_ref()) {
                Ok(requests) => batch.push(place, requests),
                Err(error) => results[place] = Err(error),
            },
            Op::Remove(object) => match removal(indices, object) {
                Some(request) => batch.push(place, vec![request]),
                // What stood on a device that is gone is gone.
                None => results[place] = Ok(()),
            },
        }
    }
    batch.flush(socket, &mut results);
    results
}

/// A request, and the refusals that mean that its goal is reached.
struct Step {
    request: Request,
    fine: &'static [i32],
}

impl Step {
    fn new(message: Message, flags: u16) -> Self {
        Self { request: Request { message, flags }, fine: &[] }
    }

    /// A removal that finds nothing has reached its goal.
    fn removing(message: Message) -> Self {
        Self { fine: &[ENODEV, ENOENT, ESRCH, EADDRNOTAVAIL], ..Self::new(message, 0) }
    }
}

/// Requests gathered for one system call, each with the operation it belongs to.
#[derive(Default)]
struct Batch {
    requests: Vec<Request>,
    places: Vec<(usize, &'static [i32])>,
}

impl Batch {
    fn push(&mut self, place: usize, steps: Vec<Step>) {
        for Step { request, fine } in steps {
            self.places.push((place, fine));
            self.requests.push(request);
        }
    }

    /// An operation of several requests fails with its first failure.
    fn flush(&mut self, socket: &mut RouteSocket, results: &mut [Result<(), KernelError>]) {
        let answers = socket.batch(&std::mem::take(&mut self.requests));
        for ((place, fine), answer) in self.places.drain(..).zip(answers) {
            if results[place].is_ok() {
                results[place] = unless(fine, answer);
            }
        }
    }
}

fn unless(fine: &[i32], answer: Result<(), KernelError>) -> Result<(), KernelError> {
    match answer {
        Err(KernelError::Refused(Errno(errno))) if fine.contains(&errno) => Ok(()),
        other => other,
    }
}

/// Kernels before 6.3 rename a device only while it is down; the next look brings it up again.
fn rename(
    socket: &mut RouteSocket,
    indices: &mut Indices,
    now: &IfName,
    name: &IfName,
) -> Result<(), KernelError> {
    let index = index_of(indices, now)?;
    let rename = || plain(Message::SetLink(encode::rename_link(index, name)));
    match socket.request(rename()) {
        Err(KernelError::Refused(Errno(EBUSY))) => {
            socket.request(plain(Message::SetLink(encode::down(index))))?;
            socket.request(rename())
        }
        other => other,
    }
}

fn set_link(
    socket: &mut RouteSocket,
    indices: &mut Indices,
    name: &IfName,
    link: &Link,
    found: Option<&Object>,
    anew: bool,
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
        Some(have) if !anew => {
            let index = index_of(indices, name)?;
            return change_link(socket, index, link, have);
        }
        Some(_) => {
            let old = encode::link_by_index(index_of(indices, name)?);
            unless(&[ENODEV], socket.request(plain(Message::DelLink(old))))?;
        }
        None => {}
    }
    if matches!(link.kind, LinkKind::Tun(_)) {
        make_tun(name)?;
        if let Some(Message::NewLink(made)) = socket.get(encode::link_by_name(name))? {
            let index = made.header.index;
            indices.insert(name.clone(), index);
            if let Some((_, made, _)) = decode::link(&made) {
                change_link(socket, index, link, &made.link)?;
            }
        }
        return Ok(());
    }
    let new = Message::NewLink(encode::new_link(name, link));
    match socket.request(Request { message: new, flags: NLM_F_CREATE | NLM_F_EXCL }) {
        Err(KernelError::Refused(Errno(EEXIST))) => return Err(KernelError::Taken(name.clone())),
        other => other?,
    }
    if let Some(Message::NewLink(made)) = socket.get(encode::link_by_name(name))? {
        indices.insert(name.clone(), made.header.index);
    }
    Ok(())
}

/// In the network namespace of this thread, as its netlink socket.
fn make_tun(name: &IfName) -> Result<(), KernelError> {
    tun::create(name).map_err(|error| no_tun(name, &error))
}

/// With what it takes, where the error tells.
fn no_tun(name: &IfName, error: &io::Error) -> KernelError {
    let remedy = match error.raw_os_error() {
        // Another TUN device has the name; a device of another kind has it.
        Some(EBUSY | EINVAL) => return KernelError::Taken(name.clone()),
        Some(ENOENT | ENODEV | ENXIO) => ": it takes the module tun and, in a container, the device node",
        Some(EPERM | EACCES) => ": it takes CAP_NET_ADMIN and, in a container, leave to use the device node",
        _ => "",
    };
    KernelError::NoTun(format!("{error}{remedy}"))
}

/// `RTM_NEWLINK` and not `RTM_SETLINK`: only the former changes a kind's own options (net/core/rtnetlink.c).
fn change_link(socket: &mut RouteSocket, index: u32, link: &Link, have: &Link) -> Result<(), KernelError> {
    socket.request(plain(Message::NewLink(encode::change_link(index, link, have))))
}

/// The messages that make `object` so. A route of somebody else's under the same key is never replaced: ours goes
/// before it (`ip route prepend`) and theirs stays.
fn requests(indices: &Indices, object: &Object, found: Option<&Found>) -> Result<Vec<Step>, KernelError> {
    let replace = NLM_F_CREATE | NLM_F_REPLACE;
    Ok(match object {
        Object::Name { .. } | Object::Link { .. } | Object::Sysctl { .. } | Object::Firewall(_) => Vec::new(),
        Object::BridgePort { veth, port } => {
            let index = index_of(indices, veth)?;
            let mut steps = Vec::new();
            if let Some(bridge) = &port.bridge {
                let bridge = index_of(indices, bridge)?;
                steps.push(Step::new(Message::SetLink(encode::enslave(index, bridge, port)), 0));
            }
            let altered =
                matches!(found, Some(Found { object: Object::BridgePort { port, .. }, .. }) if port.altered);
            steps.push(Step::new(Message::NewLink(encode::port_options(index, port, altered)), 0));
            steps
        }
        Object::Shaper { dev, tbf } => {
            let (message, flags) = shaping::set_bucket(index_of(indices, dev)?, tbf);
            vec![Step::new(message, flags)]
        }
        Object::Redirect { dev, to } => {
            let (index, to) = (index_of(indices, dev)?, index_of(indices, to)?);
            let ((queue, make), (filter, add)) =
                (shaping::add_ingress(index), shaping::add_filter(index, to));
            vec![
                Step { fine: &[EEXIST], ..Step::new(queue, make) },
                Step { fine: &[ENOENT, EINVAL], ..Step::new(shaping::remove_filter(index), 0) },
                Step::new(filter, add),
            ]
        }
        Object::Addr { dev, addr, scope, form } => {
            let index = index_of(indices, dev)?;
            let new = Step::new(Message::NewAddress(encode::address(index, *addr, *form)), replace);
            match found.map(|f| &f.object) {
                // The kernel replaces a lifetime and a metric, and nothing else.
                Some(Object::Addr { scope: old_scope, form: old, .. })
                    if old_scope != scope || !old.can_be_replaced() =>
                {
                    vec![Step::removing(Message::DelAddress(encode::address(index, *addr, *old))), new]
                }
                _ => vec![new],
            }
        }
        Object::Neigh { dev, ip, mac } => {
            let message = encode::neighbour(index_of(indices, dev)?, *ip, *mac);
            vec![Step::new(Message::NewNeighbour(message), replace)]
        }
        Object::Fdb { dev, mac, dst, path } => {
            let index = index_of(indices, dev)?;
            let new = Step::new(Message::NewNeighbour(encode::fdb(index, *mac, *dst, *path)), replace);
            match found.map(|f| &f.object) {
                // The kernel does not turn a nexthop object into a destination.
                Some(Object::Fdb { dst, path, .. }) if path.nexthop.is_some() => {
                    let old = Message::DelNeighbour(encode::fdb(index, *mac, *dst, *path));
                    vec![Step::removing(old), new]
                }
                _ => vec![new],
            }
        }
        Object::Route { dst, route } => {
            let index = route.dev.as_ref().map(|dev| index_of(indices, dev)).transpose()?;
            let set = |flags| Step::new(Message::NewRoute(encode::route(index, *dst, route)), flags);
            // The very same route is there already: the kernel makes connected ones itself.
            let prepend = Step { fine: &[EEXIST], ..set(NLM_F_CREATE) };
            let old = found.and_then(|f| removal(indices, &f.object));
            match RouteChange::from_found(route, found) {
                RouteChange::Replace => vec![set(replace)],
                RouteChange::Prepend => vec![prepend],
                RouteChange::MoveToFront => old.into_iter().chain([prepend]).collect(),
                RouteChange::PrependThenRemove => [prepend].into_iter().chain(old).collect(),
            }
        }
    })
}

/// `None`: what it stood on is gone, or it is nothing that is ever removed.
fn removal(indices: &Indices, object: &Object) -> Option<Step> {
    let message = match object {
        Object::Link { name, .. } => Message::DelLink(encode::link_by_index(*indices.get(name)?)),
        Object::Name { .. }
        | Object::Sysctl { .. }
        | Object::Firewall(_)
        | Object::BridgePort { .. }
        | Object::Shaper { .. }
        | Object::Redirect { .. } => return None,
        Object::Addr { dev, addr, form, .. } => {
            Message::DelAddress(encode::address(*indices.get(dev)?, *addr, *form))
        }
        Object::Neigh { dev, ip, mac } => {
            Message::DelNeighbour(encode::neighbour(*indices.get(dev)?, *ip, *mac))
        }
        Object::Fdb { dev, mac, dst, path } => {
            Message::DelNeighbour(encode::fdb(*indices.get(dev)?, *mac, *dst, *path))
        }
        Object::Route { dst, route } => {
            let index = match &route.dev {
                Some(dev) => Some(*indices.get(dev)?),
                None => None,
            };
            Message::DelRoute(encode::route_to_delete(index, *dst, route))
        }
    };
    Some(Step::removing(message))
}

fn own_addresses(socket: &mut RouteSocket) -> Result<BTreeSet<IpAddr>, KernelError> {
    let messages = socket.dump(Message::GetAddress(AddressMessage::default()))?;
    let decoded = messages.iter().filter_map(|message| match message {
        Message::NewAddress(address) => decode::address(address),
        _ => None,
    });
    Ok(decoded.map(|found| found.addr.ip()).collect())
}

fn plain(message: Message) -> Request {
    Request { message, flags: 0 }
}

fn index_of(indices: &Indices, name: &IfName) -> Result<u32, KernelError> {
    indices.get(name).copied().ok_or_else(|| KernelError::NoDevice(name.clone()))
}

#[cfg(test)]
mod tests {
    use nix::libc::EMFILE;

    use super::*;

    #[test]
    fn a_tun_device_that_cannot_be_made_is_blamed_on_what_the_error_tells() {
        let name: IfName = "flannel0".parse().expect("name");
        let said = |errno| no_tun(&name, &io::Error::from_raw_os_error(errno)).to_string();
        for errno in [ENOENT, ENODEV, ENXIO] {
            assert!(said(errno).contains("module tun") && !said(errno).contains("CAP_NET_ADMIN"), "{errno}");
        }
        for errno in [EPERM, EACCES] {
            assert!(said(errno).contains("CAP_NET_ADMIN") && !said(errno).contains("module"), "{errno}");
        }
        assert!(said(EBUSY).starts_with("flannel0 exists: ") && said(EINVAL) == said(EBUSY));
        let other = said(EMFILE);
        assert!(other.starts_with("/dev/net/tun: ") && other.ends_with("(os error 24)"), "{other}");
    }
}
