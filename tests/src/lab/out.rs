//! What the lab says. A reader that has seen enough (`scripts/lab status | head`) is no error, and no reason to leave an
//! `up` half done: the command goes on to its own end and exit code.

use std::fmt::Display;
use std::io::{self, Write};

pub fn say(text: impl Display) {
    line(&mut io::stdout(), text);
}

pub fn complain(text: impl Display) {
    line(&mut io::stderr(), text);
}

fn line(to: &mut impl Write, text: impl Display) {
    let _ = writeln!(to, "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_went_away_is_no_error() -> io::Result<()> {
        let (reader, mut writer) = io::pipe()?;
        drop(reader);
        assert_eq!(writer.write(b"x").map_err(|e| e.kind()), Err(io::ErrorKind::BrokenPipe));
        line(&mut writer, "no panic");
        Ok(())
    }
}
