//! The lab: a small cluster on one machine to look at and to try things on.
