//! What was given, and where: the command line in Go's flag syntax, then the variables for what it left out.
//!
//! Go's flag package is the reference (flag/flag.go, `parseOne`), with one difference on purpose: nothing is ever
//! ignored. An option, variable or argument that means nothing here ends the start, unless it only says that something
//! which weftd has not is not wanted.

use std::collections::BTreeMap;
use std::fmt;

use super::UsageError;
use super::options::{NOT_YET, OPTIONS, Opt, Origin, Shape, boolean, find, is_off};

/// The values of all options, by name; the last one counts where an option takes one.
#[derive(Debug, Default)]
pub(super) struct Settings {
    given: BTreeMap<&'static str, Vec<Given>>,
    /// Variables that a pod is given by its manifest, and that are nobody's options.
    of_pod: BTreeMap<&'static str, String>,
}

/// By which a pod is told where it runs (the downward API), as flannel's manifest names them.
pub(super) const OF_POD: [&str; 3] = ["NODE_NAME", "POD_NAME", "POD_NAMESPACE"];

#[derive(Debug, Clone)]
struct Given {
    value: String,
    source: Source,
}

/// How the operator wrote it, so that an error can name it the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Flag(String),
    Variable(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Flag(name) if name.len() == 1 => write!(f, "-{name}"),
            Source::Flag(name) => write!(f, "--{name}"),
            Source::Variable(name) => f.write_str(name),
        }
    }
}

impl Settings {
    /// Reads the command line, without the program's name. `None` when it asks for help.
    pub(super) fn from_args(args: impl IntoIterator<Item = String>) -> Result<Option<Self>, UsageError> {
        let mut settings = Self::default();
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                return Err(UsageError::Argument(arg));
            };
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if matches!(name, "h" | "help") {
                return Ok(None);
            }
            if name.is_empty() || name.starts_with('-') {
                return Err(UsageError::Argument(arg));
            }
            let source = Source::Flag(name.to_owned());
            let Some(opt) = find(name) else {
                // Of flannel's options that may be off, this alone is no switch and takes the next argument.
                let value = match value {
                    None if name == "healthz-port" => args.next(),
                    value => value,
                };
                let off = value.as_ref().and_then(|value| is_off(name, value));
                let (name, value) = off.zip(value).ok_or_else(|| unknown(&source, name))?;
                settings.given.entry(name).or_default().push(Given { value, source });
                continue;
            };
            let value = match (value, opt.shape) {
                (Some(value), _) => value,
                (None, Shape::Switch) => "true".to_owned(),
                (None, Shape::Value(expected) | Shape::List(expected)) => {
                    let given = source.clone();
                    args.next().ok_or(UsageError::NoValue { given, expected })?
                }
            };
            settings.given.entry(opt.name).or_default().push(Given { value, source });
        }
        Ok(Some(settings))
    }

    /// Adds the variables of options that the command line left out. An empty variable is none.
    pub(super) fn add_variables(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), UsageError> {
        let mut found = BTreeMap::new();
        for (variable, value) in variables {
            if let Some(name) = OF_POD.into_iter().find(|name| *name == variable) {
                if !value.is_empty() {
                    self.of_pod.insert(name, value);
                }
                continue;
            }
            let Some(name) = option_of(&variable) else { continue };
            let source = Source::Variable(variable.clone());
            match OPTIONS.iter().find(|o| o.variable() == variable) {
                _ if value.is_empty() => {}
                None if is_service_link(&variable) => {}
                None if variable == Origin::Flannel.variable(&name)
                    && (self.given.contains_key(name.as_str()) || is_off(&name, &value).is_some()) => {}
                None => return Err(unknown(&source, &name)),
                Some(opt) if self.given.contains_key(opt.name) => {}
                Some(opt) => {
                    found.insert(opt.name, vec![Given { value, source }]);
                }
            }
        }
        self.given.append(&mut found);
        Ok(())
    }

    /// A variable of [`OF_POD`].
    pub(super) fn of_pod(&self, name: &str) -> Option<&str> {
        self.of_pod.get(name).map(String::as_str)
    }

    /// Where an option was given another value than its default.
    pub(super) fn departure(&self, opt: &Opt) -> Option<&Source> {
        self.last(opt.name).filter(|given| given.value != opt.default).map(|given| &given.source)
    }

    /// Whether an option was given a value at all; an empty one means its default.
    pub(super) fn source(&self, name: &str) -> Option<&Source> {
        self.last(name).map(|g| &g.source)
    }

    /// The value of an option, or its default; `None` when it has neither.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.last(name) {
            Some(given) => Some(&given.value),
            None => find(name).map(|o| o.default).filter(|d| !d.is_empty()),
        }
    }

    /// The value of an option as `read` understands it, or its default's; `expected` is what the error says.
    pub(super) fn parse<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, UsageError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        read(text).map(Some).ok_or_else(|| self.bad(name, expected))
    }

    /// [`Settings::parse`] of an option that has a default.
    pub(super) fn required<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<T, UsageError> {
        self.parse(name, expected, read)?.ok_or_else(|| self.bad(name, expected))
    }

    /// All values of an option that may be given many times.
    pub(super) fn list<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Vec<T>, UsageError> {
        let values = self.given.get(name).into_iter().flatten().filter(|g| !g.value.is_empty());
        values.map(|given| read(&given.value).ok_or_else(|| bad(given, expected))).collect()
    }

    /// `--x`, `--x=true` and their like (strconv.ParseBool).
    pub(super) fn switch(&self, name: &str) -> Result<bool, UsageError> {
        let value = self.parse(name, "true or false", boolean)?;
        Ok(value.unwrap_or(false))
    }

    /// The error for a value of this option that will not do.
    pub(super) fn bad(&self, name: &str, expected: &str) -> UsageError {
        match self.last(name) {
            Some(given) => bad(given, expected),
            None => UsageError::Value {
                given: Source::Flag(name.to_owned()),
                value: self.text(name).unwrap_or_default().to_owned(),
                expected: expected.to_owned(),
            },
        }
    }

    fn last(&self, name: &str) -> Option<&Given> {
        self.given.get(name)?.last().filter(|g| !g.value.is_empty())
    }
}

