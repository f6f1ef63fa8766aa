//! `floor`: what `scripts/bench cni` measures plugins against. An executable of its own, as small as a plugin's.

use std::process::ExitCode;

use e2e::bench::cni::floor;
use e2e::lab::out::complain;

fn main() -> ExitCode {
    match floor::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(format!("floor: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
