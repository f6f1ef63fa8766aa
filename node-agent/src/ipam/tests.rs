mod crashes;
mod leftovers;
mod tombstones;
mod transactions;
