mod bandwidth;
mod crashes;
mod host_ports;
mod leftovers;
mod tombstones;
mod transactions;
