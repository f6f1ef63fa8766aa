//! Pages of the guide whose commands are tests: every block of commands begins with a line that says where it is run, or
//! why it is not.

use anyhow::{Result, bail, ensure};

/// A block of commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Where it is run; nowhere, if the page says so.
    pub place: Option<String>,
    /// What the page says behind the place, or why it is not run.
    pub note: String,
    pub script: String,
}

/// The blocks of a page, in its order. One without a mark is an error.
pub fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut found = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        let Some(language) = line.strip_prefix("```") else { continue };
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        if language != "sh" {
            continue;
        }
        let mark = body.first().copied().unwrap_or_default();
        let script = body.get(1..).unwrap_or_default().join("\n");
        if let Some(note) = mark.strip_prefix("# not run: ") {
            found.push(Block { place: None, note: note.to_owned(), script });
            continue;
        }
        let Some(run) = mark.strip_prefix("# run: ") else { bail!("a block without a mark: {mark:?}") };
        let (place, note) = run.split_once(", ").unwrap_or((run, ""));
        ensure!(!place.is_empty(), "no place in {mark:?}");
        found.push(Block { place: Some(place.to_owned()), note: note.to_owned(), script });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_of_commands_has_a_mark() {
        let page = "text\n```sh\n# run: hosts 1 3, when x\na\nb\n```\n```sh\n# not run: why\nc\n```\n```json\n{}\n```\n";
        let block = |place: Option<&str>, note: &str, script: &str| Block {
            place: place.map(str::to_owned),
            note: note.to_owned(),
            script: script.to_owned(),
        };
        let expected = [block(Some("hosts 1 3"), "when x", "a\nb"), block(None, "why", "c")];
        assert_eq!(blocks(page).expect("marks"), expected);
        for wrong in ["```sh\nrm -rf x\n```", "```sh\n# run: , x\nx\n```", "```sh\n# not run\nx\n```"] {
            blocks(wrong).expect_err(wrong);
        }
    }
}