fn bad(given: &Given, expected: &str) -> UsageError {
    UsageError::Value {
        given: given.source.clone(),
        value: given.value.clone(),
        expected: expected.to_owned(),
    }
}

/// The option that a variable of ours or of flannel's would set, known or not.
fn option_of(variable: &str) -> Option<String> {
    let rest = Origin::ALL.iter().find_map(|origin| variable.strip_prefix(origin.prefix()))?;
    Some(rest.to_lowercase().replace('_', "-"))
}

/// Kubernetes gives every container variables for each Service of its namespace, one named `weftd` included
/// (`WEFTD_SERVICE_HOST`, `WEFTD_PORT_9474_TCP_ADDR`).
fn is_service_link(variable: &str) -> bool {
    let rest =
        Origin::ALL.iter().find_map(|origin| variable.strip_prefix(origin.prefix())).unwrap_or_default();
    rest == "PORT"
        || rest.starts_with("SERVICE_HOST")
        || rest.starts_with("SERVICE_PORT")
        || rest.strip_prefix("PORT_").is_some_and(|port| port.starts_with(|c: char| c.is_ascii_digit()))
}

/// The error for a name that is no option: flannel's and not here yet, or nobody's.
fn unknown(source: &Source, name: &str) -> UsageError {
    // One of flannel's names has underscores.
    if let Some((_, instead)) = NOT_YET.iter().find(|(n, _)| n.replace('_', "-") == name.replace('_', "-")) {
        return UsageError::NotYet { given: source.clone(), instead };
    }
    let alike = |opt: &&Opt| distance(opt.name, name) <= (name.chars().count() / 3).clamp(1, 3);
    let nearest = OPTIONS.iter().filter(alike).min_by_key(|opt| distance(opt.name, name));
    let suggestion = nearest.map(|opt| match source {
        Source::Flag(_) => Source::Flag(opt.name.to_owned()),
        Source::Variable(_) => Source::Variable(opt.variable()),
    });
    UsageError::Unknown { given: source.clone(), suggestion }
}

/// Levenshtein's: single-character edits between two names.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
