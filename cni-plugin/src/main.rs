//! See the library: this file only hands it the process.

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    ExitCode::from(weft_cni::run(
        &|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()),
        &args,
        &io::stdin(),
        &mut io::stdout().lock(),
        &mut io::stderr().lock(),
    ))
}
