//! JSON objects that people write, read value by value: each with its type checked, each refusal by full key path,
//! value and expectation. `null` reads as absent, as Go's decoder leaves a field untouched.

use serde_json::{Map, Value};

/// A refusal has to fit a log line and the runtime's event.
const MAX_SHOWN: usize = 60;

/// A value that is not what its key asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value}: expected {expected}")]
pub struct BadValue {
    /// The full path, such as `runtimeConfig.ips`.
    pub key: String,
    /// JSON, shortened.
    pub value: String,
    pub expected: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Exact,
    /// As Go's decoder matches. The exact spelling wins, for determinism when a document has several.
    Ignored,
}

/// An object of a document, or nothing where an optional one is absent.
#[derive(Debug, Clone)]
pub(crate) struct Keys<'a> {
    path: String,
    case: Case,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Keys<'a> {
    pub(crate) fn top(map: &'a Map<String, Value>, case: Case) -> Self {
        Self { path: String::new(), case, map: Some(map) }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        let map = self.map?;
        let similar = || map.iter().find(|(k, _)| k.eq_ignore_ascii_case(key)).map(|(_, v)| v);
        let found = match self.case {
            Case::Exact => map.get(key),
            Case::Ignored => map.get(key).or_else(similar),
        };
        found.filter(|value| !value.is_null())
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.into_iter().flatten().map(|(key, _)| key.as_str())
    }

    pub(crate) fn str(&self, key: &str, expected: &str) -> Result<Option<&'a str>, BadValue> {
        self.typed(key, expected, Value::as_str)
    }

    pub(crate) fn bool(&self, key: &str, default: bool) -> Result<bool, BadValue> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    pub(crate) fn integer<T: TryFrom<u64>>(&self, key: &str, expected: &str) -> Result<Option<T>, BadValue> {
        self.typed(key, expected, |value| value.as_u64()?.try_into().ok())
    }

    /// An absent list is an empty one.
    pub(crate) fn list(&self, key: &str, expected: &str) -> Result<&'a [Value], BadValue> {
        Ok(self.typed(key, expected, Value::as_array)?.map_or(&[], Vec::as_slice))
    }

    /// A list of objects, each with its place in its path and `case` for its own keys.
    pub(crate) fn objects(&self, key: &str, case: Case, expected: &str) -> Result<Vec<Self>, BadValue> {
        let one = |(at, item): (usize, &'a Value)| {
            let map = item.as_object().ok_or_else(|| self.bad_part(key, item, expected))?;
            Ok(Self { path: format!("{}[{at}].", self.path_of(key)), case, map: Some(map) })
        };
        self.list(key, expected)?.iter().enumerate().map(one).collect()
    }

    /// An absent object is an empty one.
    pub(crate) fn object(&self, key: &str, expected: &str) -> Result<Self, BadValue> {
        let map = self.typed(key, expected, Value::as_object)?;
        Ok(Self { path: format!("{}.", self.path_of(key)), case: self.case, map })
    }

    /// The same with `case` for the object's own keys.
    pub(crate) fn object_of(&self, key: &str, case: Case, expected: &str) -> Result<Self, BadValue> {
        self.object(key, expected).map(|object| Self { case, ..object })
    }

    pub(crate) fn path_of(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    pub(crate) fn bad(&self, key: &str, expected: &str) -> BadValue {
        self.bad_part(key, self.get(key).unwrap_or(&Value::Null), expected)
    }

    /// For a part of the key's value, such as one item of a list.
    pub(crate) fn bad_part(&self, key: &str, part: &Value, expected: &str) -> BadValue {
        BadValue { key: self.path_of(key), value: brief(&part.to_string()), expected: expected.to_owned() }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, BadValue> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.bad(key, expected))).transpose()
    }
}

/// A text short enough for one line.
pub(crate) fn brief(text: &str) -> String {
    if text.chars().count() <= MAX_SHOWN {
        text.to_owned()
    } else {
        text.chars().take(MAX_SHOWN - 1).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_null_and_paths() {
        let json = r#"{"Mtu":1,"MTU":2,"on":null,"inner":{"List":[5]}}"#;
        let map: Map<String, Value> = serde_json::from_str(json).expect("json");
        let (exact, ignored) = (Keys::top(&map, Case::Exact), Keys::top(&map, Case::Ignored));
        assert_eq!(ignored.integer::<u32>("MTU", "a number"), Ok(Some(2)));
        assert!(ignored.integer::<u32>("mtu", "a number").expect("any spelling").is_some());
        assert_eq!(exact.integer::<u32>("mtu", "a number"), Ok(None));
        assert_eq!(exact.bool("on", true), Ok(true));
        let inner = ignored.object("INNER", "an object").expect("object");
        assert_eq!(inner.list("list", "a list").expect("list").len(), 1);
        assert_eq!(inner.bad_part("list", &5.into(), "text").to_string(), "INNER.list = 5: expected text");
        assert!(exact.object("none", "an object").expect("absent").get("x").is_none());
    }

    #[test]
    fn long_values_are_shortened() {
        let map = Map::from_iter([("name".to_owned(), Value::from("ä".repeat(500)))]);
        let bad = Keys::top(&map, Case::Exact).integer::<u8>("name", "a number").expect_err("text");
        assert_eq!(bad.value.chars().count(), MAX_SHOWN);
        assert!(bad.value.ends_with('…'));
    }
}
