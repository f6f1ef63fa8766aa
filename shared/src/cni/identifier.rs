//! The names that the specification gives one form: an ASCII letter or digit, then letters, digits, `_`, `.`, `-`
//! (SPEC.md, "Parameters"). One that has been checked is safe as part of a message, a record or a path.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::json::brief;

/// The specification sets no limit; an identifier becomes part of file contents and messages, so there is one.
const MAX_LEN: usize = 255;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {text:?} must begin with a letter or digit, go on with letters, digits, '_', '.' or '-', and be at most {MAX_LEN} bytes"
)]
pub struct BadIdentifier {
    what: &'static str,
    /// Shortened.
    text: String,
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = BadIdentifier;

            fn from_str(text: &str) -> Result<Self, BadIdentifier> {
                text.to_owned().try_into()
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadIdentifier;

            fn try_from(text: String) -> Result<Self, BadIdentifier> {
                if has_form(&text) { Ok(Self(text)) } else { Err(BadIdentifier { what: $what, text: brief(&text) }) }
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

identifier!(
    /// `name` of a network configuration.
    NetworkName,
    "network name"
);
identifier!(
    /// `CNI_CONTAINERID`.
    ContainerId,
    "container ID"
);

fn has_form(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= MAX_LEN
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_holds_however_the_text_comes() {
        let (long, too_long) = ("x".repeat(MAX_LEN), "x".repeat(MAX_LEN + 1));
        for good in ["a", "0", "C1_.-x", long.as_str()] {
            assert_eq!(good.parse::<ContainerId>().expect(good).as_str(), good);
            let json = serde_json::to_string(good).expect("json");
            assert_eq!(serde_json::from_str::<NetworkName>(&json).expect(good).to_string(), good);
        }
        for bad in ["", "-a", ".", "..", "../a", "a/b", "a b", "ä", "a\n", too_long.as_str()] {
            let error = bad.parse::<ContainerId>().expect_err(bad).to_string();
            assert!(error.starts_with("container ID \"") && error.len() < 250, "{error}");
            let json = serde_json::to_string(bad).expect("json");
            assert!(
                serde_json::from_str::<NetworkName>(&json)
                    .expect_err(bad)
                    .to_string()
                    .contains("network name")
            );
        }
    }
}
