//! The operator's command; everything is in [`weft_agent::ctl`].

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_agent::ctl::main()
}
