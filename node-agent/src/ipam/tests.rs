mod bandwidth;
mod crashes;
mod host_ports;
mod leftovers;
mod options;
mod tombstones;
mod transactions;
