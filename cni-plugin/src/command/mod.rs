//! The verbs.

mod add;
mod check;
mod del;
mod query;

pub(crate) use add::add;
pub(crate) use check::check;
pub(crate) use del::del;
pub(crate) use query::{gc, status};
